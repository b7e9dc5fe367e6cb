"""Names for frames, when somebody reads a stack: by build-id, or by the file's identity, and offset. The agent's half.

Nothing is looked up at a trap. A file is found by its path here or in the mount namespace of a process that maps it; one
that has been replaced since is not taken for it.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator

from trapline.errors import TraplineError
from trapline.protocol.stacks import Frame, StackFile, place
from trapline_agent.symbols.elf import ElfFile
from trapline_agent.symbols.index import IndexCache, SymbolIndex
from trapline_agent.targets.files import file_key_of, open_mapped, open_regular
from trapline_agent.targets.maps import executable_mappings
from trapline_agent.targets.process import pids
from trapline_agent.unwind.tables import VDSO, open_vdso

_KEPT = 1 << 16
"""Frames whose names are kept."""

Inlined = Callable[[StackFile, int], list[str]]
"""Names of the functions inlined at a place of a file, innermost first: of its debug information."""


class Names:
    """Names frames. Any thread may call."""

    def __init__(self, cache: IndexCache | None = None, inlined: Inlined = lambda file, offset: []) -> None:
        self._cache = IndexCache() if cache is None else cache
        self._inlined = inlined
        self._lock = threading.Lock()
        self._files: dict[StackFile, SymbolIndex | None] = {}
        self._names: OrderedDict[Frame, tuple[str, ...]] = OrderedDict()

    def __call__(self, frame: Frame) -> tuple[str, ...]:
        """Returns a frame's function, after those that are inlined there; without a symbol ``libc.so.6+0x9b0e3``."""
        known = self._names.get(frame)
        if known is None:
            known = (*self._inlined(frame.file, frame.offset), self._name(frame))
            with self._lock:
                self._names[frame] = known
                if len(self._names) > _KEPT:
                    self._names.popitem(last=False)
        return known

    def _name(self, frame: Frame) -> str:
        index = self._index(frame.file)
        symbol = index.at(frame.offset) if index is not None else None
        if index is None or symbol is None or (symbol.size and frame.offset >= index.end_of(symbol)):
            return place(frame)
        return symbol.name

    def _index(self, file: StackFile) -> SymbolIndex | None:
        if file not in self._files:
            found = self._find(file) if file.path.startswith("/") or file.path == VDSO else None
            with self._lock:
                if len(self._files) >= _KEPT:
                    self._files.clear()
                self._files[file] = found
        return self._files[file]

    def _find(self, file: StackFile) -> SymbolIndex | None:
        for opened in _candidates(file):
            try:
                fd = opened()
            except (TraplineError, OSError):
                continue
            try:
                if file.path == VDSO or _is(fd, file):
                    return self._cache.get(fd, file.path)
            except TraplineError:
                continue
            finally:
                os.close(fd)
        return None


def _candidates(file: StackFile) -> Iterator[Callable[[], int]]:
    if file.path == VDSO:
        yield open_vdso
        return
    yield lambda: open_regular(file.path)
    for pid in pids():  # in a container, or deleted
        try:
            mappings = executable_mappings(pid)
        except OSError:
            continue
        for mapping in mappings:
            if file.file == f"{mapping.dev} {mapping.inode}":
                yield lambda pid=pid, mapping=mapping: open_mapped(pid, mapping)  # type: ignore[misc]
                break


def _is(fd: int, file: StackFile) -> bool:
    """Whether an open file is the one that a frame is in."""
    if file.build_id:
        return ElfFile(fd, file.path).build_id() == file.build_id
    key = file_key_of(fd, file.path)
    return file.file == f"{key.dev} {key.inode}"
