"""Bringing a process to what is wanted in it: what the observer says is compared with what stands in its memory.

All methods run on the tracer thread.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable

from trapline.errors import TraplineError, Unsupported
from trapline_agent.engines.base import Counter, Observer, ProcessId, SiteReport, SiteRequest
from trapline_agent.engines.ptrace.group import SETTLE_S, Group
from trapline_agent.engines.ptrace.memory import Site
from trapline_agent.engines.ptrace.pages import SlotPages
from trapline_agent.engines.ptrace.returns import Returns
from trapline_agent.engines.ptrace.stepping import TRAP_BIT
from trapline_agent.engines.ptrace.tracee import TracedProcess
from trapline_agent.kernel import procfs
from trapline_agent.targets import maps

log = logging.getLogger(__name__)

_STANDING = frozenset(("fork", "exec"))
"""Causes for which the process, of one thread, is stopped while it is looked at: its mappings stay as they are."""


class Arming:
    """See the module."""

    def __init__(self, group: Group, pages: SlotPages, observer: Observer, again: Callable[[int], None]) -> None:
        """
        Args:
            group: the processes.
            pages: says which instructions can have a slot.
            observer: asked and told.
            again: told the pid of a process that is to be reconciled once more in a while.
        """
        self._group = group
        self._pages = pages
        self._observer = observer
        self._again = again

    def reconcile(self, process: TracedProcess, cause: str, parent: ProcessId | None = None) -> None:
        """Has exactly the sites in a process that are wanted there, and reports what became of each.

        Args:
            process: one that has settled, or has bytes of ours already.
            cause: for the report.
            parent: whose child it is, at its birth.
        """
        memory = process.memory
        if self._group.processes.get(process.id.pid) is not process:
            return  # it ended, or was let go, while it settled
        sharers = self._group.sharers(memory)
        if any(sharer.released for sharer in sharers):
            # Some of their threads may be let go already, and would meet alone what is written now.
            self._again(process.id.pid)
            return
        if memory.users > 1 and (first := next(iter(sharers), process)) is not process:
            # What is in their memory is entered with the first of those that share it; a birth changes nothing there.
            if cause != "fork" and first.lives():
                self.reconcile(first, cause)
            return
        try:
            wanted = procfs.tried(lambda: self._observer.wanted(process.id, cause, parent))
        except ProcessLookupError:
            return
        except OSError:
            # /proc does not answer. What nobody wants anywhere can go without it; the rest stays as it is.
            log.exception("process %d cannot be looked at; it is tried again", process.id.pid)
            self._again(process.id.pid)
            wished = {s.addr: s for s in memory.sites.values() if s.returns and self._observer.is_wanted(s.plan)}
            Returns.retain(memory, [sink for s in wished.values() for sink in s.returns], wished)
            for site in list(memory.sites.values()):
                if not site.awaiting and not self._observer.is_wanted(site.plan):
                    self.lower(process, (site.addr,))
                    memory.disarm(site)
                    self._group.soil(memory)
            process.lingering = not memory.sites and not process.held and not process.awaited
            return
        reports: list[SiteReport] = []
        desired = {r.addr: r for r in wanted.sites}
        returning = [sink for r in wanted.sites for sink in r.returns]
        Returns.retain(memory, returning, [r.addr for r in wanted.sites if r.returns])

        def moved(site: Site) -> bool:
            return not wanted.still_mapped(site.addr, site.plan)

        for site in list(memory.sites.values()):
            request = desired.get(site.addr)
            same = (
                request is not None and request.plan.file == site.plan.file and request.plan.offset == site.plan.offset
            )
            if not same or request is None or request.semaphore is None:
                memory.semaphores.lower(site.addr, wanted.holds)
            # What a child has of its parent's was looked at just now.
            if same and request is not None and (cause == "fork" or memory.stands(site)):
                # To a consumer that joins, or leaves this process alone, the site is news too.
                joined = (site.sinks, site.returns) != (request.sinks, request.returns)
                site.sinks, site.returns = request.sinks, request.returns
                site.is_hook, site.unwinds = request.is_hook, request.unwinds
                site.tally = request.tally
                if cause == "fork" or joined:
                    reports.append(SiteReport(site.addr, site.plan, "armed"))
                continue
            if request is None and site.awaiting and not moved(site) and (cause == "fork" or memory.stands(site)):
                # A return point, which no probe has asked for by its address.
                if site.sinks or site.returns:
                    reports.append(SiteReport(site.addr, site.plan, "gone"))
                site.sinks, site.returns, site.is_hook, site.unwinds = (), (), False, False
                continue
            self._group.soil(memory)
            memory.semaphores.lower(site.addr, wanted.holds)
            if not memory.disarm(site, mapped=not moved(site)):
                log.error("the breakpoint at %#x of process %d cannot be taken out yet", site.addr, process.id.pid)
                self._again(process.id.pid)
                continue
            for addr in wanted.places(site.plan) if moved(site) else ():
                if addr not in memory.sites:
                    memory.take_back(site.plan, addr, moved)
            if cause != "fork":
                reports.append(SiteReport(site.addr, site.plan, "gone"))
        for addr in memory.semaphores.raised.keys() - memory.sites.keys():
            memory.semaphores.lower(addr, wanted.holds)  # it went with its mapping
        for request in wanted.sites:
            # To a site that stays a probe with a semaphore may have come.
            if request.semaphore is not None and request.addr in memory.sites:
                try:
                    memory.semaphores.lift(request.addr, request.semaphore, wanted.holds)
                except Unsupported:
                    memory.disarm(memory.sites[request.addr])  # it is refused below
        new = [r for r in wanted.sites if r.addr not in memory.sites]
        objection = self._objection(process) if new else None
        no_pages = self._pages.prospect(process)
        for request in new:
            try:
                if objection is not None:
                    raise objection
                if memory.has_breakpoint(request.addr):
                    memory.take_back(request.plan, request.addr, moved)
                if request.semaphore is not None and request.refusal is None:
                    memory.semaphores.require(request.semaphore, wanted.holds)
                site = self.arm(process, request, no_pages)
                if request.semaphore is not None:
                    try:
                        memory.semaphores.lift(site.addr, request.semaphore, wanted.holds)
                    except Unsupported:
                        memory.disarm(site)
                        raise
                reports.append(SiteReport(request.addr, request.plan, "armed"))
            except TraplineError as e:
                reports.append(SiteReport(request.addr, request.plan, "refused", e.reason or e.code, str(e)))
            except OSError as e:
                reports.append(SiteReport(request.addr, request.plan, "refused", "Unmapped", e.strerror or str(e)))
        if cause in _STANDING:
            memory.settle_written()
        reports += [SiteReport(s.addr, s.plan, "gone") for s in self.look_again(process)]
        process.lingering = not memory.sites and not wanted.keep and not process.held and not process.awaited
        process.hooked = any(s.is_hook for s in memory.sites.values())
        hooks = {r.addr for r in wanted.sites if r.is_hook}
        self._observer.report(process.id, [r for r in reports if r.addr not in hooks], cause)
        if any(r.is_hook and r.addr in memory.sites for r in new):
            # What was mapped after the look, and told of before the hook was there, was seen by neither (semantics R2).
            self.reconcile(process, cause, parent)

    def arm(
        self,
        process: TracedProcess,
        request: SiteRequest,
        no_pages: Callable[[Site], Unsupported | None] | None = None,
    ) -> Site:
        """Arms a site; raises as ``AddressSpace.arm`` does."""
        site = process.memory.arm(request, no_pages or self._pages.prospect(process))
        self._group.soil(process.memory)
        return site

    def look_again(self, process: TracedProcess) -> list[Site]:
        """Takes back what was written where something else was mapped by then: munmap and mremap tell nobody, and may have
        come between the look and the write (semantics R18). Returns the sites that are no more."""
        memory = process.memory
        if not (memory.written or memory.semaphores.written) or self._all_mapped(process):
            memory.settle_written()
            return []
        # The place may be mapped anew at any moment, and what is put there now would be in the midst of that.
        if not self._group.stand_still(memory):
            log.warning("process %d did not stop for what is to be taken back in it", process.id.pid)
        try:
            text = procfs.tried(lambda: maps.read_maps(process.id.pid))
        except OSError:
            return []  # it is gone, or cannot be looked at
        now = maps.parse_maps(text)
        if memory.semaphores.undo_strays(_holds(text)):
            self._again(process.id.pid)
        return memory.undo_strays(lambda addr, plan: maps.is_mapped(now, plan.file, plan.offset, addr), process.id.pid)

    def _all_mapped(self, process: TracedProcess) -> bool:
        try:
            text = procfs.tried(lambda: maps.read_maps(process.id.pid))
        except OSError:
            return False
        now, holds, memory = maps.parse_maps(text), _holds(text), process.memory
        return all(maps.is_mapped(now, s.plan.file, s.plan.offset, s.addr) for _, _, s in memory.written) and all(
            holds(counter) for _, counter, _, _ in memory.semaphores.written
        )

    def lower(self, process: TracedProcess, addrs: Iterable[int]) -> None:
        """Lowers the semaphores of sites that are to be taken out though nobody has said what is mapped. Where /proc does
        not say that either, they stay raised."""
        semaphores = process.memory.semaphores
        raised = [addr for addr in addrs if addr in semaphores.raised]
        if not raised:
            return
        try:
            text = procfs.tried(lambda: maps.read_maps(process.id.pid))
        except OSError:
            text = b""
            log.warning("semaphores of process %d may stay raised: its mappings cannot be read", process.id.pid)
        holds = _holds(text)
        for addr in raised:
            semaphores.lower(addr, holds)

    def _objection(self, process: TracedProcess) -> Unsupported | None:
        """Says why a process may have no breakpoint at all: what it does about SIGTRAP could not be kept (semantics H5).

        An int3 resets the disposition of a SIGTRAP that is ignored, or that is blocked while it is caught, and what it was
        cannot be put back from outside.
        """
        pid = process.id.pid
        for thread in process.threads.values():
            try:
                blocked, ignored, caught = procfs.signal_sets(thread.tid)
            except (ProcessLookupError, KeyError):
                continue
            thread.blocked = blocked if blocked & TRAP_BIT else 0
            if ignored & TRAP_BIT:
                return Unsupported(
                    f"process {pid} ignores SIGTRAP, and a breakpoint would make the kernel forget that",
                    reason="SigtrapIgnored",
                    hint="probe another process of the program, or stop it from ignoring SIGTRAP",
                )
            if thread.blocked and caught & TRAP_BIT:
                return Unsupported(
                    f"process {pid} has a SIGTRAP handler and thread {thread.tid} blocks SIGTRAP: "
                    "a breakpoint would make the kernel forget the handler",
                    reason="SigtrapBlockedAndCaught",
                    hint="probe another process of the program",
                )
        return None

    def let_go_if_idle(self, process: TracedProcess) -> None:
        """For a process whose only thread is stopped: what is left of ours can go at once."""
        if process.lingering and process.memory.users == 1:
            process.memory.wipe_slots()
            process.memory.settle_written()
            process.released = True

    def release_idle(self) -> None:
        """Lets go what nothing is wanted in any more. Raises OSError."""
        for process in list(self._group.processes.values()):
            if not process.lingering or process.released or time.monotonic() < process.retry_at:
                continue
            memory = process.memory
            sharers = self._group.sharers(memory)
            settled = all(self._group.settle(p, again=False) for p in sharers)
            # Settling serves stops: a sharer may have taken on an image of its own meanwhile, or a new one have come.
            now = self._group.sharers(memory)
            if settled and process.lingering and process in now and not memory.sites and set(now) <= set(sharers):
                memory.wipe_slots()
                self.look_again(process)
                for p in now:
                    p.lingering = p.released = True
            elif not settled and not self._group.hurried():
                process.retry_at = time.monotonic() + SETTLE_S  # not where it only gave way to a command


def _holds(text: bytes) -> Callable[[Counter], bool]:
    """As ``Wanted.holds``, by a text of /proc/PID/maps."""
    is_data = maps.data_lookup(text)
    return lambda c: is_data(c.file, c.offset, c.addr)
