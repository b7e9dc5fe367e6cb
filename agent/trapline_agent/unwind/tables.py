"""Makes unwind tables for the tracer, and keeps them: in a directory, by build-id and content. The agent's half."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import tempfile
import threading
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple, Protocol

from trapline.errors import NotFound, ProtocolError, TraplineError
from trapline_agent.plans import FileKey
from trapline_agent.symbols.elf import ElfFile
from trapline_agent.targets.files import open_mapped
from trapline_agent.targets.maps import Mapping, read_maps
from trapline_agent.unwind import eh_frame, table

log = logging.getLogger(__name__)

VDSO = "[vdso]"
_KEPT = 256
"""Files whose tables are kept in memory."""
_KEPT_BYTES = 64 << 20
_MAX_CACHE_BYTES = 512 << 20
"""On disk; beyond, the oldest are deleted."""
_VDSO = re.compile(rb"^([0-9a-f]+)-([0-9a-f]+) .*\[vdso\]$", re.MULTILINE)
_MAX_VDSO = 1 << 20


class Wanted(Protocol):
    """A file, and a mapping of it by which it can be opened."""

    @property
    def file(self) -> FileKey: ...
    @property
    def path(self) -> str: ...
    @property
    def pid(self) -> int: ...
    @property
    def start(self) -> int: ...
    @property
    def end(self) -> int: ...


class Made(NamedTuple):
    """A file's table."""

    stamp: tuple[int, int]
    """Modification time in ns and size of the file: another one is another file, whatever its inode."""
    build_id: str
    """In hex; empty where it has none."""
    data: bytes
    """Encoded; empty where the file says nothing."""


class Tables:
    """Makes tables. Any thread may call."""

    def __init__(self, directory: Path | None = None) -> None:
        """``directory``: where they are kept for the next time; None: nowhere."""
        self._directory = directory
        self._lock = threading.Lock()
        self._made: OrderedDict[tuple[FileKey, tuple[int, int]], Made] = OrderedDict()

    def make(self, wanted: Wanted) -> Made | None:
        """Returns a file's table; None where it cannot be opened (now)."""
        try:
            fd = _open(wanted)
        except TraplineError as e:
            log.info("no unwind table of %s: %s", wanted.path, e)
            return None
        try:
            st = os.fstat(fd)
            stamp = (0, 0) if wanted.path == VDSO else (st.st_mtime_ns, st.st_size)
            with self._lock:
                if (known := self._made.get((wanted.file, stamp))) is not None:
                    self._made.move_to_end((wanted.file, stamp))
                    return known
            made = Made(stamp, *self._of(fd, wanted.path))
        except TraplineError as e:
            log.info("no unwind table of %s: %s", wanted.path, e)
            made = Made(stamp, "", b"")
        finally:
            os.close(fd)
        with self._lock:
            self._made[wanted.file, stamp] = made
            while len(self._made) > _KEPT or sum(len(m.data) for m in self._made.values()) > _KEPT_BYTES:
                self._made.popitem(last=False)
        return made

    def _of(self, fd: int, path: str) -> tuple[str, bytes]:
        elf = ElfFile(fd, path)
        build_id = elf.build_id()
        cached = self._cached(elf, build_id)
        if cached is not None:
            with contextlib.suppress(OSError, ProtocolError):
                data = cached.read_bytes()
                table.decode(data)
                os.utime(cached)
                return build_id, data
        data = eh_frame.read_table(elf).encode()
        if cached is not None:
            with contextlib.suppress(OSError):
                _write(cached, data)
        return build_id, data

    def _cached(self, elf: ElfFile, build_id: str) -> Path | None:
        """Returns where a table is kept. The name has the content's hash too: a build-id can be forged."""
        if self._directory is None or not build_id:
            return None
        found = elf.eh_frame(eh_frame.MAX_BYTES)
        if found is None:
            return None
        content = hashlib.blake2b(found[1], digest_size=16)
        content.update(repr((found[0], elf.segments)).encode())
        return self._directory / f"{build_id}-{content.hexdigest()}.{table.MAGIC.decode().lower()}"


def _open(wanted: Wanted) -> int:
    if wanted.path == VDSO:
        return open_vdso()
    mapping = Mapping(
        wanted.start, wanted.end, "r-xp", 0, wanted.file.dev, wanted.file.inode, os.fsdecode(wanted.path), False
    )
    return open_mapped(wanted.pid, mapping)


def open_vdso() -> int:
    """Opens a copy of the kernel's own library: the same in all 64-bit processes (vdso(7)), so this one's."""
    found = _VDSO.search(read_maps(os.getpid()))
    if found is None:
        raise NotFound("this process has no vDSO")
    start, end = (int(part, 16) for part in found.groups())
    try:
        with open("/proc/self/mem", "rb", 0) as memory:
            memory.seek(start)
            image = memory.read(min(end - start, _MAX_VDSO))
    except OSError as e:
        raise NotFound(f"the vDSO cannot be read: {e}") from e
    fd = os.memfd_create("vdso", os.MFD_CLOEXEC)
    os.write(fd, image)
    return fd


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(data)
    os.replace(file.name, path)
    _forget_oldest(path.parent)


def _forget_oldest(directory: Path) -> None:
    entries = sorted((e.stat().st_mtime, e.stat().st_size, e.path) for e in os.scandir(directory) if e.is_file())
    total = sum(size for _, size, _ in entries)
    for _, size, path in entries:
        if total <= _MAX_CACHE_BYTES:
            break
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        total -= size
