"""Names for frames, when somebody reads a stack: by build-id, or by the file's identity, and offset. The agent's half.

Nothing is looked up at a trap. A file is found by its path here or in the mount namespace of a process that maps it; one
that has been replaced since is not taken for it. The function is the symbol's, demangled; what is inlined at the place, and
its line, is the debug information's, in the file or beside it.
"""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from trapline.errors import TraplineError
from trapline.protocol.stacks import Frame, StackFile, place
from trapline_agent.debuginfo.model import DebugInfo, Scope
from trapline_agent.objects import FoundFile
from trapline_agent.symbols.demangle import demangle
from trapline_agent.symbols.elf import ElfFile
from trapline_agent.symbols.index import IndexCache, SymbolIndex
from trapline_agent.targets.files import file_key_of, open_mapped, open_regular
from trapline_agent.targets.maps import Mapping, executable_mappings
from trapline_agent.targets.process import pids
from trapline_agent.unwind.tables import VDSO, open_vdso

_KEPT = 1 << 16
"""Frames whose names are kept."""
_DEBUG_S = 3.0
"""For the debug information of many frames at once; who asks over the network does not wait for ever."""
INLINED = " (inlined)"


class Named(NamedTuple):
    """What is known of a frame."""

    names: tuple[str, ...]
    """The functions that are inlined there, innermost first, each with ``INLINED``; then the function itself, or without
    a symbol ``libc.so.6+0x9b0e3``."""
    source: str = ""
    """File and line, ``orders.c:42``; empty where there is no debug information."""


class _File(NamedTuple):
    symbols: SymbolIndex
    found: FoundFile | None
    """None: it can have no debug information."""


class Names:
    """Names frames. Any thread may call."""

    def __init__(
        self, cache: IndexCache | None = None, debug: Callable[[FoundFile], DebugInfo | None] = lambda file: None
    ) -> None:
        """
        Args:
            cache: the symbols of files.
            debug: returns a file's debug information, None where it has none; raises TraplineError where that is wrong.
        """
        self._cache = IndexCache() if cache is None else cache
        self._debug = debug
        self._lock = threading.Lock()
        self._files: dict[StackFile, _File | None] = {}
        self._silent: set[StackFile] = set()
        """Files whose debug information could not be read: it is not asked again for each frame."""
        self._named: OrderedDict[Frame, Named] = OrderedDict()

    def __call__(self, frame: Frame) -> tuple[str, ...]:
        """Returns a frame's function, after those that are inlined there. It may take seconds, once for each file."""
        return self.named(frame).names

    def named(self, frame: Frame) -> Named:
        """Returns what is known of a frame."""
        known = self._named.get(frame)
        if known is None:
            known = self._look(frame, self._scope(frame))
            self._keep(frame, known)
        return known

    def described(self, frame: Frame) -> tuple[str, ...]:
        """Returns the names, the first with its place in the source: ``handle at orders.c:42``."""
        (first, *others), source = self.named(frame)
        return (f"{first} at {source}" if source else first, *others)

    def many(self, frames: Iterable[Frame], seconds: float = _DEBUG_S) -> list[Named]:
        """Returns what is known of each of several frames. What debug information says is left out where it takes longer
        than ``seconds``; it is there the next time."""
        frames = list(frames)
        until = time.monotonic() + seconds
        found: dict[Frame, Named] = {}
        # A file's after one another: there are few processes that read debug information.
        for frame in sorted(set(frames), key=lambda f: f.file.path):
            if frame in self._named or time.monotonic() < until:
                found[frame] = self.named(frame)
            else:
                found[frame] = self._look(frame, None)
        return [found[frame] for frame in frames]

    def _keep(self, frame: Frame, known: Named) -> None:
        with self._lock:
            self._named[frame] = known
            if len(self._named) > _KEPT:
                self._named.popitem(last=False)

    def _look(self, frame: Frame, scope: Scope | None) -> Named:
        symbol = self._symbol(frame)
        if scope is None:
            return Named((symbol or place(frame),))
        functions = [scope.function.name, *scope.inlined_into]
        names = [*(f"{name}{INLINED}" for name in functions[:-1]), symbol or functions[-1] or place(frame)]
        source = f"{os.path.basename(scope.file)}:{scope.line}" if scope.file and scope.line else ""
        return Named(tuple(names), source)

    def _scope(self, frame: Frame) -> Scope | None:
        file = self._file(frame.file)
        if file is None or file.found is None or frame.file in self._silent:
            return None
        try:
            info = self._debug(file.found)
            return None if info is None else info.scope(frame.offset)
        except TraplineError:
            with self._lock:
                self._silent.add(frame.file)
            return None

    def _symbol(self, frame: Frame) -> str:
        file = self._file(frame.file)
        symbol = file.symbols.at(frame.offset) if file is not None else None
        if file is None or symbol is None or (symbol.size and frame.offset >= file.symbols.end_of(symbol)):
            return ""
        return demangle([symbol.name], parameters=False)[0]

    def _file(self, file: StackFile) -> _File | None:
        if file not in self._files:
            found = self._find(file) if file.path.startswith("/") or file.path == VDSO else None
            with self._lock:
                if len(self._files) >= _KEPT:
                    self._files.clear()
                    self._silent.clear()
                self._files[file] = found
        return self._files.get(file)

    def _find(self, file: StackFile) -> _File | None:
        for opened, mappings in _candidates(file):
            try:
                fd = opened()
            except (TraplineError, OSError):
                continue
            try:
                if file.path == VDSO:
                    return _File(self._cache.get(fd, file.path), None)
                if _is(fd, file):
                    found = FoundFile(file_key_of(fd, file.path), file.path, mappings)
                    return _File(self._cache.get(fd, file.path), found)
            except TraplineError:
                continue
            finally:
                os.close(fd)
        return None


def _candidates(file: StackFile) -> Iterator[tuple[Callable[[], int], dict[int, list[Mapping]]]]:
    """Yields what opens the file, perhaps, and the processes through which it is opened."""
    if file.path == VDSO:
        yield open_vdso, {}
        return
    yield lambda: open_regular(file.path), {}
    for pid in pids():  # in a container, or deleted
        try:
            mappings = executable_mappings(pid)
        except OSError:
            continue
        for mapping in mappings:
            if file.file == f"{mapping.dev} {mapping.inode}":
                yield lambda pid=pid, mapping=mapping: open_mapped(pid, mapping), {pid: [mapping]}  # type: ignore[misc]
                break


def _is(fd: int, file: StackFile) -> bool:
    """Whether an open file is the one that a frame is in."""
    if file.build_id:
        return ElfFile(fd, file.path).build_id() == file.build_id
    key = file_key_of(fd, file.path)
    return file.file == f"{key.dev} {key.inode}"
