"""The overhead breaker over the real engine. Its clock is the test's, so what happens does not depend on the machine."""

from __future__ import annotations

import asyncio
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.engines.host import Files, Host, Probe, altered_bytes, untouched
from tests.support import needs
from tests.support.children import TIMEOUT_S, Child
from tests.support.targets import Targets
from trapline.protocol.hits import decode
from trapline_agent.engines.base import ProcessId
from trapline_agent.engines.ptrace.engine import PtraceEngine
from trapline_agent.engines.ptrace.memory import Site
from trapline_agent.tracer import breaker
from trapline_agent.tracer import messages as m
from trapline_agent.tracer.client import TracerClient
from trapline_agent.tracer.guard import Guard

pytestmark = [needs.gcc, needs.ptrace_any, needs.x86_64]

TIGHT = m.Budgets(probe=0.1, process=0, host=0, burst_s=0.005)
"""A few hundred hits are too much: each takes 5 us at the very least (``meters.UNSEEN_NS``)."""
MUCH, LITTLE = "call 2000", "call 1"
NONE = m.Budgets(probe=0, process=0, host=0)


class Watch:
    """A guard over a test's host, whose clock goes only when told to."""

    def __init__(self, host: Host, budgets: m.Budgets = TIGHT) -> None:
        self._host = host
        self._now = 1000.0
        self.guard = Guard(host.table, self._look_at, clock=lambda: self._now, cpu_s=lambda: 0.0)
        self.guard.budgets = budgets

    def _look_at(self, process: ProcessId, done: Callable[[], None]) -> None:
        self._host.looks.run(lambda: [process], "reconcile")
        done()

    def look(self, after_s: float = 0.1) -> None:
        self._now += after_s
        self.guard.look()

    def until(self, true: Callable[[], bool], most_s: float = 300.0) -> float:
        """Looks on until something is so; returns how long that took by the watch."""
        began = self._now
        while not true():
            assert self._now - began < most_s
            self.look()
        return self._now - began


def state(probe: Probe) -> str:
    (target,) = probe.targets
    return target.state


def is_in(child: Child, program: Path) -> bool:
    """Whether a breakpoint is in its code; a displaced copy stays where it is."""
    return any(now == 0xCC for _, now in altered_bytes(child.pid, [program]).values())


def test_s4_what_costs_too_much_is_out_for_a_part_of_the_time(host: Host, targets: Targets) -> None:
    program = targets.build("hot")
    with targets.run("hot", "1") as child, untouched(child.pid):
        probe = host.register(host.files.plan(program, "target_hot"))
        watch = Watch(host)
        child.ask(LITTLE)
        watch.look()
        assert (state(probe), is_in(child, program)) == ("armed", True)
        child.ask(MUCH)
        watch.look()
        (target,) = probe.targets
        assert (target.state, target.reason, is_in(child, program)) == ("throttled", "OverBudget", False)
        assert "may add 10%" in target.message
        # Calls go by unseen, and the process stays followed all the while.
        assert len(host.engine.processes()) == 1
        child.ask(MUCH)
        assert probe.hits == 2001
        watch.until(lambda: is_in(child, program))
        assert state(probe) == "throttled"
        child.ask("call 3")
        assert probe.hits == 2004
        out = host.table.uncovered_ms(probe._consumer)
        assert out > 0
        # It calms down, and is told to be armed again, with what it missed.
        watch.until(lambda: state(probe) == "armed")
        (target,) = probe.targets
        assert (target.reason, target.message, target.may_have_missed) == ("", "", False)
        assert (target.uncovered_ms, host.table.uncovered_ms(probe._consumer)) == (out, out)
        child.ask("call 5")
        assert probe.hits == 2009
        probe.unregister()
        host.engine.close()


def test_s4_a_return_probe_takes_its_return_points_along(host: Host, targets: Targets) -> None:
    program = targets.build("returns")
    with targets.run("returns") as child, untouched(child.pid):
        plan = host.files.plan(program, "target_ret")
        probe = host.register(plan, returns=True, pid=child.pid)
        watch = Watch(host)
        child.ask(LITTLE)
        watch.look()
        traps = sum(site.tally.traps for site in sites_of(host, child))
        assert traps >= 2, "the stop at the return costs too"
        assert len(points_of(host, child)) == 1
        child.ask(MUCH)
        watch.look()
        assert (state(probe), is_in(child, program)) == ("throttled", False)
        assert points_of(host, child) == []
        child.ask(MUCH)
        assert (probe.calls, probe.hits) == (2001, 2001)
        watch.until(lambda: is_in(child, program))
        child.ask("call 3")
        assert (probe.calls, probe.hits, probe.in_flight) == (2004, 2004, 0)
        probe.unregister()
        host.engine.close()


def sites_of(host: Host, child: Child) -> list[Site]:
    """The breakpoints of a process."""
    assert isinstance(host.engine, PtraceEngine)
    return list(host.engine._processes[child.pid].memory.sites.values())


def points_of(host: Host, child: Child) -> list[Site]:
    return [site for site in sites_of(host, child) if site.awaiting]


def test_s4_what_stays_too_much_trips_and_is_tried_again(host: Host, targets: Targets) -> None:
    program = targets.build("hot")
    with targets.run("hot", "1") as child, untouched(child.pid):
        probe = host.register(host.files.plan(program, "target_hot"), pid=child.pid)
        watch = Watch(host)
        pauses = []
        for _ in range(3):
            while state(probe) != "tripped":
                child.ask(MUCH)
                watch.look()
            seen = probe.hits
            child.ask(MUCH)
            assert (probe.hits, is_in(child, program)) == (seen, False)
            assert "tried again" in probe.targets[0].message
            pauses.append(watch.until(lambda: is_in(child, program)))
            assert state(probe) == "throttled"
        assert pauses == [pytest.approx(breaker.FIRST_COOL_DOWN_S * factor, abs=0.2) for factor in (1, 2, 4)]
        watch.until(lambda: state(probe) == "armed")
        probe.unregister()
        host.engine.close()


def test_only_what_is_hot_is_left_out(host: Host, targets: Targets) -> None:
    """Of one probe on two functions, of two probes on one, and of two processes."""
    program = targets.build("hot")
    plans = [host.files.plan(program, name, site) for site, name in enumerate(("target_hot", "target_six"))]
    with targets.run("hot", "1") as child, targets.run("hot", "1") as quiet:
        both = host.register(plans)
        free = host.register(plans[0], probe="free")
        free._consumer.register.overhead = 0.0
        watch = Watch(host)
        child.ask(MUCH)
        watch.look()
        assert both.states() == {"throttled": 1, "armed": 3}
        assert free.states() == {"armed": 2}
        before = both.hits
        child.ask("six")
        quiet.ask("call 10")
        child.ask("call 10")
        assert (both.hits - before, free.hits) == (11, 2020)
        for p in (both, free):
            p.unregister()
        host.engine.close()
        for one in (child, quiet):
            with untouched(one.pid):
                pass


@pytest.mark.parametrize("scope", ["process", "host"])
def test_a_budget_of_process_or_host_is_for_all_probes(host: Host, targets: Targets, scope: str) -> None:
    program = targets.build("hot")
    plans = [host.files.plan(program, name) for name in ("target_hot", "target_six")]
    budgets = {"probe": 0.0, "process": 0.0, "host": 0.0, scope: 0.1}
    with targets.run("hot", "1") as child, untouched(child.pid):
        one = host.register(plans[0], probe="one")
        other = host.register(plans[1], probe="other")
        watch = Watch(host, m.Budgets(**budgets, burst_s=0.005))
        child.ask(MUCH)
        watch.look()
        assert (state(one), state(other)) == ("throttled", "armed")
        # A probe that comes now finds the place taken out, and says so; one that goes takes nothing with it.
        third = host.register(plans[0], probe="third")
        assert (state(third), is_in(child, program)) == ("throttled", True)
        one.unregister()
        watch.until(lambda: state(third) == "armed")
        child.ask("call 7")
        assert (third.hits, one.hits) == (7, 2000)
        third.unregister()
        other.unregister()
        host.engine.close()


def test_what_goes_away_while_it_is_out_is_gone(host: Host, targets: Targets) -> None:
    library = targets.library()
    with targets.run("dl", library) as child, untouched(child.pid):
        probe = host.register(host.files.plan(library, "dlfn"), pid=child.pid)
        watch = Watch(host)
        child.ask("open")
        child.ask(MUCH)
        watch.look()
        assert state(probe) == "throttled"
        child.ask("close")
        watch.until(lambda: state(probe) == "gone")
        probe.unregister()
        host.engine.close()


def test_a_process_that_ends_while_it_is_out_is_gone(host: Host, targets: Targets) -> None:
    program = targets.build("hot")
    with targets.run("hot", "1") as child:
        probe = host.register(host.files.plan(program, "target_hot"))
        watch = Watch(host)
        child.ask(MUCH)
        watch.look()
        assert state(probe) == "throttled"
        child.ask("quit")
        child.wait()
        watch.until(lambda: state(probe) == "gone")
        before = host.table.uncovered_ms(probe._consumer)
        watch.look()
        assert host.table.uncovered_ms(probe._consumer) == before


@pytest.mark.parametrize("kind", ["fork", "vfork", "spawn"])
def test_children_of_what_is_left_out_are_counted(host: Host, targets: Targets, kind: str) -> None:
    program = targets.build("forks")
    with targets.run("forks") as child, untouched(child.pid):
        probe = host.register(host.files.plan(program, "target_forks"), tree=child.pid)
        watch = Watch(host)
        child.ask(MUCH)
        watch.look()
        assert (state(probe), is_in(child, program)) == ("throttled", False)
        for calls in (3, 5):
            before = probe.hits
            child.ask(f"{kind} {calls}")
            # A vfork's child runs in its parent's memory, where the breakpoint is out.
            assert probe.hits - before == (0 if kind == "vfork" else calls)
        watch.until(lambda: is_in(child, program))
        child.ask(f"{kind} 7")
        assert probe.hits - before == (7 if kind == "vfork" else 5 + 7)
        probe.unregister()
        host.engine.close()


def test_another_image_begins_anew(host: Host, targets: Targets) -> None:
    program = targets.build("execs")
    with targets.run("execs") as child, untouched(child.pid):
        probe = host.register(host.files.plan(program, "target_execs"), pid=child.pid)
        watch = Watch(host)
        child.ask(MUCH)
        watch.look()
        assert state(probe) == "throttled"
        child.ask("exec")
        assert probe.states() in ({"gone": 1, "armed": 1}, {"armed": 1})
        child.ask("call 4")
        assert probe.hits == 2004
        watch.look(100.0)
        assert [t.state for t in probe.targets if t.state != "gone"] == ["armed"]
        probe.unregister()
        host.engine.close()


def test_without_budgets_everything_is_counted(host: Host, targets: Targets) -> None:
    program = targets.build("hot")
    with targets.run("hot", "1") as child:
        probe = host.register(host.files.plan(program, "target_hot"))
        watch = Watch(host, NONE)
        for calls in range(1, 6):
            child.ask(MUCH)
            watch.look()
            assert (state(probe), probe.hits) == ("armed", calls * 2000)


# --- in a tracer, by its own clock ------------------------------------------------------------------------------------


class Session:
    """A tracer with one probe on the target's hot function, and what it tells."""

    def __init__(self, budgets: m.Budgets) -> None:
        self._budgets = budgets
        self.rows = 0
        self.stats = m.Stats(probe="p", hits=0)
        self.states: list[str] = []
        self.target: m.TargetState | None = None

    async def __aenter__(self) -> Session:
        self._directory = tempfile.TemporaryDirectory(prefix="trapline-test-")
        path = Path(self._directory.name) / "tracer.sock"
        self._process = Child(
            [sys.executable, "-m", "trapline_agent.tracer", "--socket", str(path)], ready=None, session=True
        )
        self.client = await TracerClient.connect(path, host="h", budgets=self._budgets, process=self._process.popen)
        return self

    async def __aexit__(self, *_: object) -> None:
        try:
            await self.client.shutdown()
            assert self._process.wait() == 0
        finally:
            self._process.kill()
            self._directory.cleanup()

    async def until(self, true: Callable[[], bool]) -> None:
        async with asyncio.timeout(TIMEOUT_S):
            while not true():
                item = await self.client._events.get()
                assert item is not None, "the tracer ended"
                if isinstance(item, bytes):
                    self.rows += decode(item).header.count
                elif isinstance(item, m.Stats):
                    self.stats = item
                elif isinstance(item, m.Targets):
                    (self.target,) = item.targets
                    if self.states[-1:] != [self.target.state]:
                        self.states.append(self.target.state)


async def test_a_hot_loop_gets_its_speed_back(targets: Targets) -> None:
    plan = Files().plan(targets.build("hot"), "target_hot")
    with targets.run("hot", "1") as child, untouched(child.pid):
        async with Session(m.Budgets(burst_s=0.2)) as session:
            await session.client.register("p", generation=1, sites=["s"], plans=[plan])
            child.ask("start")
            await session.until(lambda: "throttled" in session.states)
            await session.until(lambda: session.stats.uncovered_ms > 3000)
            child.ask("stop")
            calls = child.count()["done"]
            await session.client.unregister("p")
            await session.until(lambda: session.stats.hits == session.rows)
            assert session.target is not None
            # A hot loop takes nearly all of a CPU, so a tenth of it is a tenth of the time and a look or two; but on a
            # busy machine it gets a part of a CPU alone, and is in for longer.
            assert session.target.covered < 0.8
            # Seen, it makes some 100,000 calls a second, unseen a thousand times that.
            assert calls > 100 * session.stats.hits > 0


async def test_a_burst_of_100_000_calls_is_exact_by_default(targets: Targets) -> None:
    plan = Files().plan(targets.build("hot"), "target_hot")
    with targets.run("hot", "1") as child, untouched(child.pid):
        async with Session(m.DEFAULT_BUDGETS) as session:
            await session.client.register("p", generation=1, sites=["s"], plans=[plan])
            await asyncio.to_thread(child.ask, "call 100000")
            await session.client.unregister("p")
            await session.until(lambda: session.rows == session.stats.hits == 100_000)
            assert (session.stats.uncovered_ms, session.states) == (0, ["armed"])


async def test_a_probe_s_own_budget_and_none(targets: Targets) -> None:
    plan = Files().plan(targets.build("hot"), "target_hot")
    with targets.run("hot", "1") as child, untouched(child.pid):
        async with Session(m.Budgets(process=0, host=0, burst_s=0.1)) as session:
            await session.client.register("p", generation=1, sites=["s"], plans=[plan], overhead=0.0)
            await asyncio.to_thread(child.ask, "call 60000")
            assert session.states in ([], ["armed"])
            # The same probe under a budget: that is taken from now on.
            await session.client.register("p", generation=2, sites=["s"], plans=[plan], overhead=0.01)
            child.ask("start")
            await session.until(lambda: "throttled" in session.states)
            child.ask("stop")
            await session.client.unregister("p")
