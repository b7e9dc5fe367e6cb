"""Gets a stopped thread past its breakpoint, and out of a slot when a signal is to be delivered there (semantics H3, H4).

All methods run on the tracer thread; they may overwrite its register buffer.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import signal
import struct
import time

from trapline_agent.arch.x86_64.registers import EFLAGS, ORIG_RAX, R8, R10, RAX, RDX, RIP, RSP
from trapline_agent.engines.ptrace.memory import Site
from trapline_agent.engines.ptrace.tracee import Thread
from trapline_agent.kernel import procfs, ptrace

TRAP_BIT = 1 << (signal.SIGTRAP - 1)
_FAULTS = frozenset((signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL))
# A fault that is blocked kills, whatever its handler (kernel/signal.c, force_sig_info_to_task): those are left open.
_HELD_BACK = (2**64 - 1) & ~TRAP_BIT & ~sum(1 << (number - 1) for number in _FAULTS)
_STEP_STOP = signal.SIGTRAP << 8 | 0x7F
_INTERRUPTED = 2**64 - errno.EINTR
_ERESTARTNOHAND = 2**64 - 514
"""include/linux/errno.h: a system call begins again, unless a handler runs; then it ends with EINTR."""
_IGNORED_BY_DEFAULT = frozenset((signal.SIGCHLD, signal.SIGURG, signal.SIGWINCH, signal.SIGCONT))
_UNKNOWN_S = 1.0
"""Taken for a time-out that is not among the arguments (SO_RCVTIMEO)."""
_UNRESTARTED: dict[int, int | float] = {
    0: math.inf,  # read, of inotify
    43: _UNKNOWN_S,  # accept
    45: _UNKNOWN_S,  # recvfrom
    47: _UNKNOWN_S,  # recvmsg
    65: math.inf,  # semop
    128: RDX,  # rt_sigtimedwait
    208: R8,  # io_getevents
    220: R10,  # semtimedop
    232: R10,  # epoll_wait
    281: R10,  # epoll_pwait
    288: _UNKNOWN_S,  # accept4
    333: R8,  # io_pgetevents
    441: R10,  # epoll_pwait2
}
"""System calls that end with EINTR whatever the signal, having done nothing; and their time-out in seconds, or the register
that has it, or its address."""
_IN_MS = frozenset((232, 281))
_STEPS = 8
"""Single steps out of a slot; only a repeated string instruction takes more."""


def state_of(words: memoryview) -> list[int]:
    """Returns a thread's registers, to be compared with those at a later stop: a handler that returns puts them all back.
    (Without orig_rax, which the kernel sets, and the flags, of which it sets one.)"""
    state: list[int] = words.tolist()
    state[ORIG_RAX] = state[EFLAGS] = 0
    return state


class Stepper:
    """See the module."""

    def __init__(self, registers: ptrace.RegisterFile, waiter: ptrace.Waiter) -> None:
        self._registers = registers
        self._words = registers.words
        self._waiter = waiter

    def leave_trap(self, thread: Thread, site: Site) -> None:
        """Moves the ip off the trap. The registers are loaded; they are as they were before the instruction afterwards."""
        words = self._words
        words[RIP] = site.addr
        if site.slot:
            ptrace.poke_user(thread.tid, 8 * RIP, site.slot)
        elif site.next_ip is not None:
            ptrace.poke_user(thread.tid, 8 * RIP, site.next_ip(words))
        elif site.step.computed is not None:
            before = words.tolist()
            site.step.computed(words)
            words[RIP] = site.addr + site.step.length
            self._registers.store(thread.tid)
            for i, value in enumerate(before):
                words[i] = value
        else:
            ptrace.poke_user(thread.tid, 8 * RIP, site.addr)  # its byte was taken out, for want of a slot

    def note_mask(self, thread: Thread) -> None:
        """Remembers what a stopped thread blocks, where that is SIGTRAP too: see ``Thread.blocked``."""
        mask = ptrace.signal_mask(thread.tid)
        thread.blocked = mask if mask & TRAP_BIT else 0

    def block_again(self, thread: Thread) -> None:
        """Puts SIGTRAP back among the signals that a thread blocks (``Thread.blocked``), as long as the program left the
        others as they were."""
        if ptrace.signal_mask(thread.tid) | TRAP_BIT == thread.blocked:
            ptrace.set_signal_mask(thread.tid, thread.blocked)
        else:
            thread.blocked = 0

    def leave_slot(self, thread: Thread, sig: int = 0) -> int:
        """Brings the ip of a stopped thread from inside a slot to where the program believes it to be.

        Args:
            thread: in a stop.
            sig: the signal that it is stopped for; 0 in other stops.

        Returns:
            0 where the thread is in the same stop still; else the wait status of a later stop, or of its end. In a later
            stop ``sig`` has been put in again, unless that stop is one of SIGTRAP: then it can be given to ``cont``.
        """
        registers, words = self._registers, self._words
        memory = thread.process.memory
        if not memory.slots:
            return 0
        registers.load(thread.tid)
        inside = memory.slot_at(words[RIP])
        if inside is None:
            return 0
        addr, site, slot = inside
        original = slot.starts.get(words[RIP] - addr)
        is_fault = sig in _FAULTS and registers.signal_code(thread.tid) > 0
        if original is not None and (is_fault or original[0] != site.addr):
            # An instruction that faulted and is run again is a hit again, as it is with the kernel's uprobes: whether the
            # handler returns to it or jumps away cannot be known.
            self._put_back(thread, original)
            return 0
        info = registers.signal_info(thread.tid) if sig else b""
        status = self._step_out(thread)
        if os.WIFSTOPPED(status) and sig:
            if status >> 16 == 0 and os.WSTOPSIG(status) == signal.SIGTRAP:
                registers.set_signal_info(thread.tid, info)
            else:
                self._send(thread, sig)
        return status

    def begin_again(self, thread: Thread, sig: int) -> None:
        """Has a system call begin again that ended with EINTR for nothing.

        A signal that the program ignores is dropped before it wakes anybody, but not where the thread is traced
        (kernel/signal.c, sig_ignored); and a stop of ours may come just as a thread begins to wait.

        Its time-out begins again too: so not more often than doubles that, for a program may owe its timers to it.

        Args:
            thread: in a signal-delivery-stop, or in one of PTRACE_EVENT_STOP.
            sig: the signal that it is stopped for; 0 where that is none of the program's.
        """
        words = self._words
        self._registers.load(thread.tid)
        if words[RAX] != _INTERRUPTED or words[ORIG_RAX] not in _UNRESTARTED:
            return
        if sig:
            _, ignored, caught = procfs.signal_sets(thread.tid)
            bit = 1 << (sig - 1)
            if not ignored & bit and (caught & bit or sig not in _IGNORED_BY_DEFAULT):
                return
        if not self._may_wait_longer(thread):
            return
        # Should a handler run all the same, for another signal, the kernel makes EINTR of it again.
        ptrace.poke_user(thread.tid, 8 * RAX, _ERESTARTNOHAND)

    def _may_wait_longer(self, thread: Thread) -> bool:
        timeout, now = self._timeout(thread), time.monotonic()
        if timeout == math.inf:
            return True
        ip, first, last = thread.again or (0, 0.0, 0.0)
        if ip != self._words[RIP] or now - last >= timeout:
            first = now  # what was begun again then has ended since
        elif now - first > timeout:
            thread.again = None
            return False
        thread.again = (self._words[RIP], first, now)
        return True

    def _timeout(self, thread: Thread) -> float:
        """Returns how long the system call of a thread may wait, in seconds. Raises OSError."""
        words = self._words
        call = words[ORIG_RAX]
        register = _UNRESTARTED[call]
        if isinstance(register, float):
            return register
        if call in _IN_MS:
            value = struct.unpack("<i", struct.pack("<I", words[register] & 0xFFFFFFFF))[0]
            return math.inf if value < 0 else value / 1000
        if not words[register]:
            return math.inf
        timespec = os.pread(thread.process.memory.fd, 16, words[register])
        if len(timespec) < 16:
            raise OSError(errno.EFAULT, "the time-out cannot be read")
        seconds, ns = struct.unpack("<qq", timespec)
        return float(seconds + ns / 1e9)

    def owes_trap(self, thread: Thread) -> bool:
        """Whether a thread in an event stop has run into a breakpoint of ours and not told of it yet: a group-stop and an
        interrupt come before the SIGTRAP that is pending (kernel/signal.c, get_signal)."""
        memory = thread.process.memory
        if not memory.sites and not memory.former:
            return False
        self._registers.load(thread.tid)
        addr = self._words[RIP] - 1
        if addr not in memory.sites and addr not in memory.former:
            return False
        return bool(int(procfs.status(thread.tid, "SigPnd")["SigPnd"], 16) & TRAP_BIT)

    def step_aside(self, thread: Thread) -> bool:
        """Does as ``leave_slot`` in a group-stop, from which a thread must not run on: it is as if it stood before the
        instruction, which is not counted again, or after it.

        Returns:
            False where it stands in the middle of a sequence and has to stay in the slot.
        """
        if not thread.process.memory.slots:
            return True
        self._registers.load(thread.tid)
        inside = thread.process.memory.slot_at(self._words[RIP])
        if inside is None:
            return True
        addr, site, slot = inside
        original = slot.starts.get(self._words[RIP] - addr)
        if original is None:
            return False
        self._put_back(thread, original)
        if original[0] == site.addr:
            thread.uncounted = state_of(self._words)
        return True

    def _put_back(self, thread: Thread, original: tuple[int, int]) -> None:
        self._words[RIP] = original[0]
        self._words[RSP] += original[1]
        self._registers.store(thread.tid)

    def _step_out(self, thread: Thread) -> int:
        """Single-steps with signals held back, so that those that are pending stay so, in order and with what they carry."""
        tid = thread.tid
        mask = ptrace.signal_mask(tid)
        ptrace.set_signal_mask(tid, mask | _HELD_BACK)
        try:
            for _ in range(_STEPS):
                ptrace.single_step(tid)
                status = self._wait_for(tid)
                if not os.WIFSTOPPED(status):
                    return status
                self._registers.load(tid)
                inside = thread.process.memory.slot_at(self._words[RIP])
                if inside is None or status >> 16 or os.WSTOPSIG(status) != signal.SIGTRAP:
                    break
            if inside is not None:
                # The instruction faulted, or repeats itself: its state is all in registers, so it can go on from the
                # original.
                addr, site, slot = inside
                original = slot.starts.get(self._words[RIP] - addr)
                if original is not None:
                    self._put_back(thread, original)
                    if status == _STEP_STOP and original[0] == site.addr:
                        thread.uncounted = state_of(self._words)
        finally:
            with contextlib.suppress(ProcessLookupError):
                procfs.tried(lambda: ptrace.set_signal_mask(tid, mask))
        return status

    def _wait_for(self, tid: int) -> int:
        while True:
            got, status = self._waiter.wait(tid)
            if got != 0:
                return status

    def _send(self, thread: Thread, sig: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            ptrace.thread_kill(thread.process.id.pid, thread.tid, sig)
