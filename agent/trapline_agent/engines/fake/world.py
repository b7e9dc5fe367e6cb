"""A simulated host: files, processes, mappings, memory, fork, exec, dlopen. It answers what /proc would (``targets.proc``).

Memory is what matters here: each process has a copy of each page's bytes of its own, which a fork copies and an exec drops,
and a call reads the byte at its address. A trap that nobody serves ends the process by SIGTRAP, as the kernel would.
"""

from __future__ import annotations

import itertools
import threading
from dataclasses import dataclass, field, replace
from typing import Protocol

from trapline_agent.plans import FileKey, SitePlan
from trapline_agent.targets.maps import Mapping
from trapline_agent.targets.process import ProcessFacts

BREAKPOINT = 0xCC
PAGE = 4096
CALLER = 64
"""Bytes from a function to the code that calls it, and is returned to."""
_STACK = 0x10_0000
"""Bytes of a stack; each process has its own."""
_FRAME = 64
_ALIGNMENT = 16
_TEXT = bytes((0x55, 0x48, 0x89, 0xE5))
"""What all simulated code is made of: push %rbp; mov %rsp,%rbp."""


@dataclass(frozen=True)
class SimulatedFile:
    key: FileKey
    path: str
    content: bytes = field(default=_TEXT * (4 * PAGE // len(_TEXT)), repr=False)
    data: int = 0
    """So many bytes of it, the last ones, are mapped writable behind its code."""

    def plan(self, offset: int, site: int = 0) -> SitePlan:
        return SitePlan(
            site=site, file=self.key, path=self.path, offset=offset, code=self.content[offset : offset + 15]
        )


@dataclass(eq=False)
class Memory:
    """An address space; processes share it after a vfork."""

    mappings: list[Mapping] = field(default_factory=list)
    written: dict[int, int] = field(default_factory=dict)
    """Bytes that differ from their file's, by address."""


@dataclass(eq=False)
class SimulatedProcess:
    pid: int
    start_time: int
    ppid: int
    comm: str
    uid: int
    memory: Memory
    status: int | None = None
    """Wait status, once it has ended."""
    stack: list[tuple[int, int]] = field(default_factory=list)
    """Its calls: (stack pointer after the return, return address), the innermost last."""
    returned_sp: int = 0
    """Its stack pointer, when it has returned from one."""
    debugger: str = ""
    """Name of another tracer that has it."""


class Watcher(Protocol):
    """What the world tells while the process in question stands still: an engine's synchronous hooks."""

    def trapped(self, process: SimulatedProcess, addr: int) -> bool:
        """It ran into a breakpoint; returns whether it goes on behind it."""

    def forked(self, parent: SimulatedProcess, child: SimulatedProcess) -> None: ...

    def execed(self, process: SimulatedProcess, old: Memory) -> None: ...

    def mapped(self, process: SimulatedProcess) -> None:
        """Its loader mapped a file, or took one out."""

    def ended(self, process: SimulatedProcess) -> None: ...


class World:
    """One simulated host. Any thread: a lock is held while anything of it changes, and by those it tells."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.processes: dict[int, SimulatedProcess] = {}
        self.files: dict[FileKey, SimulatedFile] = {}
        self.watcher: Watcher | None = None
        self.looks = 0
        """How often the mappings of any process were read."""
        self._numbers = itertools.count(1)

    # --- files and processes -----------------------------------------------------------------------------------------

    def file(self, path: str, data: int = 0) -> SimulatedFile:
        """Makes a file, with some bytes of data that are 0."""
        made = SimulatedFile(FileKey("fa:01", next(self._numbers)), path)
        if data:
            made = replace(made, content=made.content + bytes(data), data=data)
        self.files[made.key] = made
        return made

    def spawn(self, *files: SimulatedFile, comm: str = "sim", uid: int = 0, ppid: int = 1) -> SimulatedProcess:
        """Starts a process that maps some files."""
        with self.lock:
            number = next(self._numbers)
            process = SimulatedProcess(1_000_000_000 + number, number, ppid, comm, uid, Memory())
            self.processes[process.pid] = process
            for file in files:
                self._map(process, file)
            return process

    def _map(self, process: SimulatedProcess, file: SimulatedFile, prot: str = "r-xp") -> Mapping:
        start = PAGE * 16 * next(self._numbers)
        code = len(file.content) - file.data
        made = Mapping(start, start + code, prot, 0, file.key.dev, file.key.inode, file.path, False)
        process.memory.mappings.append(made)
        if file.data:
            data = made._replace(start=made.end, end=made.end + file.data, prot="rw-p", offset=code)
            process.memory.mappings.append(data)
        return made

    def mmap(self, process: SimulatedProcess, file: SimulatedFile, prot: str = "r-xp", *, told: bool = True) -> Mapping:
        """Maps a file once more. ``told``: by the loader, which tells a tracer; else by mmap(2), which tells nobody."""
        with self.lock:
            made = self._map(process, file, prot)
            if told and self.watcher is not None:
                self.watcher.mapped(process)
            return made

    def munmap(self, process: SimulatedProcess, start: int, end: int, *, told: bool = True) -> None:
        """Takes a range of addresses away; mappings are shortened or split."""
        with self.lock:
            rest: list[Mapping] = []
            for m in process.memory.mappings:
                if m.end <= start or end <= m.start:
                    rest.append(m)
                    continue
                if m.start < start:
                    rest.append(m._replace(end=start))
                if end < m.end:
                    rest.append(m._replace(start=end, offset=m.offset + end - m.start))
            process.memory.mappings = rest
            for addr in [a for a in process.memory.written if start <= a < end]:
                del process.memory.written[addr]
            if told and self.watcher is not None:
                self.watcher.mapped(process)

    def fork(self, parent: SimulatedProcess, *, shares_memory: bool = False) -> SimulatedProcess:
        """Makes a child with a copy of its parent's memory, breakpoints and all; or with the very same (vfork)."""
        with self.lock:
            child = self.spawn(comm=parent.comm, uid=parent.uid, ppid=parent.pid)
            same = parent.memory
            child.memory = same if shares_memory else Memory(list(same.mappings), dict(same.written))
            if not shares_memory:
                child.stack = list(parent.stack)
            if self.watcher is not None:
                self.watcher.forked(parent, child)
            return child

    def exec(self, process: SimulatedProcess, *files: SimulatedFile, comm: str = "") -> None:
        """Gives a process a new image."""
        with self.lock:
            old, process.memory = process.memory, Memory()
            process.stack = []
            process.comm = comm or process.comm
            for file in files:
                self._map(process, file)
            if self.watcher is not None:
                self.watcher.execed(process, old)

    def end(self, process: SimulatedProcess, status: int = 0) -> None:
        """Ends a process; one that has ended is fine."""
        with self.lock:
            if self.processes.pop(process.pid, None) is not None:
                process.status = status
                if self.watcher is not None:
                    self.watcher.ended(process)

    def enter(self, process: SimulatedProcess, file: SimulatedFile, offset: int) -> None:
        """Calls the function at a file's offset, from the code that is ``CALLER`` bytes behind it. The call goes on until
        ``leave``; calls may be nested."""
        with self.lock:
            m = next(m for m in process.memory.mappings if m.file == file.key and m.addr(offset) is not None)
            self._enter(process, m.start + offset - m.offset)

    def leave(self, process: SimulatedProcess, *, times: int = 1, jump: bool = False) -> None:
        """Returns from the innermost calls, one after the other; ``jump``: leaves them all at once, as longjmp does."""
        with self.lock:
            for _ in range(times):
                process.returned_sp, back = process.stack.pop()
                if not jump:
                    self._run(process, back)

    def _enter(self, process: SimulatedProcess, addr: int) -> None:
        sp = process.stack[-1][0] if process.stack else _STACK * process.start_time
        process.stack.append((sp - _FRAME, addr + CALLER & -_ALIGNMENT))
        self._run(process, addr)

    def _run(self, process: SimulatedProcess, addr: int) -> None:
        if not any(m.start <= addr < m.end for m in process.memory.mappings):
            return  # nobody probes what is not there, and nobody asks how it goes on
        if self.read(process.memory, addr) == BREAKPOINT and not (
            self.watcher is not None and self.watcher.trapped(process, addr)
        ):
            self.end(process, 5)  # SIGTRAP

    def call(self, process: SimulatedProcess, file: SimulatedFile, offset: int) -> int:
        """Calls the code at a file's offset once in each place where it is mapped, and returns from it; returns in how many.

        A breakpoint that nobody serves ends the process.
        """
        with self.lock:
            calls = 0
            for m in list(process.memory.mappings):
                addr = m.addr(offset) if m.file == file.key else None
                if addr is None or process.status is not None:
                    continue
                calls += 1
                self._enter(process, addr)
                if process.status is None:
                    process.returned_sp, back = process.stack.pop()
                    self._run(process, back)
            return calls

    # --- memory ------------------------------------------------------------------------------------------------------

    def read(self, memory: Memory, addr: int) -> int:
        """Returns a byte. Raises OSError (EIO) where nothing is mapped."""
        m = next((m for m in memory.mappings if m.start <= addr < m.end), None)
        if m is None:
            raise OSError(5, "Input/output error")
        content = self.files[m.file].content
        return memory.written.get(addr, content[addr - m.start + m.offset])

    def write(self, memory: Memory, addr: int, value: int) -> None:
        """Writes a byte. Raises OSError (EIO) where nothing is mapped."""
        if self.read(memory, addr) == value:
            return
        memory.written.pop(addr, None)
        if self.read(memory, addr) != value:
            memory.written[addr] = value

    def overwrite(self, pid: int, plan: SitePlan, value: int) -> None:
        """Changes a byte of a process' code, as another tool would."""
        with self.lock:
            process = self.processes[pid]
            for m in process.memory.mappings:
                if m.file == plan.file and (addr := m.addr(plan.offset)) is not None:
                    self.write(process.memory, addr, value)

    def altered(self, process: SimulatedProcess) -> dict[tuple[str, int], tuple[int, int]]:
        """Returns where the code of a process differs from its files: {(path, file offset): (in the file, in memory)}."""
        with self.lock:
            found = {}
            for addr, value in process.memory.written.items():
                for m in process.memory.mappings:
                    if m.start <= addr < m.end and m.prot[2] == "x":
                        offset = addr - m.start + m.offset
                        found[m.path, offset] = (self.files[m.file].content[offset], value)
            return found

    # --- what /proc would say (targets.proc.Proc) --------------------------------------------------------------------

    def _alive(self, pid: int) -> SimulatedProcess:
        process = self.processes.get(pid)
        if process is None:
            raise ProcessLookupError(3, "no such process", str(pid))
        return process

    def pids(self) -> list[int]:
        return sorted(self.processes)

    def facts(self, pid: int) -> ProcessFacts | None:
        p = self.processes.get(pid)
        if p is None:
            return None
        exe = p.memory.mappings[0].path if p.memory.mappings else ""
        return ProcessFacts(pid, p.start_time, p.ppid, p.comm, "S", False, 1, p.uid, 0, exe, False, False)

    def maps(self, pid: int) -> bytes:
        with self.lock:
            self.looks += 1
            return b"".join(
                b"%x-%x %s %x %s %d %s\n"
                % (m.start, m.end, m.prot.encode(), m.offset, m.dev.encode(), m.inode, m.path.encode())
                for m in sorted(self._alive(pid).memory.mappings)
            )

    def content(self, pid: int, mapping: Mapping, offset: int, size: int) -> bytes:
        return self.files[mapping.file].content[offset : offset + size]

    def start_time(self, pid: int) -> int:
        return self._alive(pid).start_time

    def parent(self, pid: int) -> int:
        return self._alive(pid).ppid
