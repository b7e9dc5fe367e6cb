"""What is done where a thread stops with SIGTRAP: a hit of a probe, or a trap that is none.

First the thread leaves the trap, then those who want the hit are told, then it goes on; this is the path whose speed counts.
All methods run on the tracer thread.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import time
from collections.abc import Callable

from trapline.errors import Unsupported
from trapline_agent.arch.x86_64.registers import RIP
from trapline_agent.engines.base import Observer, SiteReport
from trapline_agent.engines.ptrace.arming import Arming
from trapline_agent.engines.ptrace.group import Group
from trapline_agent.engines.ptrace.memory import Site
from trapline_agent.engines.ptrace.pages import Diverted, SlotPages
from trapline_agent.engines.ptrace.resuming import Resumer
from trapline_agent.engines.ptrace.returns import Returns
from trapline_agent.engines.ptrace.stepping import Stepper, state_of
from trapline_agent.engines.ptrace.tracee import Thread, TracedProcess
from trapline_agent.kernel import procfs, ptrace

log = logging.getLogger(__name__)

_AFFINITY_MASK = 63
_SAMPLE_MASK = 15
_MAX_FOREIGN = 1024


class Hits:
    """See the module."""

    def __init__(
        self,
        registers: ptrace.RegisterFile,
        stepper: Stepper,
        pages: SlotPages,
        group: Group,
        arming: Arming,
        resumer: Resumer,
        observer: Observer,
        again: Callable[[int], None],
        serve: Callable[[int, int], object],
    ) -> None:
        """
        Args:
            registers: of the thread that is served.
            stepper: takes a thread out of a trap.
            pages: has slots for the instructions that breakpoints displace.
            group: the processes.
            arming: asked where what is wanted has changed.
            resumer: lets threads go on.
            observer: told of what cannot be served, and of what hits cost.
            again: told the pid of a process that is to be reconciled once more in a while.
            serve: serves (tid, wait status) of another stop that came first.
        """
        self._registers = registers
        self._words = registers.words
        self._stepper = stepper
        self._pages = pages
        self._group = group
        self._arming = arming
        self._resumer = resumer
        self._observer = observer
        self._again = again
        self._serve = serve
        self._returns = Returns(observer, arming.arm, arming.look_again)
        self._cpus = os.sched_getaffinity(0)
        self._cpu = -1

    def trap(self, thread: Thread) -> bool:
        """Serves a SIGTRAP; returns whether it was a hit of a probe that is wanted."""
        ts = time.monotonic_ns()
        tid = thread.tid
        registers, words = self._registers, self._words
        registers.load(tid)
        memory = thread.process.memory
        addr = words[RIP] - 1
        site = memory.sites.get(addr)
        if site is None or registers.signal_code(tid) != ptrace.SI_KERNEL:
            self._foreign_trap(thread, addr)
            return False
        # First of all the ip leaves the trap: whatever happens to us from here on, the thread goes on right.
        if not site.paged or memory.runs_paged(site):
            self._stepper.leave_trap(thread, site)
        elif not self._leave_by_new_slot(thread, site):
            return False
        call = None
        site.tally.traps += 1
        try:
            if thread.uncounted is not None and thread.uncounted == state_of(words):
                thread.uncounted = None
            else:
                if site.awaiting:
                    self._returns.returned(ts, thread, site, words)
                pid, fd = thread.process.id.pid, memory.fd
                for sink in site.sinks:
                    sink(ts, pid, tid, words, fd)
                if site.unwinds:
                    self._returns.unwound(thread, words)
                if site.returns:
                    call = self._returns.entered(ts, thread, site, words)
            if thread.blocked:
                procfs.tried(lambda: self._stepper.block_again(thread))
            if site.is_hook:
                self._arming.reconcile(thread.process, "mmap")
        except Exception:
            # Ours, not the program's: served again, this would look like a SIGTRAP of its own.
            log.exception("a hit of thread %d was not served whole", tid)
        thread.settled = True
        thread.hits += 1
        if call is not None:
            call.entered_ns = time.monotonic_ns()
        self._resumer.resume(thread)
        if not thread.hits & _SAMPLE_MASK:
            self._observer.sampled(site.plan, time.monotonic_ns() - ts)
        if thread.hits & _AFFINITY_MASK == 1:
            self._follow_cpu(thread)
        return not site.is_hook

    def _leave_by_new_slot(self, thread: Thread, site: Site) -> bool:
        """As ``leave_trap`` for a site that has no slot yet, or none any more; takes it out where it can have none. Returns
        False where another stop came first: the thread runs into the breakpoint again, and that counts then."""
        process = thread.process
        if thread.blocked:
            # What is pending because SIGTRAP is blocked is not to be let in meanwhile.
            with contextlib.suppress(OSError):
                self._stepper.block_again(thread)
        try:
            self._pages.provide(thread, site)
        except Diverted as stop:
            if stop.status is None:
                self._resumer.resume(thread)
            else:
                self._serve(thread.tid, stop.status)
            return False
        except Unsupported as e:
            # This one goes on from the instruction itself, and so do those that wait at the breakpoint.
            self._give_up(process, site, e)
        self._group.soil(process.memory)
        try:
            procfs.tried(lambda: self._stepper.leave_trap(thread, site))
        except ProcessLookupError:
            raise
        except OSError:
            self._resumer.resume(thread)  # it stands at the breakpoint
            return False
        return True

    def _give_up(self, process: TracedProcess, site: Site, error: Unsupported) -> None:
        """Takes out a site that was armed and cannot be served after all."""
        # (Of those that share the memory it is the first that sites are told of.)
        process = next(iter(self._group.sharers(process.memory)), process)
        self._arming.lower(process, (site.addr,))
        process.memory.disarm(site)
        self._returns.given_up(process.memory, site, error.reason or error.code)
        process.hooked = process.hooked and not site.is_hook
        self._again(process.id.pid)
        if site.is_hook:
            log.warning("the loader of process %d is not watched: %s", process.id.pid, error)
            return
        report = SiteReport(site.addr, site.plan, "refused", error.reason or error.code, str(error))
        try:
            self._observer.report(process.id, [report], "reconcile")
        except Exception:
            log.exception("it was not told that a site of process %d is refused: %s", process.id.pid, error)

    def _foreign_trap(self, thread: Thread, addr: int) -> None:
        """A SIGTRAP that is no hit: one of ours that was taken out meanwhile, or the program's own (semantics H2)."""
        code = self._registers.signal_code(thread.tid)
        memory = thread.process.memory
        thread.settled = True
        former = memory.former.get(addr) if code == ptrace.SI_KERNEL else None
        if (former is not None and memory.restored(former)) or (
            code == ptrace.SI_KERNEL and self._came_along(thread.process, addr)
        ):
            ptrace.poke_user(thread.tid, 8 * RIP, addr)
            self._resumer.resume(thread)
            return
        self._resumer.deliver(thread, signal.SIGTRAP)

    def _came_along(self, process: TracedProcess, addr: int) -> bool:
        """Whether an unknown breakpoint is one of ours that moved with its code (mremap, which nobody tells of)."""
        memory = process.memory
        if addr in memory.foreign or not memory.has_breakpoint(addr):
            return False
        self._arming.reconcile(next(iter(self._group.sharers(memory)), process), "reconcile")
        if addr in memory.sites or addr in memory.former:
            return True
        if len(memory.foreign) >= _MAX_FOREIGN:
            memory.foreign.clear()
        memory.foreign.add(addr)
        return False

    def _follow_cpu(self, thread: Thread) -> None:
        """Moves to the CPU of the thread that is served: a wake-up across CPUs costs several times the rest of a hit."""
        cpu = thread.cpu()
        if cpu != self._cpu and cpu in self._cpus:
            with contextlib.suppress(OSError):
                os.sched_setaffinity(0, (cpu,))
                self._cpu = cpu
