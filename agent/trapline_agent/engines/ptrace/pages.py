"""Slot pages: room for displaced instructions where a file has none behind its code (docs/adr/0012).

What the kernel's uprobes have in ``[uprobes]`` (kernel/events/uprobes.c, xol_add_vma), the process has to map itself here.
It does when one of its threads stands at a breakpoint whose instruction has no slot yet: in user code, at a known place,
waited for by nobody. The thread runs a few instructions of ours in the unused end of the vDSO, which make the system call,
put its registers back and lead it to the breakpoint again; we stop it at the call's end to see what came of it. A thread
whose tracer is killed meanwhile goes that way by itself.

All methods run on the tracer thread and may overwrite its register buffer.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import re
import signal
import struct
from collections.abc import Callable

from trapline.errors import Unsupported
from trapline_agent.arch.x86_64.registers import RAX, RIP
from trapline_agent.arch.x86_64.remote import STUB_BYTES, call_stub
from trapline_agent.engines.ptrace.memory import AREA_BYTES, AREA_HEADER, AddressSpace, Site
from trapline_agent.engines.ptrace.tracee import Thread, TracedProcess
from trapline_agent.kernel import procfs, ptrace
from trapline_agent.targets import layout, maps

_REACH = 2**31 - 2**20
_TRIES = 3
_SYSCALL_STOP = signal.SIGTRAP << 8 | 0x7F
_SYNCHRONOUS = frozenset((signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGSYS))
_SYS_MMAP, _SYS_PRCTL = 9, 157
_PROTECTION = 1 | 4  # PROT_READ | PROT_EXEC
_FLAGS = 0x02 | 0x20 | 0x100000  # MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE
_PR_SET_VMA, _PR_SET_VMA_ANON_NAME = 0x53564D41, 0
_START_BRK = 44
"""Among ``procfs.stat_fields``: proc_pid_stat(5), field 47."""
_HINT = "probe another instruction of the function; `endbr64`, `nop` and jumps need no room"


class Diverted(Exception):
    """The thread stopped for another reason first, or ended. If it lives it comes to the breakpoint again, with the
    registers that it had."""

    def __init__(self, status: int | None) -> None:
        self.status = status
        """The wait status, which has not been served; None: it is to go on, by the code that it is in."""


class SlotPages:
    """See the module."""

    def __init__(self, registers: ptrace.RegisterFile, waiter: ptrace.Waiter) -> None:
        self._registers = registers
        self._words = registers.words
        self._waiter = waiter

    def prospect(self, process: TracedProcess) -> Callable[[Site], Unsupported | None]:
        """Returns a function that says why a site could not be given room at its first hit; what it needs to know of the
        process it asks once, and only then. It raises OSError where /proc does not answer."""

        @functools.cache
        def general() -> Unsupported | None:
            memory = process.memory
            if memory.unmappable is not None:
                return memory.unmappable
            for thread in process.threads.values():
                if (refusal := _confined(thread)) is not None:
                    return refusal
            if not _spare(memory, mapped()):
                return _no_room(process.id.pid, "it has no vDSO, or one without unused bytes")
            return None

        @functools.cache
        def mapped() -> list[layout.Span]:
            return layout.spans(maps.read_maps(process.id.pid))

        def objection(site: Site) -> Unsupported | None:
            if (refusal := general()) is not None:
                return refusal
            if any(_in_reach(site, at) for at in known):
                return None
            found = [*_areas(process.memory, mapped(), site), *_places(process.id.pid, mapped(), site)]
            known.update(found[:1])
            return None if found else _no_room(process.id.pid, "within 2 GB nothing is free")

        known: set[int] = set()
        return objection

    def provide(self, thread: Thread, site: Site) -> None:
        """Gives a site a slot. The thread stands at its breakpoint, in the stop that that made, registers loaded; its ip is
        at the instruction itself afterwards, and in ``words``. Whatever is raised, the registers are as they were.

        Raises:
            Unsupported: there is none to be had, with the reason.
            Diverted: another stop has to be served first; the thread will come again.
            ProcessLookupError: it was killed.
        """
        memory, pid = thread.process.memory, thread.process.id.pid
        try:
            if memory.place_in_area(site):
                return
            if (refusal := procfs.tried(lambda: _confined(thread))) is not None:
                raise refusal
            for _ in range(_TRIES):
                mapped = layout.spans(procfs.tried(lambda: maps.read_maps(pid)))
                memory.areas |= _areas(memory, mapped, site)
                if memory.place_in_area(site):
                    return
                at = next(iter(_places(pid, mapped, site)), 0)
                spare = _spare(memory, mapped)
                if not at or not spare:
                    break
                result = self._call(thread, spare, site.addr, _SYS_MMAP, at, AREA_BYTES, _PROTECTION, _FLAGS, -1, 0)
                if result == at and memory.add_area(at):
                    # So that people see what it is. Not every kernel can (CONFIG_ANON_VMA_NAME).
                    self._call(
                        thread, spare, site.addr, _SYS_PRCTL, _PR_SET_VMA, _PR_SET_VMA_ANON_NAME, at, AREA_BYTES, at
                    )
                elif result != -errno.EEXIST:  # that the program itself took the place meanwhile
                    why = os.strerror(-result) if -4096 < result < 0 else f"it was given {result:#x}"
                    memory.unmappable = _no_room(pid, f"the kernel did not let it map a page for that: {why}")
                    raise memory.unmappable
        except ProcessLookupError:
            raise
        except OSError as e:
            raise _no_room(pid, str(e)) from e
        if not memory.place_in_area(site):
            raise _no_room(pid, "within 2 GB nothing is free")

    def _call(self, thread: Thread, stub: int, back: int, number: int, *args: int) -> int:
        """Has a stopped thread make a system call. Returns what that returned. Raises as ``provide``, and OSError."""
        tid, memory, words = thread.tid, thread.process.memory, self._words
        words[RIP] = back
        before = words.tolist()
        code = call_stub(number, args, before, back)
        if not memory.put(stub, code):
            raise OSError(errno.EIO, f"the vDSO of process {thread.process.id.pid} cannot be written")
        status: int | None = None
        try:
            procfs.tried(lambda: ptrace.poke_user(tid, 8 * RIP, stub))
            for _ in ("entry", "exit"):
                ptrace.to_system_call(tid)
                status = self._wait_for(tid)
                if not os.WIFSTOPPED(status):
                    raise Diverted(status)
                if status != _SYSCALL_STOP or procfs.tried(lambda: self._registers.signal_code(tid)) != signal.SIGTRAP:
                    if self._is_fault(tid, status):
                        return -errno.EFAULT  # of our own making: the program does not hear of it
                    raise Diverted(status)
            procfs.tried(lambda: self._registers.load(tid))
            return words[RAX] if words[RAX] < 2**63 else words[RAX] - 2**64
        except OSError:
            if status is None:
                raise
            raise Diverted(None) from None
        finally:
            self._put_back(thread, status, before)
            memory.put(stub, bytes(len(code)))

    def _put_back(self, thread: Thread, status: int | None, before: list[int]) -> None:
        for i, value in enumerate(before):
            self._words[i] = value
        # (Not in the image that another thread's exec put in its place.)
        if status is None or (os.WIFSTOPPED(status) and status >> 16 != ptrace.PTRACE_EVENT_EXEC):
            try:
                procfs.tried(lambda: self._registers.store(thread.tid))
            except ProcessLookupError:
                raise
            except OSError:
                raise Diverted(None) from None  # the code does it too, and stays where it is

    def _is_fault(self, tid: int, status: int) -> bool:
        """Whether a thread stopped for a signal that the call itself made: one that forbids it (prctl(2),
        PR_SET_SYSCALL_USER_DISPATCH), or a page that went away."""
        if status >> 16 or os.WSTOPSIG(status) not in _SYNCHRONOUS:
            return False
        return procfs.tried(lambda: self._registers.signal_code(tid)) > 0

    def _wait_for(self, tid: int) -> int:
        while True:
            got, status = self._waiter.wait(tid)
            if got != 0:
                return status


def _no_room(pid: int, why: str) -> Unsupported:
    return Unsupported(
        f"process {pid} has no room for the displaced instruction: its file has none behind its code, and {why}",
        reason="NoRoom",
        hint=_HINT,
    )


def _confined(thread: Thread) -> Unsupported | None:
    """Says why a thread must not be made to map anything: a filter may kill it for that (seccomp(2))."""
    try:
        mode = procfs.status(thread.tid, "Seccomp").get("Seccomp", "0")
    except ProcessLookupError:
        return None
    if mode == "0":
        return None
    return Unsupported(
        f"thread {thread.tid} of process {thread.process.id.pid} is confined by seccomp, which may end it when it maps the "
        "page that the displaced instruction needs",
        reason="Seccomp",
        hint=_HINT,
    )


def _places(pid: int, mapped: list[layout.Span], site: Site) -> list[int]:
    start_brk = int(procfs.tried(lambda: procfs.stat_fields(pid))[_START_BRK])
    found = layout.places(
        mapped, site.addr, AREA_BYTES, _REACH, start_brk=start_brk, stack_limit=procfs.tried(lambda: _stack_limit(pid))
    )
    return [at for at in found if _in_reach(site, at)]


def _stack_limit(pid: int) -> int:
    match = re.search(rb"^Max stack size +(\S+)", procfs.read(f"/proc/{pid}/limits"), re.MULTILINE)
    return int(match[1]) if match is not None and match[1].isdigit() else -1


def _areas(memory: AddressSpace, mapped: list[layout.Span], site: Site) -> set[int]:
    """Returns slot pages that are there already: also of a tracer before us, which may have been killed."""
    return {
        s.start
        for s in mapped
        if s.prot == "r-xp"
        and not s.inode
        and s.end - s.start == AREA_BYTES
        and _in_reach(site, s.start)
        and memory.has(s.start, AREA_HEADER)
    }


def _in_reach(site: Site, area: int) -> bool:
    with contextlib.suppress(Unsupported):
        site.step.slot(site.addr, area)
        site.step.slot(site.addr, area + AREA_BYTES)
        return True
    return False


def _spare(memory: AddressSpace, mapped: list[layout.Span]) -> int:
    """Returns the address of some zeros in executable memory that nobody uses, for ``STUB_BYTES``: behind the end of the
    vDSO's ELF image (System V gABI, chapter 4), in the rest of its last page. 0 where there are none.

    They become the process' own by being written to, as code does.
    """
    vdso = next((s for s in mapped if s.name == b"[vdso]"), None)
    if vdso is None:
        return 0
    image = procfs.tried(lambda: os.pread(memory.fd, vdso.end - vdso.start, vdso.start))
    if image[:5] != b"\x7fELF\x02" or len(image) != vdso.end - vdso.start:
        return 0
    programs, sections = struct.unpack_from("<QQ", image, 0x20)
    program_size, program_count, section_size, section_count = struct.unpack_from("<HHHH", image, 0x36)
    end = max(programs + program_size * program_count, sections + section_size * section_count)
    for i in range(section_count):
        offset, size = struct.unpack_from("<QQ", image, sections + i * section_size + 0x18)
        end = max(end, offset + size)
    first = -(-end // 16) * 16
    for at in range(first, len(image) - STUB_BYTES + 1, -(-STUB_BYTES // 16) * 16):
        if not any(image[at : at + STUB_BYTES]):
            return vdso.start + at
    return 0
