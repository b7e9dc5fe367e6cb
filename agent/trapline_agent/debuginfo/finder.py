"""Where a file's debug information is: in itself, or in another file, as gdb looks for it ("Debugging Information in
Separate Files" in its manual): by build-id, by .gnu_debuglink, from a debuginfod server; and what dwz moved elsewhere.

A file counts only if it is the right one: by its build-id or, for .gnu_debuglink, the CRC of its content.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import struct
import tempfile
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import httpx

from trapline.errors import PermissionDenied, ResolveError, TraplineError
from trapline_agent.targets.files import open_regular

DEBUG_DIRECTORY: Final = "/usr/lib/debug"
_EHDR: Final = struct.Struct("<16sHHIQQQIHHHHHH")
_SHDR: Final = struct.Struct("<IIQQQQIIQQ")
_SHT_NOBITS: Final = 8
_NOTE: Final = struct.Struct("<III")
_NT_GNU_BUILD_ID: Final = 3
_MAX_SECTIONS: Final = 100_000
_MAX_NAMES: Final = 4 << 20
_MAX_LINK: Final = 8192
_MAX_CRC_BYTES: Final = 4 << 30
_MAX_DOWNLOAD: Final = 4 << 30
_DOWNLOAD_S: Final = 120.0
_AGAIN_S: Final = 600.0
"""What a server did not have is asked for again after that."""

log = logging.getLogger(__name__)


class Sections:
    """The sections of an ELF file of any kind, read with bounds."""

    def __init__(self, fd: int) -> None:
        """Raises ResolveError where it is not a 64-bit little-endian ELF file, or is malformed."""
        self._fd = fd
        self._size = os.fstat(fd).st_size
        head = self._read(0, _EHDR.size)
        if head[:6] != b"\x7fELF\x02\x01":
            raise ResolveError("not a 64-bit ELF file", reason="NotElf")
        _, _, _, _, _, _, shoff, _, _, _, _, shentsize, shnum, shstrndx = _EHDR.unpack(head)
        self.by_name: dict[str, tuple[int, int]] = {}
        """(file offset, bytes) of those that have content; of a name that comes again, the first."""
        if not shoff:
            return
        if shentsize != _SHDR.size:
            raise ResolveError("its section headers are of a wrong size", reason="MalformedElf")
        if not shnum or shstrndx == 0xFFFF:
            first = _SHDR.unpack(self._read(shoff, _SHDR.size))
            shnum, shstrndx = shnum or first[5], first[6] if shstrndx == 0xFFFF else shstrndx
        if shnum > _MAX_SECTIONS or shstrndx >= shnum:
            raise ResolveError("its section headers are malformed", reason="MalformedElf")
        rows = list(_SHDR.iter_unpack(self._read(shoff, shnum * _SHDR.size)))
        names = self._read(rows[shstrndx][4], min(rows[shstrndx][5], _MAX_NAMES))
        for name, kind, _, _, offset, size, *_ in rows:
            text = names[name : name + 64].split(b"\0", 1)[0].decode("latin-1")
            if text and kind != _SHT_NOBITS and size:
                self.by_name.setdefault(text, (offset, size))

    def _read(self, offset: int, size: int) -> bytes:
        if offset + size > self._size:
            raise ResolveError("its section headers are beyond its end", reason="MalformedElf")
        try:
            data = os.pread(self._fd, size, offset)
        except OSError as e:
            raise ResolveError(f"it cannot be read: {e.strerror}") from e
        if len(data) != size:
            raise ResolveError("it changed while it was read", reason="MalformedElf")
        return data

    @property
    def has_debug_info(self) -> bool:
        return ".debug_info" in self.by_name or ".zdebug_info" in self.by_name

    def content(self, name: str) -> bytes:
        """Returns the beginning of a small section; nothing where there is none. Raises ResolveError."""
        offset, size = self.by_name.get(name, (0, 0))
        return self._read(offset, min(size, _MAX_LINK)) if size else b""

    def build_id(self) -> str:
        """Returns the build-id in hex, or nothing."""
        notes = self.content(".note.gnu.build-id")
        if len(notes) < _NOTE.size + 4:
            return ""
        namesz, descsz, kind = _NOTE.unpack_from(notes)
        if (namesz, kind) != (4, _NT_GNU_BUILD_ID) or not 2 <= descsz <= 64:
            return ""
        return notes[16 : 16 + descsz].hex()

    def debug_link(self) -> tuple[str, int] | None:
        """Returns the name and the CRC-32 of .gnu_debuglink."""
        data = self.content(".gnu_debuglink")
        name, end, _ = data.partition(b"\0")
        at = -(-(len(name) + 1) // 4) * 4
        if not end or not name or b"/" in name or len(data) < at + 4:
            return None
        return os.fsdecode(name), int.from_bytes(data[at : at + 4], "little")

    def alternate_link(self) -> tuple[str, str] | None:
        """Returns the path and the build-id of .gnu_debugaltlink, which dwz writes."""
        name, end, build_id = self.content(".gnu_debugaltlink").partition(b"\0")
        if not end or not name or not 2 <= len(build_id) <= 64:
            return None
        return os.fsdecode(name), build_id.hex()


@dataclass
class Found:
    """Descriptors, which are the caller's to close."""

    debug: int | None = None
    """None: it is in the file itself."""
    alternate: int | None = None
    where: str = ""
    """The path of the file that has it."""

    def close(self) -> None:
        for fd in (self.debug, self.alternate):
            if fd is not None:
                os.close(fd)
        self.debug = self.alternate = None


@dataclass
class _Search:
    """One search, and what it looked at, for who must be told that it found nothing."""

    path: str
    roots: Sequence[tuple[str, str]]
    """What stands before paths, and before /usr/lib/debug: the namespaces of those who map it first."""
    tried: list[str] = field(default_factory=list)


class DebugFinder:
    """Finds debug files. Any thread may ask; a server is waited for."""

    def __init__(self, cache: Path | None = None, servers: Sequence[str] = (), root: str = "") -> None:
        """
        Args:
            cache: directory for what servers send; None: nothing is asked of servers.
            servers: URLs of debuginfod servers.
            root: what stands before ``/usr/lib/debug`` on this host.
        """
        self._cache = cache
        self._servers = [s.rstrip("/") for s in servers if re.match(r"https?://", s)]
        self._root = root
        self._missing: dict[str, float] = {}
        self._lock = threading.Lock()

    def find(self, fd: int, path: str, pids: Sequence[int] = ()) -> tuple[Found | None, list[str]]:
        """Looks for the debug information of an open file.

        Args:
            fd: the file.
            path: where it is in the mount namespace of those who map it.
            pids: processes that map it; their namespaces' files come before the host's.

        Returns:
            What was found, and where it was looked for.

        Raises:
            ResolveError: the file is no ELF file, or malformed.
        """
        sections = Sections(fd)
        search = _Search(path, [*((f"/proc/{pid}/root",) * 2 for pid in pids[:4]), ("", self._root)])
        if sections.has_debug_info:
            found = self._with_alternate(Found(where=path), sections, search)
            return found, search.tried
        build_id = sections.build_id()
        for candidate, other in self._candidates(sections, build_id, search):
            found = self._with_alternate(Found(debug=candidate[0], where=candidate[1]), other, search)
            if found is not None:
                return found, search.tried
        return None, search.tried

    def _candidates(
        self, sections: Sections, build_id: str, search: _Search
    ) -> Iterator[tuple[tuple[int, str], Sections]]:
        if build_id:
            yield from self._by_build_id(build_id, search)
        link = sections.debug_link()
        if link is not None:
            yield from self._by_link(*link, search)
        if build_id:
            yield from self._from_servers(build_id, search)

    def _by_build_id(self, build_id: str, search: _Search) -> Iterator[tuple[tuple[int, str], Sections]]:
        for _, root in search.roots:
            path = f"{root}{DEBUG_DIRECTORY}/.build-id/{build_id[:2]}/{build_id[2:]}.debug"
            yield from self._opened(path, build_id, search)

    def _by_link(self, name: str, crc: int, search: _Search) -> Iterator[tuple[tuple[int, str], Sections]]:
        directory = os.path.dirname(search.path)
        for root, debug in search.roots:
            for place in (f"{root}{directory}", f"{root}{directory}/.debug", f"{debug}{DEBUG_DIRECTORY}{directory}"):
                path = f"{place}/{name}"
                for opened in self._opened(path, None, search):
                    if _crc(opened[0][0]) == crc:
                        yield opened
                    else:
                        search.tried[-1] += " (of another build)"
                        os.close(opened[0][0])

    def _from_servers(self, build_id: str, search: _Search) -> Iterator[tuple[tuple[int, str], Sections]]:
        for server in self._servers:
            path = self._download(server, build_id, search)
            if path is not None:
                yield from self._opened(str(path), build_id, search)

    def _opened(self, path: str, build_id: str | None, search: _Search) -> Iterator[tuple[tuple[int, str], Sections]]:
        """Yields an open file if it is the right one."""
        search.tried.append(path)
        try:
            fd = open_regular(path)
        except (ResolveError, PermissionDenied) as e:
            if isinstance(e, PermissionDenied):
                search.tried[-1] += " (may not be read)"
            return
        try:
            sections = Sections(fd)
            right = sections.has_debug_info and build_id in (None, sections.build_id())
        except ResolveError:
            right = False
        if right:
            yield (fd, path), sections
        else:
            search.tried[-1] += " (not the right file)"
            os.close(fd)

    def _with_alternate(self, found: Found, sections: Sections, search: _Search) -> Found | None:
        """Adds what dwz moved to a file that several share; None, and all closed, where that is not to be had."""
        try:
            link = sections.alternate_link()
        except ResolveError:
            link = None
        if link is None:
            return found
        name, build_id = link
        beside = os.path.join(os.path.dirname(found.where), name)
        for root, debug in search.roots:
            for path in (
                f"{root}{name}" if name.startswith("/") else beside,
                f"{debug}{DEBUG_DIRECTORY}/.dwz/{os.path.basename(name)}",
                f"{debug}{DEBUG_DIRECTORY}/.build-id/{build_id[:2]}/{build_id[2:]}.debug",
            ):
                for (fd, _), _ in self._opened(path, build_id, search):
                    found.alternate = fd
                    return found
        for (fd, _), _ in self._from_servers(build_id, search):
            found.alternate = fd
            return found
        found.close()
        return None

    def _download(self, server: str, build_id: str, search: _Search) -> Path | None:
        """Returns where the file of a build-id is that a server sent, now or before."""
        if self._cache is None or not re.fullmatch(r"[0-9a-f]{4,128}", build_id):
            return None
        url = f"{server}/buildid/{build_id}/debuginfo"
        path = self._cache / f"{build_id}.debug"
        if path.exists():
            return path
        search.tried.append(url)
        with self._lock:
            if self._missing.get(url, -_AGAIN_S) > time.monotonic() - _AGAIN_S:
                return None
        try:
            self._cache.mkdir(parents=True, exist_ok=True, mode=0o700)
            _fetch(url, path)
        except (httpx.HTTPError, OSError, TraplineError) as e:
            search.tried[-1] += f" ({e})"
            log.info("no debug information from %s: %s", url, e)
            with self._lock:
                self._missing[url] = time.monotonic()
            return None
        return path


def _fetch(url: str, path: Path) -> None:
    """Has a file sent. Raises httpx.HTTPError, OSError, ResolveError."""
    deadline = time.monotonic() + _DOWNLOAD_S
    fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=".download-")
    try:
        size = 0
        with os.fdopen(fd, "wb") as file, httpx.stream("GET", url, timeout=20.0, follow_redirects=True) as response:
            response.raise_for_status()
            for data in response.iter_bytes():
                size += len(data)
                if size > _MAX_DOWNLOAD or time.monotonic() > deadline:
                    raise ResolveError(f"{size} bytes in {_DOWNLOAD_S:g} s are not all of it")
                file.write(data)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def _crc(fd: int) -> int | None:
    """Returns the CRC-32 of a file's content; None where it is too long or cannot be read."""
    if os.fstat(fd).st_size > _MAX_CRC_BYTES:
        return None
    crc, at = 0, 0
    try:
        while data := os.pread(fd, 1 << 20, at):
            crc = zlib.crc32(data, crc)
            at += len(data)
    except OSError:
        return None
    return crc
