"""Indices on disk, for the next process that asks about the same file.

A build-id is what a file says of itself, so a file that means harm may have that of libc. So what is kept says which bytes
of the file it was made of, and with which hash: those bytes are read again before it is believed. They are headers and
tables, far less than what was worked out of them.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import tempfile
import zlib
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from trapline_agent.symbols.elf import Segment, SymbolTable
from trapline_agent.symbols.names import Names
from trapline_agent.symbols.separate import DebugPath

FORMAT = 1
"""Raised with every change of what is kept or of how it is made."""
MAX_BYTES = 512 << 20
MAX_FILES = 2000
_MAGIC = b"trapline-symbols"
_HEAD = len(_MAGIC) + 8
_MAX_READS = 100_000
_HASH_CHUNK = 1 << 20

_COLUMNS: tuple[tuple[str, type[np.generic]], ...] = (
    ("version", np.uint16),
    ("default", np.bool_),
    ("offsets", np.uint64),
    ("sizes", np.uint64),
    ("types", np.uint8),
    ("binds", np.uint8),
)


class StoredTable(msgspec.Struct, array_like=True):
    """A ``SymbolTable`` as bytes: little-endian columns."""

    names: bytes
    versions: list[str]
    version: bytes
    default: bytes
    offsets: bytes
    sizes: bytes
    types: bytes
    binds: bytes
    order: bytes
    """32-bit indices of the rows by their offsets."""

    @staticmethod
    def of(table: SymbolTable) -> StoredTable:
        columns = {name: np.ascontiguousarray(getattr(table, name), kind).tobytes() for name, kind in _COLUMNS}
        order = np.argsort(table.offsets, kind="stable").astype(np.uint32)
        return StoredTable(names=table.names.blob, versions=list(table.versions), order=order.tobytes(), **columns)

    def columns(self) -> SymbolTable:
        """Returns the table. Raises ValueError where it does not hang together."""
        names = Names(self.names)
        columns: list[npt.NDArray[np.generic]] = [np.frombuffer(getattr(self, name), kind) for name, kind in _COLUMNS]
        if any(len(c) != len(names) for c in columns) or not self.versions:
            raise ValueError("columns of different lengths")
        if len(self.order) != 4 * len(names):
            raise ValueError("an order of another length")
        return SymbolTable(names, self.versions, *columns)  # type: ignore[arg-type]


class Stored(msgspec.Struct, array_like=True):
    """What is kept of one file: the fields of a ``SymbolIndex``."""

    path: str
    size: int
    build_id: str
    soname: str
    segments: list[Segment]
    entry: int | None
    relocated: list[int]
    stripped: bool
    source: str
    dynamic_count: int
    imports: bytes
    table: StoredTable


class _File(msgspec.Struct, array_like=True):
    reads: list[tuple[int, int]]
    """(offset, size) of all that was read of the file."""
    digest: bytes
    """Of those bytes."""
    debug: DebugPath | None
    """The debug file that was read too; it is the host's own, and believed by its stamp."""
    stored: Stored


def stamp(fd: int) -> tuple[int, int, int, int, int]:
    """Returns what tells an open file from others, and from itself before it was changed."""
    st = os.fstat(fd)
    return st.st_dev, st.st_ino, st.st_mtime_ns, st.st_ctime_ns, st.st_size


class Store:
    """A directory of indices, bounded. What cannot be read or written there is done without. Any thread and process."""

    def __init__(self, directory: Path) -> None:
        """``directory`` is made with mode 0700 when something is kept; one that others may write to is not used."""
        self._directory = directory

    def load(self, fd: int, build_id: str, debug: DebugPath | None) -> Stored | None:
        """Returns what is kept of an open file, or None."""
        path = self._path(fd, build_id)
        try:
            if not self._is_private():
                return None
            data = path.read_bytes()
            if data[: len(_MAGIC)] != _MAGIC or len(data) < _HEAD:
                return None
            if data[len(_MAGIC) : _HEAD] != _head(data[_HEAD:]):
                return None
            kept = msgspec.msgpack.decode(memoryview(data)[_HEAD:], type=_File)
            if kept.debug != debug or kept.stored.size != os.fstat(fd).st_size:
                return None
            if _digest(fd, kept.reads) != kept.digest:
                return None
        except (OSError, ValueError, msgspec.MsgspecError):
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # the directory's oldest are removed first
        return kept.stored

    def save(
        self, fd: int, build_id: str, debug: DebugPath | None, reads: list[tuple[int, int]], stored: Stored
    ) -> None:
        """Keeps what was made of an open file; ``reads``: what was read of it."""
        merged = _merged(reads)
        if len(merged) > _MAX_READS:
            return
        try:
            digest = _digest(fd, merged)
            payload = msgspec.msgpack.encode(_File(merged, digest, debug, stored))
            if len(payload) > MAX_BYTES // 2:
                return
            self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            if not self._is_private():
                return
            with tempfile.NamedTemporaryFile(dir=self._directory, prefix=".new-", delete=False) as file:
                try:
                    file.write(_MAGIC + _head(payload))
                    file.write(payload)
                    file.flush()
                    os.replace(file.name, self._path(fd, build_id))
                except BaseException:
                    os.unlink(file.name)
                    raise
            self._prune()
        except (OSError, OverflowError):
            return  # a full disk, say: it is made anew the next time

    def _path(self, fd: int, build_id: str) -> Path:
        if build_id:
            return self._directory / f"{build_id}-{os.fstat(fd).st_size:x}.symbols"
        return self._directory / f"{'-'.join(f'{n:x}' for n in stamp(fd))}.symbols"

    def _is_private(self) -> bool:
        st = os.lstat(self._directory)
        return stat.S_ISDIR(st.st_mode) and st.st_uid == os.geteuid() and not st.st_mode & 0o022

    def _prune(self) -> None:
        """Removes what was not used for longest, down to the directory's bounds."""
        found: list[tuple[float, int, str]] = []
        with os.scandir(self._directory) as entries:
            for entry in entries:
                if entry.name.endswith(".symbols") or entry.name.startswith(".new-"):
                    with contextlib.suppress(FileNotFoundError):
                        st = entry.stat(follow_symlinks=False)
                        found.append((st.st_mtime, st.st_size, entry.path))
        found.sort(reverse=True)
        total = 0
        for i, (_, size, path) in enumerate(found):
            total += size
            if i >= MAX_FILES or total > MAX_BYTES:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)


def _head(payload: bytes) -> bytes:
    return FORMAT.to_bytes(4, "little") + zlib.crc32(payload).to_bytes(4, "little")


def _merged(reads: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Returns reads without what is covered by others, by offset."""
    merged: list[tuple[int, int]] = []
    for offset, size in sorted(reads):
        if merged and offset <= sum(merged[-1]):
            first, length = merged[-1]
            merged[-1] = first, max(length, offset + size - first)
        elif size:
            merged.append((offset, size))
    return merged


def _digest(fd: int, reads: list[tuple[int, int]]) -> bytes:
    """Returns the hash of some parts of a file. Raises OSError."""
    digest = hashlib.sha256(msgspec.msgpack.encode(reads))
    for offset, size in reads:
        for at in range(offset, offset + size, _HASH_CHUNK):
            digest.update(os.pread(fd, min(_HASH_CHUNK, offset + size - at), at))
    return digest.digest()
