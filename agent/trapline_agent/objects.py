"""Which files the object of a probe means on this host: by path, by name, by build-id.

A name is a basename, a soname, or what leads to a file in PATH or a library directory (``python3`` is ``python3.11``).
Mapped files come first; what nobody maps is looked for on disk, so that a probe can be there before its program.
Files are told apart by their identity, not their path: a container, a deleted binary and its replacement are three files.
"""

from __future__ import annotations

import contextlib
import glob
import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from trapline.errors import Ambiguous, NotFound, TraplineError
from trapline_agent.plans import FileKey
from trapline_agent.symbols.index import IndexCache, SymbolIndex, near_names
from trapline_agent.symbols.ranges import FunctionRanges
from trapline_agent.targets.files import file_key_of, open_mapped, open_regular
from trapline_agent.targets.maps import Mapping, executable_mappings
from trapline_agent.targets.process import pids, text

_PROGRAM_DIRECTORIES = ("/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin")
_LIBRARY_DIRECTORIES = ("/lib64", "/usr/lib64", "/lib", "/usr/lib", "/usr/local/lib")
_LD_SO_CONF = "/etc/ld.so.conf"
_MAX_CONF_FILES = 100


@dataclass
class FoundFile:
    """One file, and who maps it."""

    key: FileKey
    path: str
    """Where it is, or was, in the mount namespace of one who maps it, or in this process' own."""
    mappings: dict[int, list[Mapping]] = field(default_factory=dict)
    """By process id."""

    @property
    def name(self) -> str:
        return text(os.path.basename(self.path))

    @contextlib.contextmanager
    def open(self) -> Iterator[int]:
        """Opens the file, deleted or in a container too; yields a descriptor. Raises TraplineError."""
        fd = self._open()
        try:
            yield fd
        finally:
            os.close(fd)

    def _open(self) -> int:
        error: TraplineError | None = None
        for pid, mappings in self.mappings.items():
            try:
                return open_mapped(pid, mappings[0])
            except TraplineError as e:
                error = error or e
        try:
            fd = open_regular(self.path)
            if file_key_of(fd, text(self.path)) == self.key:
                return fd
            os.close(fd)
        except TraplineError as e:
            error = error or e
        raise error or NotFound(f"{text(self.path)} was replaced meanwhile")


def scan(only: Collection[int] | None = None) -> dict[FileKey, FoundFile]:
    """Returns the files that processes map executable, by identity.

    Args:
        only: process ids to look at; by default all.
    """
    found: dict[FileKey, FoundFile] = {}
    for pid in pids() if only is None else only:
        try:
            mappings = executable_mappings(pid)
        except (ProcessLookupError, PermissionError):
            continue  # gone, or not to be looked at: `targets` says so where the process was asked for
        for mapping in mappings:
            file = found.get(mapping.file)
            if file is None:
                file = found[mapping.file] = FoundFile(mapping.file, mapping.path)
            file.mappings.setdefault(pid, []).append(mapping)
    return found


def on_disk(path: str) -> FoundFile:
    """Returns the file that a path leads to here. Raises NotFound, PermissionDenied or ResolveError."""
    fd = open_regular(path)
    try:
        return FoundFile(file_key_of(fd, text(path)), os.path.realpath(path))
    finally:
        os.close(fd)


class Finder:
    """Finds files by what a probe calls them. Safe for use by any thread."""

    def __init__(self, host_name: str, cache: IndexCache) -> None:
        self._host_name = host_name
        self._cache = cache

    def find(self, name: str, mapped: dict[FileKey, FoundFile]) -> list[FoundFile]:
        """Returns the files that ``name`` means, those that most processes map first.

        Args:
            name: a path, basename, soname, ``buildid=HEX`` or ``*``.
            mapped: what is mapped, as ``scan`` returned it.

        Raises:
            NotFound: none; with what may have been meant.
            Ambiguous: the beginning of a build-id that several builds share.
            ResolveError, PermissionDenied: the path leads to what is not a readable file.
        """
        if name == "*":
            found = list(mapped.values())
        elif name.startswith("/"):
            found = self._by_path(name, mapped)
        elif name.startswith("buildid="):
            found = self._by_build_id(name.removeprefix("buildid="), mapped)
        else:
            found = self._by_name(name, mapped)
        return sorted(found, key=lambda f: -len(f.mappings))

    def identity(self, file: FoundFile) -> tuple[str, str]:
        """Returns a file's soname and build-id; empty where it cannot be read or is no ELF file."""
        try:
            with file.open() as fd:
                return self._cache.identity(fd, text(file.path))
        except TraplineError:
            return "", ""

    def index(self, file: FoundFile, fd: int) -> SymbolIndex:
        """Returns the symbols of a file that is open. Raises ResolveError or Unsupported."""
        return self._cache.get(fd, text(file.path))

    def ranges(self, file: FoundFile, fd: int) -> FunctionRanges:
        """Returns where the functions of a file that is open are, by its unwind table. Raises as ``index``."""
        return self._cache.ranges(fd, text(file.path))

    def _by_path(self, path: str, mapped: dict[FileKey, FoundFile]) -> list[FoundFile]:
        path = os.path.normpath(path)
        real = os.path.realpath(path)
        found = {
            f.key: f for f in mapped.values() if any(m.path in (path, real) for ms in f.mappings.values() for m in ms)
        }
        try:
            here = on_disk(path)
        except TraplineError:
            if not found:
                self._suggest_path(path)
                raise
        else:
            found.setdefault(here.key, mapped.get(here.key, here))
        return list(found.values())

    def _suggest_path(self, path: str) -> None:
        """Raises a better NotFound where the directory has something like it."""
        directory, name = os.path.split(path)
        try:
            entries = [text(entry) for entry in os.listdir(directory)]
        except OSError:
            return
        if os.path.lexists(path):
            return
        near = [os.path.join(directory, n) for n in near_names(name, entries)]
        raise NotFound(
            f"no file {text(path)} on {self._host_name}, and no process maps one of that name", suggestions=near
        )

    def _by_build_id(self, prefix: str, mapped: dict[FileKey, FoundFile]) -> list[FoundFile]:
        ids = {f.key: self.identity(f)[1] for f in mapped.values()}
        found = [f for f in mapped.values() if ids[f.key].startswith(prefix)]
        builds = sorted({ids[f.key] for f in found})
        if not builds:
            raise NotFound(f"no process on {self._host_name} maps a file with a build-id that begins with {prefix}")
        if len(builds) > 1:
            raise Ambiguous(
                f"{len(builds)} builds on {self._host_name} have a build-id that begins with {prefix}",
                suggestions=[f"buildid={b}" for b in builds[:5]],
                hint="write more of it",
            )
        return found

    def _by_name(self, name: str, mapped: dict[FileKey, FoundFile]) -> list[FoundFile]:
        found = {
            f.key: f for f in mapped.values() if any(_basename(m) == name for ms in f.mappings.values() for m in ms)
        }
        stored: list[FoundFile] = []
        for directory in (*program_directories(), *library_directories()):
            path = os.path.join(directory, name)
            if os.path.exists(path):
                with contextlib.suppress(TraplineError):
                    stored.append(on_disk(path))
        for file in stored:
            if file.key in mapped:
                found[file.key] = mapped[file.key]
        if ".so" in name:
            candidates = (f for f in mapped.values() if f.key not in found and ".so" in f.name)
            found |= {f.key: f for f in candidates if self.identity(f)[0] == name}
        if found:
            return list(found.values())
        if stored:
            # A script of the name may come first in PATH: it is only meant where there is nothing else.
            return [next((f for f in stored if _is_elf(f.path)), stored[0])]
        names = sorted({_basename(m) for f in mapped.values() for ms in f.mappings.values() for m in ms})
        raise NotFound(
            f"no process on {self._host_name} maps a file called {name}, "
            "nor is there one in PATH or the library directories",
            reason="NotMapped",
            suggestions=near_names(name, [text(n) for n in names]),
            hint="write the whole path of a file that nobody runs yet",
        )


def _basename(mapping: Mapping) -> str:
    return os.path.basename(mapping.path)


def _is_elf(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(4) == b"\x7fELF"
    except OSError:
        return False


def program_directories() -> list[str]:
    """Returns where programs are: this process' PATH and the usual places."""
    named = (d for d in os.environ.get("PATH", "").split(":") if d.startswith("/"))
    return list(dict.fromkeys((*named, *_PROGRAM_DIRECTORIES)))


def library_directories() -> list[str]:
    """Returns where the loader looks: ld.so.conf(5), and its built-in places."""
    directories: list[str] = []
    pending, seen = [_LD_SO_CONF], 0
    while pending and seen < _MAX_CONF_FILES:
        seen += 1
        try:
            with open(pending.pop(), errors="surrogateescape") as file:
                lines = file.read(1 << 16).splitlines()
        except OSError:
            continue
        for line in lines:
            line = line.partition("#")[0].strip()
            if line.startswith("include "):
                pending += glob.glob(os.path.join(os.path.dirname(_LD_SO_CONF), line.removeprefix("include ").strip()))
            elif line.startswith("/"):
                directories.append(line)
    return list(dict.fromkeys((*directories, *_LIBRARY_DIRECTORIES)))
