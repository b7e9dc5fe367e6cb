"""Gets a stopped thread past its breakpoint, and out of a slot when a signal is to be delivered there (semantics H3, H4).

All methods run on the tracer thread; they may overwrite its register buffer.
"""

from __future__ import annotations

import contextlib
import os
import signal

from trapline_agent.arch.x86_64.registers import EFLAGS, ORIG_RAX, RIP, RSP
from trapline_agent.engines.ptrace.memory import Site
from trapline_agent.engines.ptrace.tracee import Thread
from trapline_agent.kernel import procfs, ptrace

TRAP_BIT = 1 << (signal.SIGTRAP - 1)
_FAULTS = frozenset((signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL))
# A fault that is blocked kills, whatever its handler (kernel/signal.c, force_sig_info_to_task): those are left open.
_HELD_BACK = (2**64 - 1) & ~TRAP_BIT & ~sum(1 << (number - 1) for number in _FAULTS)
_STEP_STOP = signal.SIGTRAP << 8 | 0x7F
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
