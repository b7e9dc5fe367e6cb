"""Return probes: a breakpoint where the call comes back to, nothing written to the stack (semantics H6, H7; ADR 0012).

At a function's entry the return address is read, and a breakpoint is armed there: a *return point*, a site like any other,
which stays while a return probe wants it. When a thread arrives there, its stack pointer says whose call has returned
(``engines.frames``); most often nobody's else than the one that is awaited, and others that come by only go on.

All methods run on the tracer thread.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

from trapline.errors import TraplineError, Unsupported
from trapline_agent.arch.x86_64.registers import FS_BASE, R14, RDI, RSP
from trapline_agent.engines import frames
from trapline_agent.engines.base import Observer, ReturnSink, SiteRequest
from trapline_agent.engines.frames import MAX_FRAMES, Frame, Key
from trapline_agent.engines.ptrace.memory import SWEEP_FROM, AddressSpace, Site
from trapline_agent.engines.ptrace.tracee import Thread, TracedProcess
from trapline_agent.targets import maps

_NO_STACK = "no-stack"
_WORD = 8
_UNMAPPED = frozenset((errno.EIO, errno.EFAULT))


class Returns:
    """See the module."""

    def __init__(
        self,
        observer: Observer,
        arm: Callable[[TracedProcess, SiteRequest], Site],
        look_again: Callable[[TracedProcess], Collection[Site]],
    ) -> None:
        """``arm`` arms a site in a process, as ``AddressSpace.arm``, and ``look_again`` takes back what was written where
        something else was mapped by then; it returns such sites."""
        self._observer = observer
        self._arm_site = arm
        self._look_again = look_again

    # --- traps -------------------------------------------------------------------------------------------------------

    def entered(self, ts: int, thread: Thread, site: Site, words: Sequence[int]) -> Frame | None:
        """A thread stands at the entry of a function whose returns are wanted; returns the call, to be stamped when the
        thread is let go on, or None where its return cannot be seen."""
        memory, sp = thread.process.memory, words[RSP]
        fd, calls = memory.fd, memory.calls
        held = [(sink, sink.enter(words, fd)) for sink in site.returns]
        why = ""
        try:
            back = int.from_bytes(_read(fd, sp, _WORD), "little")
            point = memory.sites.get(back)
            if point is None or site.addr not in point.awaiting:
                why = self._await(thread.process, site, back)
        except OSError:
            why = _NO_STACK
        if not why and len(calls.frames) >= calls.sweep_at:
            why = _sweep(memory)
        if why:
            for sink, _ in held:
                sink.lose(why)
            return None
        frame = Frame(site.addr, back, thread.process.id.pid, thread.tid, held, ts)
        key: Key = sp + _WORD
        if site.plan.go:
            key = _of_goroutine(words, fd, sp + _WORD) or key
        if gone := calls.frames.push(key, frame):
            frames.lose(gone, frames.ABANDONED)
        return frame

    def returned(self, ts: int, thread: Thread, site: Site, words: Sequence[int]) -> None:
        """A thread has arrived at a return point."""
        memory, sp = thread.process.memory, words[RSP]
        fd, table = memory.fd, memory.calls.frames
        done, gone = table.pop(sp, site.addr)
        if not done and table.of_goroutines and (key := _of_goroutine(words, fd, sp)) is not None:
            frames.lose(gone, frames.ABANDONED)
            done, gone = table.pop(key, site.addr)
        if gone:
            frames.lose(gone, frames.ABANDONED)
        if not done:
            return
        if not _came_by_ret(fd, sp, site.addr):
            # It was left, and whoever caught that has come here by a jump: the end of a catch clause, for example.
            frames.lose(done, frames.ABANDONED)
            return
        frames.leave(done, ts, thread.process.id.pid, thread.tid, words, fd)

    def unwound(self, thread: Thread, words: Sequence[int]) -> None:
        """A thread stands at the first instruction of longjmp: the calls between here and where it jumps to are left. Where
        that is on another stack nothing can be said of them."""
        memory = thread.process.memory
        table, sp = memory.calls.frames, words[RSP]
        if not len(table):
            return
        with contextlib.suppress(OSError):
            for to in _jump_targets(words, memory.fd):
                if to <= sp or not (left := table.between(sp, to)):
                    continue
                low, high = maps.span_at(thread.process.id.pid, sp)
                if low <= to <= high:
                    frames.lose(table.drop_keys(left), frames.ABANDONED)
                    return

    # --- return points -----------------------------------------------------------------------------------------------

    def _await(self, process: TracedProcess, site: Site, back: int) -> str:
        """Has a return point at an address for the sake of a site; returns an empty string, or why that cannot be."""
        memory = process.memory
        point = memory.sites.get(back)
        if point is None:
            if (known := memory.calls.refused.get(back)) is not None:
                return known
            try:
                point = self._arm(process, site, back)
            except Unsupported as e:
                return memory.calls.refuse(back, e.reason or e.code)
            except TraplineError as e:
                return e.reason or e.code  # it may pass: no descriptors, for example
            except OSError:
                return "Unmapped"
            if point is None:
                return "Unmapped"
        point.awaiting.add(site.addr)
        if not point.sinks and not point.returns:
            point.tally = site.tally  # what it costs, it costs for the sake of that one
        return ""

    def _arm(self, process: TracedProcess, site: Site, back: int) -> Site | None:
        memory = process.memory
        request = self._observer.place(process.id, back)
        former, memory.written = memory.written, []
        try:
            point = self._arm_site(process, replace(request, sinks=(), returns=(), tally=site.tally))
            return None if point in self._look_again(process) else point
        finally:
            memory.written = former + memory.written

    # --- what is wanted, and who is there ----------------------------------------------------------------------------

    @staticmethod
    def retain(memory: AddressSpace, sinks: Collection[ReturnSink], sites: Collection[int]) -> None:
        """Lets go of what is no longer wanted in an address space; the return points that nobody awaits any more are left
        to be disarmed.

        Args:
            memory: the address space.
            sinks: who wants returns in it.
            sites: addresses of the entries that they want.
        """
        memory.calls.frames.retain(sinks)
        memory.calls.refused.clear()
        for site in memory.sites.values():
            if site.awaiting:
                site.awaiting.intersection_update(sites)

    @staticmethod
    def given_up(memory: AddressSpace, point: Site, reason: str) -> None:
        """A return point was taken out, since it cannot be served: the calls that come back there are seen no more."""
        if point.awaiting:
            memory.calls.refuse(point.addr, reason)
            frames.lose(memory.calls.frames.drop(lambda frame: frame.back == point.addr), reason)

    @staticmethod
    def thread_ended(memory: AddressSpace, tid: int) -> None:
        """Its calls will not return, though another thread may get its stack, and make the same ones."""
        if len(memory.calls.frames):
            frames.lose(memory.calls.frames.drop(lambda frame: frame.tid == tid), frames.ENDED)

    @staticmethod
    def left(process: TracedProcess, memory: AddressSpace, reason: str) -> None:
        """A process has an address space no more; others may."""
        if not len(memory.calls.frames):
            return
        pid, alone = process.id.pid, memory.users <= 1
        frames.lose(memory.calls.frames.drop(lambda frame: alone or frame.pid == pid), reason)


def _jump_targets(words: Sequence[int], fd: int) -> tuple[int, int]:
    """Returns what the stack pointer may be after a longjmp with these registers: glibc's, which is rotated and mixed with a
    word of the thread's (sysdeps/unix/sysv/linux/x86_64/pointer_guard.h), and musl's, which is plain. Both have it, as it
    was after setjmp's return, in word 6. Raises OSError."""
    word = int.from_bytes(_read(fd, words[RDI] + 6 * _WORD, _WORD), "little")
    guard = int.from_bytes(_read(fd, words[FS_BASE] + 0x30, _WORD), "little")
    return (word >> 17 | word << 47 & 2**64 - 1) ^ guard, word


def _sweep(memory: AddressSpace) -> str:
    """Takes out what is abandoned; returns why no further call can be kept, or an empty string."""
    calls = memory.calls
    if calls.refuse_next:
        calls.refuse_next -= 1
        return frames.TOO_MANY
    frames.lose(calls.frames.sweep(lambda key, back: _stands(memory.fd, key, back)), frames.ABANDONED)
    # As often as their number doubles, so that it costs each call a constant.
    calls.sweep_at = min(max(SWEEP_FROM, 2 * len(calls.frames)), MAX_FRAMES)
    if len(calls.frames) < MAX_FRAMES:
        return ""
    calls.refuse_next = MAX_FRAMES
    return frames.TOO_MANY


def _came_by_ret(fd: int, sp: int, addr: int) -> bool:
    """Whether the word below the stack pointer is the address that a thread has arrived at: a return takes it from there,
    and it stays, since signal handlers leave the 128 bytes below alone (System V ABI, 3.2.2)."""
    try:
        return int.from_bytes(_read(fd, sp - _WORD, _WORD), "little") == addr
    except OSError:
        return True  # it cannot be read now; that proves nothing


def _stands(fd: int, key: Key, back: int) -> bool:
    """Whether a return address is still where the call left it. Another thread may run there meanwhile."""
    try:
        if isinstance(key, int):
            return int.from_bytes(_read(fd, key - _WORD, _WORD), "little") == back
        g, below = key
        high = int.from_bytes(_read(fd, g + _WORD, _WORD), "little")
        word = int.from_bytes(_read(fd, high - below - _WORD, _WORD), "little")
        # A stack that moves meanwhile proves nothing.
        return word == back or int.from_bytes(_read(fd, g + _WORD, _WORD), "little") != high
    except OSError as e:
        return e.errno not in _UNMAPPED


def _of_goroutine(words: Sequence[int], fd: int, sp: int) -> tuple[int, int] | None:
    """Returns the key of a stack pointer where r14 is the goroutine whose stack it is on (``g.stack`` is its first field,
    lower and upper end: runtime/runtime2.go); else None."""
    g = words[R14]
    with contextlib.suppress(OSError):
        bounds = _read(fd, g, 2 * _WORD)
        low, high = int.from_bytes(bounds[:_WORD], "little"), int.from_bytes(bounds[_WORD:], "little")
        if low < sp <= high:
            return g, high - sp
    return None


def _read(fd: int, addr: int, size: int) -> bytes:
    """Raises OSError where it is not all mapped."""
    try:
        data = os.pread(fd, size, addr)
    except OverflowError as e:
        raise OSError(errno.EIO, "no such address") from e
    if len(data) < size:
        raise OSError(errno.EIO, "the memory ends there")
    return data
