"""From desired to observed, against a tracer that is scripted: what it was asked is what is looked at."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

import pytest

from trapline.errors import EngineError, NotFound, TraplineError, Unavailable
from trapline.model import DesiredProbe, Point, PointKind, ProbeLimits, ProbeSpec, TargetState
from trapline_agent.plans import FetchPlan, FileKey, SitePlan
from trapline_agent.reconcile import Reconciler
from trapline_agent.resolve import Plan
from trapline_agent.tracer import messages as t
from trapline_agent.unwind.tables import VDSO, Made, Tables, Wanted

TIMEOUT_S = 10.0


def _plan(*files: int, symbol: str = "f", watch: str = "app") -> Plan:
    """A plan with one site in each of these files, all of one label, numbered from zero as a resolver does."""
    plans = [
        SitePlan(site=0, file=FileKey("00:01", inode), path=f"/{inode}/app", offset=16, code=b"\x90") for inode in files
    ]
    return Plan(sites=[f"app:{symbol}"], plans=plans, where={"comm": "app"}, watch=[watch])


class Resolver:
    """Gives what the test says next, in a worker thread, and tells when it was asked."""

    def __init__(self) -> None:
        self.answer: Plan | TraplineError = _plan(1)
        self.questions: asyncio.Queue[str] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()

    def resolve(self, spec: ProbeSpec) -> Plan:
        self._loop.call_soon_threadsafe(self.questions.put_nowait, spec.text)
        if isinstance(self.answer, TraplineError):
            raise self.answer
        return self.answer

    def loaders(self) -> list[SitePlan]:
        return []


class Tracer:
    """The agent's end of a tracer, scripted."""

    def __init__(self, *held: str) -> None:
        self.ready = SimpleNamespace(probes=list(held), pid=9)
        self.registered: list[tuple[str, dict[str, Any]]] = []
        self.unregistered: list[str] = []
        self.watched: list[list[str]] = []
        self.tables: list[tuple[FileKey, str, bytes]] = []
        self.refuse: list[TraplineError] = []

    async def register(self, probe: str, **plan: Any) -> None:
        if self.refuse:
            raise self.refuse.pop(0)
        self.registered.append((probe, plan))

    async def unregister(self, probe: str) -> None:
        if self.refuse:
            raise self.refuse.pop(0)
        self.unregistered.append(probe)

    def watch(self, names: list[str]) -> None:
        self.watched.append(list(names))

    def set_loaders(self, plans: list[SitePlan]) -> None:
        pass

    def set_frame_table(self, file: FileKey, build_id: str, table: bytes) -> None:
        self.tables.append((file, build_id, table))


class World:
    """A reconciler, its scripted neighbours, and a way to wait until something holds."""

    def __init__(self, tasks: asyncio.TaskGroup, tables: Tables | None = None) -> None:
        self.resolver = Resolver()
        self.tracer = Tracer()
        self._changed = asyncio.Event()
        self.changes: list[str] = []
        self.reconciler = Reconciler(
            host_id="hst_a",
            resolver=self.resolver,
            tasks=tasks,
            changed=self._note,
            resolve_interval_s=3600,
            tables=tables or Tables(),
        )

    def _note(self, probe: str) -> None:
        self.changes.append(probe)
        self._changed.set()

    def up(self, tracer: Tracer | None = None) -> Tracer:
        self.tracer = tracer or Tracer()
        self.reconciler.tracer_up(self.tracer)  # type: ignore[arg-type]
        return self.tracer

    async def until(self, true: Callable[[], object]) -> None:
        """Waits for changes until something is true."""
        async with asyncio.timeout(TIMEOUT_S):
            while not true():
                self._changed.clear()
                await self._changed.wait()

    async def settled(self, probe: str = "prb_a") -> None:
        async with asyncio.timeout(TIMEOUT_S):
            await self.reconciler.probes[probe].settled.wait()


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with asyncio.TaskGroup() as tasks:
        one = World(tasks)
        yield one
        await one.reconciler.remove_all()


def _desired(id: str = "prb_a", generation: int = 1, max_hits: int | None = None) -> DesiredProbe:
    spec = ProbeSpec(text="app:f", object="app", point=Point(kind=PointKind.SYMBOL, value="f"))
    return DesiredProbe(id=id, generation=generation, spec=spec, limits=ProbeLimits(max_hits=max_hits))


def _target(state: str = "armed", pid: int = 5) -> t.TargetState:
    return t.TargetState(pid=pid, start_time=1, comm="app", site=0, path="/1/app", offset=16, addr=0x1010, state=state)


async def test_a_desired_probe_is_registered_and_reported(world: World) -> None:
    tracer = world.up()
    world.reconciler.upsert(_desired())
    await world.settled()
    ((probe, plan),) = tracer.registered
    assert (probe, plan["sites"], plan["where"], plan["max_hits"]) == ("prb_a", ["app:f"], {"comm": "app"}, 0)
    world.reconciler.handle(t.Targets(probe="prb_a", targets=[_target()]))
    world.reconciler.handle(t.Stats(probe="prb_a", hits=7, drops={"ring": 2}, overhead_ns=5.0))
    observed = world.reconciler.observed("prb_a")
    assert observed is not None
    assert (observed.resolved, observed.error, observed.overhead_ns) == (True, None, 5.0)
    assert (observed.counters.hits, observed.counters.dropped, observed.dropped_by_reason) == (7, 2, {"ring": 2})
    (target,) = observed.targets
    assert (target.host, target.pid, target.symbol, target.state) == ("hst_a", 5, "f", TargetState.ARMED)


async def test_a_further_file_is_added_and_no_site_changes_its_number(world: World) -> None:
    tracer = world.up()
    world.resolver.answer = _plan(1, symbol="f")
    world.reconciler.upsert(_desired())
    await world.settled()
    assert tracer.watched[-1] == ["app"]
    world.resolver.answer = Plan(
        sites=["app:g", "app:f"],
        plans=[
            SitePlan(site=0, file=FileKey("00:01", 2), path="/2/app", offset=16, code=b"\x90"),
            SitePlan(site=1, file=FileKey("00:01", 1), path="/1/app", offset=16, code=b"\x90"),
        ],
        watch=["app"],
    )
    world.reconciler.handle(t.Mapped(pid=5, path="/2/app", file=FileKey("00:01", 2)))
    await world.until(lambda: len(tracer.registered) == 2)
    plan = tracer.registered[1][1]
    assert plan["sites"] == ["app:f", "app:g"]
    assert [(p.file.inode, p.site) for p in plan["plans"]] == [(1, 0), (2, 1)]


async def test_a_mapping_of_another_name_changes_nothing(world: World) -> None:
    world.up()
    world.reconciler.upsert(_desired())
    await world.settled()
    assert await world.resolver.questions.get() == "app:f"
    world.reconciler.upsert(_desired("prb_b"))
    await world.settled("prb_b")
    await world.resolver.questions.get()
    assert not world.reconciler.probes["prb_a"].wake.is_set()
    world.reconciler.handle(t.Mapped(pid=5, path="/lib/other.so", file=FileKey("00:01", 2)))
    assert not world.reconciler.probes["prb_a"].wake.is_set()
    world.reconciler.handle(t.Mapped(pid=5, path="/lib/app", file=FileKey("00:01", 2)))
    async with asyncio.timeout(TIMEOUT_S):
        await world.resolver.questions.get()


async def test_a_probe_that_cannot_be_resolved_says_why_until_it_can(world: World) -> None:
    tracer = world.up()
    world.resolver.answer = NotFound("no process maps app", suggestions=["apple"])
    world.reconciler.upsert(_desired())
    await world.settled()
    observed = world.reconciler.observed("prb_a")
    assert observed is not None
    assert observed.error is not None
    assert (observed.error["code"], tracer.registered) == ("not-found", [])
    world.resolver.answer = _plan(1)
    world.reconciler.handle(t.Mapped(pid=5, path="/1/app", file=FileKey("00:01", 1)))
    await world.until(lambda: (o := world.reconciler.observed("prb_a")) and o.error is None)
    assert len(tracer.registered) == 1


async def test_what_was_found_once_stays_when_nobody_maps_it_any_more(world: World) -> None:
    world.up()
    world.reconciler.upsert(_desired())
    await world.settled()
    world.resolver.answer = NotFound("no process maps app")
    world.reconciler.tracer_lost(Unavailable("the tracer ended"))
    second = world.up()
    await world.until(lambda: second.registered)
    await world.until(lambda: (o := world.reconciler.observed("prb_a")) and o.error is None)


async def test_a_lost_tracer_is_an_error_until_there_is_another(world: World) -> None:
    world.up()
    world.reconciler.upsert(_desired(max_hits=10))
    await world.settled()
    world.reconciler.handle(t.Targets(probe="prb_a", targets=[_target()]))
    world.reconciler.handle(t.Stats(probe="prb_a", hits=4))
    world.reconciler.tracer_lost(Unavailable("the tracer ended"))
    observed = world.reconciler.observed("prb_a")
    assert observed is not None
    assert observed.error is not None
    assert (observed.error["code"], observed.targets) == ("unavailable", [])
    second = world.up()
    await world.until(lambda: second.registered)
    assert second.registered[0][1]["max_hits"] == 6


async def test_an_ended_lease_brings_everything_up_again(world: World) -> None:
    tracer = world.up()
    world.reconciler.upsert(_desired())
    await world.settled()
    world.reconciler.probes["prb_a"].settled.clear()
    world.reconciler.handle(t.LeaseEnded())
    await world.settled()
    assert len(tracer.registered) == 2


async def test_a_removed_probe_is_reported_when_it_is_out_and_then_forgotten(world: World) -> None:
    tracer = world.up()
    world.reconciler.upsert(_desired())
    await world.settled()
    tracer.refuse = [EngineError("a thread does not leave")]
    world.reconciler.remove("prb_a")
    await world.until(lambda: (o := world.reconciler.observed("prb_a")) and o.error)
    observed = world.reconciler.observed("prb_a")
    assert observed is not None
    assert not observed.removed
    await world.until(lambda: (o := world.reconciler.observed("prb_a")) and o.removed)
    assert tracer.unregistered == ["prb_a"]
    world.reconciler.forget("prb_a")
    assert world.reconciler.observed("prb_a") is None


async def test_what_a_tracer_held_before_us_goes_when_nobody_wants_it(world: World) -> None:
    tracer = world.up(Tracer("prb_old", "prb_a"))
    world.reconciler.upsert(_desired())
    world.reconciler.keep_only({"prb_a"})
    await world.until(lambda: (o := world.reconciler.observed("prb_old")) and o.removed)
    assert tracer.unregistered == ["prb_old"]


async def test_a_newer_generation_is_registered_an_older_one_is_not(world: World) -> None:
    tracer = world.up()
    world.reconciler.upsert(_desired(generation=2))
    await world.settled()
    world.reconciler.upsert(_desired(generation=1))
    world.reconciler.upsert(_desired(generation=3))
    await world.settled()
    assert [plan["generation"] for _, plan in tracer.registered] == [2, 3]


async def test_a_completed_probe_is_not_brought_up_again(world: World) -> None:
    world.up()
    world.reconciler.upsert(_desired(max_hits=1))
    await world.settled()
    world.reconciler.handle(t.Completed(probe="prb_a"))
    world.reconciler.tracer_lost(Unavailable("the tracer ended"))
    second = world.up()
    world.reconciler.upsert(_desired("prb_b"))
    await world.settled("prb_b")
    assert [probe for probe, _ in second.registered] == ["prb_b"]
    observed = world.reconciler.observed("prb_a")
    assert observed is not None
    assert (observed.completed, observed.error) == (True, None)


async def test_targets_that_are_gone_do_not_pile_up(world: World) -> None:
    world.up()
    world.reconciler.upsert(_desired())
    await world.settled()
    for pid in range(100):
        world.reconciler.handle(t.Targets(probe="prb_a", targets=[_target("gone", pid)]))
    world.reconciler.handle(t.Targets(probe="prb_a", targets=[_target("armed", 1000)]))
    observed = world.reconciler.observed("prb_a")
    assert observed is not None
    assert [target.pid for target in observed.targets] == [*range(68, 100), 1000]


class StackTables(Tables):
    """Tables of files that are all there, of one stamp."""

    def __init__(self) -> None:
        super().__init__()
        self.stamp = (1, 1)
        self.asked: list[str] = []

    def make(self, wanted: Wanted) -> Made | None:
        self.asked.append(wanted.path)
        return Made(self.stamp, "ab", b"table") if wanted.path != "/gone" else None


async def test_unwind_tables_are_told_once_and_again_when_the_file_is_another() -> None:
    tables = StackTables()
    async with asyncio.TaskGroup() as tasks, asyncio.timeout(TIMEOUT_S):
        world = World(tasks, tables)
        tracer = world.up()

        async def ask(inode: int, path: str = "/app") -> None:
            before = len(tables.asked)
            running = asyncio.all_tasks()
            world.reconciler.handle(t.FrameFile(file=FileKey("00:01", inode), path=path, pid=1, start=0, end=1))
            await asyncio.gather(*(asyncio.all_tasks() - running))
            assert len(tables.asked) == before + 1

        await ask(1)
        await ask(1)
        assert tracer.tables == [(FileKey("00:01", 1), "ab", b"table")]
        tables.stamp = (2, 1)
        await ask(1)
        assert len(tracer.tables) == 2
        await ask(2, "/gone")
        assert len(tracer.tables) == 2
        await ask(3)
        assert tracer.tables[2][0] == FileKey("00:01", 3)
        again = world.up()
        await ask(1)
        assert [file for file, _, _ in again.tables] == [FileKey("00:01", 1)]


async def test_the_first_stacks_tables_are_told_before_the_probe_is_registered() -> None:
    tables = StackTables()
    async with asyncio.TaskGroup() as tasks:
        world = World(tasks, tables)
        told: list[int] = []
        world.up()
        register = world.tracer.register

        async def registering(probe: str, **plan: Any) -> None:
            told.append(len(world.tracer.tables))
            await register(probe, **plan)

        world.tracer.register = registering  # type: ignore[method-assign]
        world.resolver.answer = _plan(1, 2)
        spec = ProbeSpec(text="app:f", object="app", point=Point(kind=PointKind.SYMBOL, value="f"))
        world.resolver.answer.fetches.append(FetchPlan("stack", "rip", stack=9))
        world.reconciler.upsert(DesiredProbe(id="prb_a", spec=spec))
        await world.settled()
        assert told == [3]
        assert tables.asked == [VDSO, "/1/app", "/2/app"]
        await world.reconciler.remove_all()
