"""An ``Engine`` over a ``World``: one byte a site, as int3 engines have it, without threads and without the mechanics of
traps."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from trapline.errors import TraplineError, Unsupported
from trapline_agent.engines.base import Capabilities, Counter, Observer, ProcessId, ReturnSink, SiteReport, SiteRequest
from trapline_agent.engines.fake.world import BREAKPOINT, Memory, SimulatedProcess, World
from trapline_agent.engines.frames import ABANDONED, ENDED, EXECED, Frame, Frames, leave, lose
from trapline_agent.plans import SEMAPHORE_BYTES


@dataclass(eq=False)
class _Point:
    request: SiteRequest
    awaiting: set[int] = field(default_factory=set)
    """Addresses of the entries whose calls return here."""


@dataclass(eq=False)
class _Followed:
    id: ProcessId
    process: SimulatedProcess
    sites: dict[int, SiteRequest] = field(default_factory=dict)
    """Of its memory: one dictionary for those that share it."""
    points: dict[int, _Point] = field(default_factory=dict)
    """Where calls return to; of its memory too. One that is a site as well is in both."""
    frames: Frames = field(default_factory=Frames)
    raised: dict[int, Counter] = field(default_factory=dict)
    """Semaphores, by the address of the site that each is raised for; of its memory too."""


class FakeEngine:
    """See the module. Any thread; the world's lock orders everything."""

    name = "fake"
    traps = False
    """See ``Capabilities``."""
    floats = None

    def __init__(self, observer: Observer, world: World | None = None) -> None:
        self.observer = observer
        self.world = world if world is not None else World()
        self.world.watcher = self
        self._followed: dict[int, _Followed] = {}
        self.comms: dict[int, str] = {}
        self.on_reconcile: Callable[[ProcessId], None] = lambda process: None
        """Called first of all in ``reconcile``; a test raises there what is to go wrong."""
        self._memory = os.open("/proc/self/mem", os.O_RDONLY | os.O_CLOEXEC)

    def capabilities(self) -> Capabilities:
        return Capabilities(self.name, True, "simulated processes only", self.traps)

    # --- Engine ------------------------------------------------------------------------------------------------------

    def reconcile(self, process: ProcessId, cause: str) -> None:
        self.on_reconcile(process)
        with self.world.lock:
            found = self.world.processes.get(process.pid)
            if found is not None and found.start_time == process.start_time:
                self._reconcile(found, cause)

    def _reconcile(self, process: SimulatedProcess, cause: str, parent: SimulatedProcess | None = None) -> None:
        identity = _id(process)
        sharers = [f for f in self._followed.values() if f.process.memory is process.memory]
        if sharers and sharers[0].process is not process:
            return  # memory has one answer, that of the first who has it
        try:
            wanted = self.observer.wanted(identity, cause, None if parent is None else _id(parent))
        except ProcessLookupError:
            return
        followed = self._followed.get(process.pid)
        if followed is None:
            if not wanted.sites and not wanted.keep:
                return
            if process.debugger:
                why = f"process {process.pid} is traced by {process.debugger}"
                self.observer.report(
                    identity, [SiteReport(r.addr, r.plan, "refused", "TracedByOther", why) for r in wanted.sites], cause
                )
                return
            followed = self._followed[process.pid] = _Followed(identity, process)
            self.comms[process.pid] = process.comm
        desired = {r.addr: r for r in wanted.sites}
        followed.frames.retain([sink for r in wanted.sites for sink in r.returns])
        for addr, point in list(followed.points.items()):
            point.awaiting &= {r.addr for r in wanted.sites if r.returns}
            if not point.awaiting or not wanted.still_mapped(addr, point.request.plan):
                del followed.points[addr]
                if addr not in followed.sites and wanted.still_mapped(addr, point.request.plan):
                    self.world.write(process.memory, addr, point.request.plan.code[0])
        reports: list[SiteReport] = []
        for addr, counter in list(followed.raised.items()):
            if addr not in desired or desired[addr].semaphore != counter:
                del followed.raised[addr]
                if wanted.holds(counter):
                    self._add(process.memory, counter, -1)
        for addr, site in list(followed.sites.items()):
            request = desired.get(addr)
            if request is not None and (request.plan.file, request.plan.offset) == (site.plan.file, site.plan.offset):
                followed.sites[addr] = request
                if cause == "fork" or (site.sinks, site.returns) != (request.sinks, request.returns):
                    reports.append(SiteReport(addr, site.plan, "armed"))
                continue
            del followed.sites[addr]
            if (
                addr not in followed.points
                and wanted.still_mapped(addr, site.plan)
                and self.world.read(process.memory, addr) == BREAKPOINT
            ):
                self.world.write(process.memory, addr, site.plan.code[0])
            if cause != "fork":
                reports.append(SiteReport(addr, site.plan, "gone"))
        for addr, request in desired.items():
            if request.semaphore is not None and not wanted.holds(request.semaphore):
                why = f"the semaphore at {request.semaphore.addr:#x} is not mapped"
                reports.append(SiteReport(addr, request.plan, "refused", "Semaphore", why))
                continue
            if addr not in followed.sites:
                reports.append(self._arm(followed, addr, request))
            if addr in followed.sites and request.semaphore is not None and addr not in followed.raised:
                followed.raised[addr] = request.semaphore
                self._add(process.memory, request.semaphore, 1)
        if not followed.sites and not wanted.keep:
            del self._followed[process.pid]
        self.observer.report(identity, reports, cause)

    def _add(self, memory: Memory, counter: Counter, change: int) -> None:
        """Adds to a counter, which is modulo 2**16 here."""
        value = sum(self.world.read(memory, counter.addr + i) << 8 * i for i in range(SEMAPHORE_BYTES))
        for i, byte in enumerate(((value + change) % (1 << 8 * SEMAPHORE_BYTES)).to_bytes(SEMAPHORE_BYTES, "little")):
            self.world.write(memory, counter.addr + i, byte)

    def _arm(self, followed: _Followed, addr: int, request: SiteRequest) -> SiteReport:
        if request.refusal is not None:
            return SiteReport(addr, request.plan, "refused", *request.refusal)
        if addr in followed.points:
            followed.sites[addr] = request
            return SiteReport(addr, request.plan, "armed")
        found = self.world.read(followed.process.memory, addr)
        if found != request.plan.code[0]:
            reason = "BreakpointPresent" if found == BREAKPOINT else "TextDiffers"
            return SiteReport(addr, request.plan, "refused", reason, f"{found:#x} is at {addr:#x}")
        self.world.write(followed.process.memory, addr, BREAKPOINT)
        followed.sites[addr] = request
        return SiteReport(addr, request.plan, "armed")

    def awaited(self, process: SimulatedProcess) -> dict[int, set[int]]:
        """Returns the return points of a process, each with the addresses of the entries whose calls return there."""
        with self.world.lock:
            followed = self._followed.get(process.pid)
            return {addr: set(p.awaiting) for addr, p in followed.points.items()} if followed else {}

    def processes(self) -> list[ProcessId]:
        with self.world.lock:
            return [f.id for f in self._followed.values()]

    def close(self) -> None:
        with self.world.lock:
            for followed in list(self._followed.values()):
                followed.frames.retain(())
                for counter in followed.raised.values():
                    self._add(followed.process.memory, counter, -1)
                followed.raised.clear()
                points = {addr: p.request for addr, p in followed.points.items()}
                for addr, site in (followed.sites | points).items():
                    self.world.write(followed.process.memory, addr, site.plan.code[0])
                followed.points.clear()
                del self._followed[followed.id.pid]
                self.observer.exited(followed.id, None)

    # --- Watcher: the world, under its lock --------------------------------------------------------------------------

    def trapped(self, process: SimulatedProcess, addr: int) -> bool:
        followed = self._followed.get(process.pid)
        if followed is None:
            return False
        site = followed.sites.get(addr)
        ts = time.monotonic_ns()
        if addr in followed.points:
            done, gone = followed.frames.pop(process.returned_sp, addr)
            lose(gone, ABANDONED)
            leave(done, ts, process.pid, process.pid, (), self._memory)
        if site is None:
            return addr in followed.points
        for sink in site.sinks:
            sink(ts, process.pid, process.pid, (), self._memory)
        if site.returns:
            self._entered(followed, addr, site.returns)
        return True

    def _entered(self, followed: _Followed, addr: int, returns: Sequence[ReturnSink]) -> None:
        process = followed.process
        held = [(sink, sink.enter((), self._memory)) for sink in returns]
        sp, back = process.stack[-1]
        try:
            self._await(followed, addr, back)
        except TraplineError as e:
            for sink, _ in held:
                sink.lose(e.reason)
            return
        frame = Frame(addr, back, process.pid, process.pid, held, time.monotonic_ns())
        lose(followed.frames.push(sp, frame), ABANDONED)

    def _await(self, followed: _Followed, addr: int, back: int) -> None:
        point = followed.points.get(back)
        if point is None:
            request = self.observer.place(followed.id, back)
            if request.refusal is not None:
                raise Unsupported(request.refusal[1], reason=request.refusal[0])
            if back not in followed.sites:
                if self.world.read(followed.process.memory, back) != request.plan.code[0]:
                    raise Unsupported(f"the code at {back:#x} is not the file's", reason="TextDiffers")
                self.world.write(followed.process.memory, back, BREAKPOINT)
            point = followed.points[back] = _Point(request)
        point.awaiting.add(addr)

    def forked(self, parent: SimulatedProcess, child: SimulatedProcess) -> None:
        followed = self._followed.get(parent.pid)
        if followed is None:
            return
        self.comms[child.pid] = child.comm
        shares = child.memory is parent.memory
        self._followed[child.pid] = (
            _Followed(_id(child), child, followed.sites, followed.points, followed.frames, followed.raised)
            if shares
            else _Followed(
                _id(child),
                child,
                dict(followed.sites),
                {a: _Point(p.request, set(p.awaiting)) for a, p in followed.points.items()},
                followed.frames.copy(),
                dict(followed.raised),
            )
        )
        self._reconcile(child, "fork", parent)

    def execed(self, process: SimulatedProcess, old: Memory) -> None:
        followed = self._followed.get(process.pid)
        if followed is None:
            return
        self.comms[process.pid] = process.comm
        gone = [SiteReport(addr, site.plan, "gone") for addr, site in followed.sites.items()]
        self._left(followed, EXECED)
        followed.sites, followed.points, followed.frames, followed.raised = {}, {}, Frames(), {}
        self.observer.report(followed.id, gone, "exec")
        self._reconcile(process, "exec")

    def mapped(self, process: SimulatedProcess) -> None:
        if process.pid in self._followed:
            self._reconcile(process, "mmap")

    def ended(self, process: SimulatedProcess) -> None:
        followed = self._followed.pop(process.pid, None)
        if followed is not None:
            self._left(followed, ENDED)
            self.observer.exited(followed.id, process.status)

    @staticmethod
    def _left(followed: _Followed, reason: str) -> None:
        lose(followed.frames.drop(lambda frame: frame.pid == followed.id.pid), reason)


def _id(process: SimulatedProcess) -> ProcessId:
    return ProcessId(process.pid, process.start_time)
