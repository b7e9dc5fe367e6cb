"""From the desired set of probes to what is observed: one task per probe, between the resolver and a tracer.

Used by the agent, which gets the desired set from a service, and by ``trapline trace``, which has no service.

A probe's task resolves its text to plans, registers them, and looks again: when the tracer is a new one, when a process
maps a file that might be meant (``Mapped``), and every few seconds where the object is a name that further files may
answer to. Plans only ever grow: a site keeps its number, so the hits of a probe mean the same for as long as it lives.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Protocol

import msgspec

from trapline.errors import TraplineError, Unavailable
from trapline.model import (
    Cause,
    Counters,
    CoverageEntry,
    CoverageLog,
    DesiredProbe,
    Point,
    PointKind,
    ProbeKind,
    ProbeSpec,
    Target,
    TargetState,
)
from trapline.protocol.messages import Observed
from trapline_agent.plans import AggregatePlan, FetchPlan, FileKey, SitePlan
from trapline_agent.resolve import Plan, with_columns
from trapline_agent.targets.maps import executable_mappings
from trapline_agent.tracer import messages as t
from trapline_agent.tracer.client import TracerClient
from trapline_agent.unwind.tables import VDSO, Tables

log = logging.getLogger(__name__)

_KEEP_GONE = 32
"""Targets that are gone and still shown; older ones are forgotten, or a busy host's probe would grow for ever."""
_KEEP_COVERAGE = 1000
"""Entries of a probe's coverage log."""
_TRACER_ENDED = "the tracer that had it armed ended; calls until this one armed it again were not counted"
_ERROR_PAUSE_S = 1.0
_PRELOADED = 64
_PRELOAD_S = 3.0
"""Files, and seconds, for unwind tables before a probe with stacks is armed; the others come when they are met."""
_UNKNOWN = ProbeSpec(text="", object="/", point=Point(kind=PointKind.OFFSET))
"""Stands for the text of a probe that is only known to be removed."""


def _moment(ns: int) -> datetime:
    return datetime.fromtimestamp(ns / 1e9, UTC)


class PlanSource(Protocol):
    """What the reconciler needs of ``trapline_agent.resolve.Resolver``; called in a worker thread."""

    def resolve(self, spec: ProbeSpec) -> Plan: ...

    def loaders(self) -> list[SitePlan]: ...


@dataclass
class Registered:
    """A probe's merged plan: what the tracer is told, whole, each time."""

    labels: list[str] = field(default_factory=list)
    plans: dict[tuple[FileKey, int], SitePlan] = field(default_factory=dict)
    fetches: list[FetchPlan] = field(default_factory=list)
    aggregate: AggregatePlan | None = None
    where: dict[str, str] = field(default_factory=dict)
    watch: list[str] = field(default_factory=list)
    """Basenames under which further files that are meant may be mapped."""

    def merge(self, plan: Plan) -> bool:
        """Adds the sites that are new; returns whether there were any. Numbers given once never change, nor do columns.

        Raises:
            Unsupported: what is captured is of other types in files that have come since.
        """
        if self.plans and plan.fetches != self.fetches:
            plan = with_columns(plan, self.fetches)
        grew = False
        for site in plan.plans:
            key = (site.file, site.offset)
            if key in self.plans:
                continue
            label = plan.sites[site.site]
            if label not in self.labels:
                self.labels.append(label)
            self.plans[key] = msgspec.structs.replace(site, site=self.labels.index(label))
            grew = True
        self.fetches, self.where, self.watch = plan.fetches, plan.where, plan.watch
        self.aggregate = plan.aggregate
        return grew


@dataclass
class ProbeRun:
    """One desired probe on this host, and what is known of it."""

    desired: DesiredProbe
    registered: Registered = field(default_factory=Registered)
    tracer: TracerClient | None = None
    """The tracer that holds it; None: it has to be registered (again)."""
    targets: dict[tuple[int, int, int, int], Target] = field(default_factory=dict)
    coverage: dict[int, CoverageEntry] = field(default_factory=dict)
    """The coverage log, by our own numbers, oldest first."""
    forgotten: int = 0
    """Entries of it that are no longer kept."""
    coverage_base: int = 0
    """Our number of the present tracer's first entry."""
    lost: set[tuple[int, int, int]] = field(default_factory=set)
    """What (pid, start time, address) was armed when the last tracer ended, and has not been armed again."""
    stats: t.Stats | None = None
    """The present tracer's counters; they begin at zero with each tracer, as its sequences do."""
    past_hits: int = 0
    """Hits by tracers that are gone: they count towards the probe's limit."""
    resolved: bool = False
    notes: list[str] = field(default_factory=list)
    """What was left out when it was resolved last, in sentences."""
    completed: bool = False
    leaving: bool = False
    gone: bool = False
    error: TraplineError | None = None
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    settled: asyncio.Event = field(default_factory=asyncio.Event)
    """Set once it is registered, or known not to be possible now."""

    @property
    def watched(self) -> Collection[str]:
        """Basenames of files that might be meant; before it is resolved, what its text says."""
        if self.leaving or self.completed:
            return ()
        name = os.path.basename(self.desired.spec.object)
        return self.registered.watch or ((name,) if name and "=" not in name and name != "*" else ())

    @property
    def counters(self) -> Counters:
        """The present tracer's counters; what the outbox dropped is not in them."""
        now = self.stats
        if now is None:
            return Counters()
        return Counters(
            hits=now.hits,
            filtered=now.filtered,
            limited=now.limited,
            uncovered_ms=now.uncovered_ms,
            dropped=sum(now.drops.values()),
            calls=now.calls,
            unreturned=sum(now.unreturned.values()),
        )

    def tracer_lost(self) -> None:
        """The tracer ended, or took everything out: its targets are gone, and its counters will begin at zero again."""
        self.past_hits += self.stats.hits if self.stats else 0
        self.stats = None
        self.targets.clear()
        armed = (e for e in self.coverage.values() if e.addr and e.disarmed_at is None)
        self.lost |= {(e.pid, e.start_time, e.addr) for e in armed}
        self.close_coverage()
        self.tracer = None

    def update_coverage(self, entries: Iterable[t.CoverageEntry], host: str) -> None:
        """Takes what is new in the tracer's log, or has ended."""
        for e in entries:
            label = self.registered.labels[e.site] if e.site < len(self.registered.labels) else ""
            number, place = self.coverage_base + e.number, (e.pid, e.start_time, e.addr)
            again = self.coverage[number].message == _TRACER_ENDED if number in self.coverage else place in self.lost
            self.lost.discard(place)
            self.coverage[number] = CoverageEntry(
                host=host,
                pid=e.pid,
                start_time=e.start_time,
                comm=e.comm,
                module=e.path,
                symbol=label.partition(":")[2] or label,
                addr=e.addr,
                cause=Cause(e.cause),
                hook=e.hook,
                armed_at=_moment(e.begun_ns),
                disarmed_at=_moment(e.ended_ns) if e.ended_ns else None,
                may_have_missed=e.may_have_missed or again,
                message=e.message or (_TRACER_ENDED if again else ""),
            )
        while len(self.coverage) > _KEEP_COVERAGE:
            del self.coverage[next(iter(self.coverage))]
            self.forgotten += 1

    def close_coverage(self) -> None:
        """Nothing is armed any more, and another tracer's log begins at 0 again."""
        now = datetime.now(UTC)
        for entry in self.coverage.values():
            entry.disarmed_at = entry.disarmed_at or now
        self.coverage_base = max(self.coverage, default=-1) + 1

    def update_targets(self, states: Iterable[t.TargetState], host: str) -> None:
        for s in states:
            label = self.registered.labels[s.site] if s.site < len(self.registered.labels) else ""
            self.targets.pop((s.pid, s.start_time, s.site, s.addr), None)
            self.targets[(s.pid, s.start_time, s.site, s.addr)] = Target(
                host=host,
                pid=s.pid,
                start_time=s.start_time,
                comm=s.comm,
                module=s.path,
                symbol=label.partition(":")[2] or label,
                offset=s.offset,
                addr=s.addr,
                state=TargetState(s.state),
                engine="ptrace",
                cause=Cause(s.cause),
                hook=s.hook,
                since=_moment(s.since_ns) if s.since_ns else None,
                may_have_missed=s.may_have_missed,
                reason=s.reason,
                message=s.message,
                covered=s.covered,
                uncovered_ms=s.uncovered_ms,
            )
        gone = [key for key, target in self.targets.items() if target.state is TargetState.GONE]
        for key in gone[:-_KEEP_GONE]:
            del self.targets[key]


class Reconciler:
    """Keeps a tracer's probes equal to the desired set. All methods belong to one event loop.

    It survives its tracer: after ``tracer_lost`` the desired set is remembered, and ``tracer_up`` brings it up again.
    """

    def __init__(
        self,
        *,
        host_id: str,
        resolver: PlanSource,
        tasks: asyncio.TaskGroup,
        changed: Callable[[str], None],
        resolve_interval_s: float = 5.0,
        tables: Tables | None = None,
    ) -> None:
        """
        Args:
            host_id: the host's id, for targets.
            resolver: makes plans of probe texts.
            tasks: the group that the probes' tasks run in.
            changed: called with a probe's id when ``observed`` would say something new of it.
            resolve_interval_s: seconds between two looks for further files.
            tables: makes unwind tables.
        """
        self._host_id = host_id
        self._resolver = resolver
        self._tasks = tasks
        self._changed = changed
        self._interval_s = resolve_interval_s
        self._tracer: TracerClient | None = None
        self._held: set[str] = set()
        """What a joined tracer held already, until the desired set says whether it is still wanted."""
        self._watching: list[str] = []
        self._tables = Tables() if tables is None else tables
        self._told: dict[FileKey, tuple[int, int]] = {}
        """Stamps of the files whose unwind tables the tracer has."""
        self._running: dict[str, asyncio.Task[None]] = {}
        self.probes: dict[str, ProbeRun] = {}

    # --- what is desired ----------------------------------------------------------------------------------------------

    def upsert(self, desired: DesiredProbe) -> ProbeRun:
        """Wants a probe, or a newer generation of it."""
        run = self.probes.get(desired.id)
        if run is None or run.leaving:
            # A probe that is wanted again while it leaves starts afresh when it has left.
            before = self._running.get(desired.id)
            run = ProbeRun(desired)
            self.probes[desired.id] = run
            self._start(run, before)
        elif desired.generation > run.desired.generation:
            run.desired = desired
            run.tracer = None
            run.settled.clear()
            run.wake.set()
        self._watch()
        return run

    def remove(self, probe: str) -> None:
        """Wants a probe no more; ``observed`` says ``removed`` once its bytes are out. An unknown one is taken out too:
        a tracer may hold it from before this agent started."""
        run = self.probes.get(probe)
        if run is None:
            run = ProbeRun(DesiredProbe(id=probe, generation=0, spec=_UNKNOWN), leaving=True)
            self.probes[probe] = run
            self._start(run, None)
        run.leaving = True
        run.wake.set()
        self._watch()

    def keep_only(self, probes: set[str]) -> None:
        """The desired set is whole: whatever else is known here or in the tracer is to go."""
        for probe in (set(self.probes) | self._held) - probes:
            self.remove(probe)
        self._held.clear()

    async def remove_all(self) -> None:
        """Takes every probe out; returns when it is done."""
        running = list(self._running.values())
        for probe in list(self.probes):
            self.remove(probe)
        await asyncio.gather(*running, return_exceptions=True)

    def _start(self, run: ProbeRun, before: asyncio.Task[None] | None) -> None:
        task = self._tasks.create_task(self._keep(run, before), name=f"probe-{run.desired.id}")
        self._running[run.desired.id] = task

    # --- what the tracer says -----------------------------------------------------------------------------------------

    def tracer_up(self, tracer: TracerClient) -> None:
        """A tracer is there: everything desired is registered with it."""
        self._tracer, self._held = tracer, set(tracer.ready.probes)
        self._told.clear()
        self._watching = []
        self._tasks.create_task(self._tell_loaders(tracer), name="loaders")
        self._watch()
        for run in self.probes.values():
            run.wake.set()

    async def _tell_loaders(self, tracer: TracerClient) -> None:
        plans = await asyncio.to_thread(self._resolver.loaders)
        if tracer is self._tracer:
            tracer.set_loaders(plans)

    def tracer_lost(self, why: TraplineError) -> None:
        """The tracer ended; every probe says so until another one is there."""
        self._tracer = None
        for run in self.probes.values():
            run.tracer_lost()
            if not run.completed:
                run.error = why
            run.wake.set()
            self._changed(run.desired.id)

    async def _tell_table(self, tracer: TracerClient, wanted: t.FrameFile) -> None:
        """Makes an unwind table, and hands it over if the tracer does not have it."""
        made = await asyncio.to_thread(self._tables.make, wanted)
        if made is None or tracer is not self._tracer or self._told.get(wanted.file) == made.stamp:
            return
        self._told[wanted.file] = made.stamp
        with contextlib.suppress(ConnectionError):
            tracer.set_frame_table(wanted.file, made.build_id, made.data)

    async def _preload(self, tracer: TracerClient, run: ProbeRun) -> None:
        """Hands over the unwind tables that the first stacks are likely to need: a program that has just begun does not
        wait until its files' are made."""
        plans = [*await asyncio.to_thread(self._resolver.loaders), *run.registered.plans.values()]
        found = {p.file: t.FrameFile(file=p.file, path=p.path, pid=os.getpid(), start=0, end=0) for p in plans}
        pid = run.registered.where.get("pid") or run.registered.where.get("tree", "")
        if pid.isdecimal():
            with contextlib.suppress(OSError):
                for m in executable_mappings(int(pid)):
                    found[m.file] = t.FrameFile(file=m.file, path=m.path, pid=int(pid), start=m.start, end=m.end)
        wanted = [
            t.FrameFile(file=FileKey("", 0), path=VDSO, pid=0, start=0, end=0),
            *list(found.values())[:_PRELOADED],
        ]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_PRELOAD_S):
                for file in wanted:
                    await self._tell_table(tracer, file)

    def handle(
        self, event: t.FrameFile | t.Targets | t.Covered | t.Stats | t.Completed | t.Mapped | t.LeaseEnded | t.Exited
    ) -> None:
        """Takes what the tracer reported unasked."""
        if isinstance(event, t.Mapped):
            name = os.path.basename(event.path)
            for run in self.probes.values():
                if name in run.watched:
                    run.wake.set()
        elif isinstance(event, t.FrameFile):
            if self._tracer is not None:
                self._tasks.create_task(self._tell_table(self._tracer, event), name="unwind-table")
        elif isinstance(event, t.LeaseEnded):
            # We were too slow to renew, and everything is out: bring it all up again.
            log.warning("the tracer's lease ended: registering every probe again")
            for run in self.probes.values():
                run.tracer_lost()
                run.wake.set()
        elif isinstance(event, t.Covered):
            if (covered := self.probes.get(event.probe)) is not None:
                covered.update_coverage(event.entries, self._host_id)
        elif isinstance(event, t.Targets | t.Stats | t.Completed) and (known := self.probes.get(event.probe)):
            if isinstance(event, t.Targets):
                known.update_targets(event.targets, self._host_id)
            elif isinstance(event, t.Stats):
                known.stats = event
            else:
                known.completed = True
            self._changed(event.probe)

    def _watch(self) -> None:
        names = sorted({name for run in self.probes.values() for name in run.watched})
        if self._tracer is not None and names != self._watching:
            self._watching = names
            self._tracer.watch(names)

    # --- what is observed ---------------------------------------------------------------------------------------------

    def observed(self, probe: str) -> Observed | None:
        """Returns a probe's report, or None when it was reported removed and forgotten."""
        run = self.probes.get(probe)
        if run is None:
            return None
        return Observed(
            probe=probe,
            generation=run.desired.generation,
            resolved=run.resolved,
            removed=run.gone,
            completed=run.completed,
            targets=list(run.targets.values()),
            counters=run.counters,
            dropped_by_reason=dict(run.stats.drops) if run.stats else {},
            unreturned_by_reason=dict(run.stats.unreturned) if run.stats else {},
            overhead_ns=(run.stats.overhead_ns or None) if run.stats else None,
            error=run.error.to_wire() if run.error else None,
        )

    def coverage(self, probe: str) -> CoverageLog:
        """Returns a probe's coverage log; empty where it is not known here."""
        run = self.probes.get(probe)
        if run is None:
            return CoverageLog(host=self._host_id)
        return CoverageLog(host=self._host_id, entries=list(run.coverage.values()), forgotten=run.forgotten)

    def forget(self, probe: str) -> None:
        """Forgets a probe whose removal was reported."""
        run = self.probes.get(probe)
        if run is not None and run.gone:
            del self.probes[probe]

    # --- one probe's task ---------------------------------------------------------------------------------------------

    async def _keep(self, run: ProbeRun, before: asyncio.Task[None] | None) -> None:
        if before is not None:
            await asyncio.wait([before])
        while not run.leaving:
            run.wake.clear()
            if not run.completed:
                await self._bring_up(run)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._interval_s):
                    await run.wake.wait()
        while True:
            if await self._take_out(run):
                break
            await asyncio.sleep(_ERROR_PAUSE_S)
        run.gone = True
        if self._running.get(run.desired.id) is asyncio.current_task():
            del self._running[run.desired.id]
        if self.probes.get(run.desired.id) is run:
            self._changed(run.desired.id)

    async def _bring_up(self, run: ProbeRun) -> None:
        tracer = self._tracer
        if tracer is None:
            return
        desired, before = run.desired, run.error
        error: TraplineError | None = None
        try:
            plan = await asyncio.to_thread(self._resolver.resolve, desired.spec)
            grew = run.registered.merge(plan)
            run.notes = plan.left_out()
            self._watch()
        except TraplineError as e:
            # What was found once stays: that nobody maps the file just now is not an error of the probe.
            grew = False
            if not run.registered.plans:
                error = e
        news = grew or not run.resolved
        if error is None and (grew or run.tracer is not tracer) and not run.leaving:
            error = await self._register(run, tracer, desired)
        if tracer is self._tracer and desired is run.desired:
            run.error, run.resolved = error, True
            run.settled.set()
            if news or (error and error.to_wire()) != (before and before.to_wire()):
                self._changed(desired.id)

    async def _register(self, run: ProbeRun, tracer: TracerClient, desired: DesiredProbe) -> TraplineError | None:
        if any(fetch.column == "stack" for fetch in run.registered.fetches):
            await self._preload(tracer, run)
        max_hits = desired.limits.max_hits or 0
        if max_hits and run.past_hits and desired.id not in tracer.ready.probes:
            # A tracer that has it still counts on from where it was.
            max_hits = max(1, max_hits - run.past_hits)
        try:
            await tracer.register(
                desired.id,
                generation=desired.generation,
                sites=run.registered.labels,
                plans=list(run.registered.plans.values()),
                fetches=run.registered.fetches,
                where=run.registered.where,
                max_hits=max_hits,
                overhead=0.0 if desired.limits.overhead == "off" else desired.limits.overhead,
                returns=desired.spec.kind is ProbeKind.RETURN,
                aggregate=run.registered.aggregate,
            )
        except TraplineError as e:
            return e
        except ConnectionError as e:
            return Unavailable(f"the tracer is gone: {e}")
        run.tracer = tracer
        return None

    async def _take_out(self, run: ProbeRun) -> bool:
        tracer = self._tracer
        if tracer is None:
            return True
        try:
            await tracer.unregister(run.desired.id)
        except Unavailable:
            return True
        except ConnectionError:
            return True
        except TraplineError as e:
            log.error("probe %s could not be taken out: %s", run.desired.id, e)
            run.error = e
            self._changed(run.desired.id)
            return False
        return True
