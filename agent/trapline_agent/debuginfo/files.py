"""The debug information of files, for the agent: found, read by a process of its own, kept in memory and on disk."""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from trapline.errors import NoDebugInfo
from trapline_agent.debuginfo import messages as m
from trapline_agent.debuginfo.finder import DebugFinder, Found
from trapline_agent.debuginfo.model import LinePlace, Scope, Type, TypeRef, Variable
from trapline_agent.debuginfo.remote import DEADLINE_S, NotRunning, RemoteReader
from trapline_agent.symbols.elf import ElfFile
from trapline_agent.targets.process import text

if TYPE_CHECKING:
    from trapline_agent.objects import FoundFile

_MAX_FILES: Final = 64
"""Whose answers and descriptors are kept."""
_MAX_PROCESSES: Final = 4
_MAX_ANSWERS: Final = 20_000
"""Of one file."""
_MAX_INDEXES: Final = 200
"""Kept on disk."""

_Stamp = tuple[int, int, int, int]
log = logging.getLogger(__name__)


class DebugFiles:
    """The debug information of the host's files. Any thread may ask; it may take seconds."""

    def __init__(
        self, directory: Path | None = None, servers: Sequence[str] = (), root: str = "", deadline_s: float = DEADLINE_S
    ) -> None:
        """
        Args:
            directory: the agent's state directory, for indexes and what servers send; None: neither.
            servers: URLs of debuginfod servers (debuginfod(8)).
            root: what stands before ``/usr/lib/debug`` on this host, for tests.
            deadline_s: seconds that one question may take.
        """
        self.deadline_s = deadline_s
        self._indexes = directory / "debuginfo" if directory is not None else None
        self._finder = DebugFinder(directory / "debuginfod" if directory is not None else None, servers, root)
        self._files: OrderedDict[_Stamp, FileDebugInfo] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, file: FoundFile) -> FileDebugInfo | None:
        """Returns the debug information of a file; None where there is none to be found.

        Raises:
            ResolveError, Unsupported, PermissionDenied: the file cannot be read, or is no program.
        """
        return self._find(file)[0]

    def need(self, file: FoundFile) -> FileDebugInfo:
        """Like ``of``; raises NoDebugInfo, with where it was looked for, where there is none."""
        found, tried = self._find(file)
        if found is not None:
            return found
        looked = f"; looked for {', '.join(text(t) for t in tried)}" if tried else ""
        raise NoDebugInfo(
            f"{text(file.path)} has no debug information{looked}",
            hint="install its package with debug symbols, or name a debuginfod server in DEBUGINFOD_URLS",
        )

    def _find(self, file: FoundFile) -> tuple[FileDebugInfo | None, list[str]]:
        with file.open() as fd:
            stamp = _stamp(fd)
            with self._lock:
                if (known := self._files.get(stamp)) is not None:
                    self._files.move_to_end(stamp)
                    return known, []
            elf = ElfFile(fd, text(file.path))
            found, tried = self._finder.find(fd, file.path, list(file.mappings))
            if found is None:
                return None, tried
            made = FileDebugInfo(self, elf, os.dup(fd), found, self._indexes)
        with self._lock:
            if (known := self._files.get(stamp)) is not None:  # of another thread, meanwhile
                made.close()
                return known, tried
            self._files[stamp] = made
            dropped = [self._files.popitem(last=False)[1] for _ in range(len(self._files) - _MAX_FILES)]
        for old in dropped:
            old.close()
        return made, tried

    def started(self, file: FileDebugInfo) -> None:
        """A file's process runs: ends those of the files that were asked longest ago where there are too many."""
        with self._lock:
            running = [f for f in self._files.values() if f.running and f is not file]
        for old in running[: max(len(running) + 1 - _MAX_PROCESSES, 0)]:
            old.stop()

    def close(self) -> None:
        """Ends all processes."""
        with self._lock:
            files = list(self._files.values())
            self._files.clear()
        for file in files:
            file.close()


class FileDebugInfo:
    """``DebugInfo`` of one file. Any thread may ask."""

    def __init__(self, owner: DebugFiles, elf: ElfFile, program: int, found: Found, indexes: Path | None) -> None:
        self.where = text(found.where)
        """The file that has it."""
        self._owner = owner
        self._segments = [(s.offset, s.vaddr, s.filesz) for s in elf.segments]
        self._reader = RemoteReader(self.where, program, found.debug, found.alternate)
        self._index = _index_path(indexes, elf.build_id(), program if found.debug is None else found.debug)
        self._answers: OrderedDict[m.Request, Any] = OrderedDict()
        self._unusable: NoDebugInfo | None = None
        """What the reader said when it opened the file: it says so again."""
        self._lock = threading.Lock()

    # --- DebugInfo

    def scope(self, offset: int) -> Scope | None:
        """What can be named at a place; None where nothing is known of it."""
        made: Scope | None = self._ask(m.ScopeOf(offset), Scope | None)
        return made

    def type(self, ref: TypeRef) -> Type:
        """A type. Raises NoDebugInfo where the reference is none of this file's."""
        made: Type = self._ask(m.TypeOf(ref), Type)
        return made

    def variable(self, name: str) -> Variable | None:
        """A global or static variable, by its name in the source."""
        made: Variable | None = self._ask(m.VariableOf(name), Variable | None)
        return made

    def line(self, file: str, line: int) -> list[LinePlace]:
        """The places of a source line. Raises NotFound."""
        return list(self._ask(m.LineOf(file, line), list[LinePlace]))

    def inlined(self, function: str) -> list[LinePlace]:
        """Where a function's inlined copies begin."""
        return list(self._ask(m.InlinedOf(function), list[LinePlace]))

    def source(self, offset: int) -> tuple[str, int] | None:
        """File and line of a place."""
        made: tuple[str, int] | None = self._ask(m.SourceOf(offset), tuple[str, int] | None)
        return made

    # --- the process

    @property
    def running(self) -> bool:
        return self._reader.running

    @property
    def pid(self) -> int:
        """The reader process'; 0 where there is none."""
        return self._reader.pid

    def stop(self) -> None:
        """Ends the process until it is needed again, but not while it is asked."""
        self._reader.stop()

    def close(self) -> None:
        self._reader.close()

    def _ask(self, request: m.Request, kind: Any) -> Any:
        with self._lock:
            if request in self._answers:
                self._answers.move_to_end(request)
                return self._answers[request]
            try:
                answer = self._reader.ask(request, kind, self._owner.deadline_s)
            except NotRunning:
                self._start()
                answer = self._reader.ask(request, kind, self._owner.deadline_s)
            self._answers[request] = answer
            if len(self._answers) > _MAX_ANSWERS:
                self._answers.popitem(last=False)
            return answer

    def _start(self) -> None:
        kept = _read(self._index)
        if self._unusable is not None:
            raise self._unusable
        try:
            made = self._reader.start(m.Open(self._segments, kept), self._owner.deadline_s)
        except NoDebugInfo as e:
            self._unusable = e
            raise
        if made is not None and self._index is not None:
            _write(self._index, made)
        self._owner.started(self)


def _stamp(fd: int) -> _Stamp:
    st = os.fstat(fd)
    return st.st_dev, st.st_ino, st.st_mtime_ns, st.st_size


def _index_path(directory: Path | None, build_id: str, debug: int) -> Path | None:
    """Returns the name of a file's index. The identity of the file that it was made of is a part of it: anybody can write
    another's build-id into a file of his own, and what is said of that one must not be believed of the other."""
    if directory is None:
        return None
    identity = "-".join(f"{n:x}" for n in _stamp(debug))
    return directory / f"{build_id[:40] or 'none'}-{identity}.index"


def _read(path: Path | None) -> bytes | None:
    try:
        return path.read_bytes() if path is not None else None
    except OSError:
        return None


def _write(path: Path, data: bytes) -> None:
    """Keeps an index; that it cannot be kept is no error."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=".index-")
        try:
            with os.fdopen(fd, "wb") as file:
                file.write(data)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        kept = sorted(path.parent.glob("*.index"), key=lambda p: p.stat().st_mtime)
        for old in kept[: max(len(kept) - _MAX_INDEXES, 0)]:
            old.unlink(missing_ok=True)
    except OSError as e:
        log.info("the index %s cannot be kept: %s", path, e)
