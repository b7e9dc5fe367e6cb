"""The executable file mappings of a process, from /proc/PID/maps: proc(5), fs/proc/task_mmu.c.

Fast enough to ask about every process of a host: the text is looked through as bytes, and only lines that matter are
taken apart.
"""

from __future__ import annotations

import functools
import io
import os
import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

from trapline_agent.plans import FileKey

_DELETED = b" (deleted)"
_MAX_TASKS = 16
# Executable, of a file (inode not 0). In a path the kernel escapes a new line, as \012, and nothing else.
_EXECUTABLE = re.compile(
    rb"^([0-9a-f]+)-([0-9a-f]+) (..x.) ([0-9a-f]+) ([0-9a-f]+:[0-9a-f]+) ([1-9][0-9]*)[ ]*(.*)$", re.MULTILINE
)
# Writable and private, of a file: its data, as the process has it.
_DATA = re.compile(
    rb"^([0-9a-f]+)-([0-9a-f]+) (.w.p) ([0-9a-f]+) ([0-9a-f]+:[0-9a-f]+) ([1-9][0-9]*)[ ]*(.*)$", re.MULTILINE
)


class Mapping(NamedTuple):
    """One mapping of a file: executable, or of its data."""

    start: int
    end: int
    prot: str
    """As printed: ``r-xp``; the last letter is ``p`` or ``s``."""
    offset: int
    """File offset of ``start``."""
    dev: str
    inode: int
    path: str
    """Decoded as os.fsdecode does, without `` (deleted)``; in the process' own mount namespace."""
    deleted: bool
    """True: the path led to another file, or to none, when this was read (or the name really ends in that word)."""

    @property
    def file(self) -> FileKey:
        return FileKey(self.dev, self.inode)

    def is_of(self, file: FileKey) -> bool:
        """Whether it maps this file."""
        return self.inode == file.inode and self.dev == file.dev

    @property
    def writable(self) -> bool:
        return self.prot[1] == "w"

    @property
    def shared(self) -> bool:
        return self.prot[3] == "s"

    def addr(self, offset: int) -> int | None:
        """Returns the address of a file offset, or None where this mapping does not have it (semantics R10)."""
        addr = self.start + offset - self.offset
        return addr if self.start <= addr < self.end else None


def _read(path: str) -> bytes:
    # A maps file gives a few pages per read: readall goes on to the end.
    with io.FileIO(path) as file:
        return file.readall() or b""


def read_maps(pid: int) -> bytes:
    """Returns the text of /proc/PID/maps.

    The leader of a process may have ended before its other threads, and then has no memory of its own: a live thread is
    read instead (semantics P7).

    Raises:
        ProcessLookupError: no such process (any more).
        PermissionError: it may not be looked at.
    """
    try:
        if text := _read(f"/proc/{pid}/maps"):
            return text
        for task in os.listdir(f"/proc/{pid}/task")[:_MAX_TASKS]:
            try:
                if text := _read(f"/proc/{pid}/task/{task}/maps"):
                    return text
            except (FileNotFoundError, ProcessLookupError):
                continue
    except (FileNotFoundError, NotADirectoryError) as e:
        raise ProcessLookupError(f"no process {pid}") from e
    return b""


def parse_maps(text: bytes) -> list[Mapping]:
    """Returns the executable file mappings in a maps text, by address."""
    return [_mapping(m) for m in _EXECUTABLE.finditer(text)]


def parse_data(text: bytes) -> list[Mapping]:
    """Returns the writable private file mappings in a maps text, by address."""
    return [_mapping(m) for m in _DATA.finditer(text)]


def data_lookup(text: bytes) -> Callable[[FileKey, int, int], bool]:
    """Returns a function that says whether an offset of a file is mapped at an address, writable and private: (file,
    offset, address). The text is taken apart when that is asked first."""

    @functools.cache
    def data() -> list[Mapping]:
        return parse_data(text)

    return lambda file, offset, addr: is_mapped(data(), file, offset, addr)


def _mapping(m: re.Match[bytes]) -> Mapping:
    start, end, prot, offset, dev, inode, path = m.groups()
    deleted = path.endswith(_DELETED)
    if deleted:
        path = path[: -len(_DELETED)]
    if b"\\012" in path:
        path = path.replace(b"\\012", b"\n")
    return Mapping(
        int(start, 16),
        int(end, 16),
        prot.decode(),
        int(offset, 16),
        dev.decode(),
        int(inode),
        os.fsdecode(path),
        deleted,
    )


def executable_mappings(pid: int) -> list[Mapping]:
    """Returns the executable file mappings of a process, by address. Raises as ``read_maps``."""
    return parse_maps(read_maps(pid))


def is_mapped(mappings: Iterable[Mapping], file: FileKey, offset: int, addr: int) -> bool:
    """Whether an offset of a file is mapped at an address."""
    return any(m.is_of(file) and m.addr(offset) == addr for m in mappings)


def content_at(pid: int, addr: int, length: int) -> bytes | None:
    """Returns what a mapping brought along at an address: its file's bytes, zeros where it is anonymous; None where nothing
    is mapped. Raises as ``read_maps``, and OSError where the file cannot be read."""
    for line in read_maps(pid).splitlines():
        span, _, offset, _, inode = line.split(None, 5)[:5]
        start, end = (int(part, 16) for part in span.split(b"-"))
        if start <= addr < end:
            if inode == b"0":
                return bytes(length)
            with open(f"/proc/{pid}/map_files/{start:x}-{end:x}", "rb") as file:
                file.seek(int(offset, 16) + addr - start)
                return file.read(length).ljust(length, b"\0")
    return None


def span_at(pid: int, addr: int) -> tuple[int, int]:
    """Returns start and end of the mapping, of whatever kind, that has an address; (0, 0) where there is none. Raises as
    ``read_maps``."""
    for line in read_maps(pid).splitlines():
        start, end = (int(part, 16) for part in line[: line.index(b" ")].split(b"-"))
        if start <= addr < end:
            return start, end
    return 0, 0


def needle(file: FileKey) -> bytes:
    """Returns bytes that are in a maps text if the file is mapped (and, rarely, in a path of another)."""
    return f" {file.dev} {file.inode} ".encode()


def mappings_of(pid: int, files: Iterable[FileKey]) -> list[Mapping]:
    """Returns the executable mappings of some files in a process, by address; quick where there are none.

    Raises as ``read_maps``.
    """
    wanted = frozenset(files)
    text = read_maps(pid)
    if not any(needle(f) in text for f in wanted):
        return []
    return [m for m in parse_maps(text) if m.file in wanted]
