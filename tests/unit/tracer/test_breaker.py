"""The overhead breaker's arithmetic: what it promises, whatever the programs do."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trapline_agent.engines.base import ProcessId
from trapline_agent.engines.ring import HitRing
from trapline_agent.plans import FileKey
from trapline_agent.tracer.breaker import (
    FIRST_COOL_DOWN_S,
    MAX_COOL_DOWN_S,
    MAX_CUTS,
    RESUME,
    Breaker,
    Fuse,
    Load,
    Point,
    State,
    Verdicts,
)
from trapline_agent.tracer.guard import Guard
from trapline_agent.tracer.messages import DEFAULT_BUDGETS, Budgets, Register
from trapline_agent.tracer.outages import Outages
from trapline_agent.tracer.table import Table

DT = 0.1
FILE = FileKey("fd:01", 1)
HIT_S = 10.5e-6
"""What a hit costs (benchmarks/README.md)."""


def point(number: int, pid: int = 1) -> Point:
    return Point(ProcessId(pid, 1), number, FILE, number)


class Run:
    """A fuse, and points that ask for so many seconds a second; they get them unless they are cut."""

    def __init__(self, share: float, burst_s: float) -> None:
        self.fuse = Fuse(share, burst_s)
        self.now = 0.0
        self.spent: list[float] = []
        """In each step."""
        self.states: list[State] = []

    def step(self, demands: Sequence[float]) -> None:
        self.now += DT
        spent = {point(i): d * DT for i, d in enumerate(demands) if d and point(i) not in self.fuse.cut}
        self.fuse.step(self.now, DT, spent)
        self.spent.append(sum(spent.values()))
        self.states.append(self.fuse.state)

    def run(self, seconds: float, *demands: float) -> None:
        for _ in range(round(seconds / DT)):
            self.step(demands)

    @property
    def changes(self) -> list[State]:
        return [state for state, _ in itertools.groupby(self.states)]


# A program's threads share one tracer thread, and all of them the interpreter: together they cannot ask for more.
_demand = st.sampled_from([0.0, 0.0, 0.001, 0.02, 0.09, 0.11, 0.3, 0.95])
_phases = st.lists(st.tuples(st.integers(1, 400), st.lists(_demand, min_size=3, max_size=3)), max_size=12)


@settings(deadline=None)
@given(st.sampled_from([0.01, 0.1, 0.25, 1.0]), st.sampled_from([0.1, 1.0, 3.0]), _phases)
def test_no_more_than_the_budget_is_spent_in_any_time(
    share: float, burst_s: float, phases: list[tuple[int, list[float]]]
) -> None:
    run = Run(share, burst_s)
    for steps, demands in phases:
        for _ in range(steps):
            run.step(demands)
    # A point that becomes hot is noticed one step later; each phase may bring as many as there are.
    late = max((sum(d) * DT for _, d in phases), default=0.0) * 3
    sums = list(itertools.accumulate(run.spent, initial=0.0))
    # The most that was spent beyond the share in any window, whichever way it is cut out.
    least = worst = 0.0
    for i, total in enumerate(sums):
        beyond = total - share * DT * i
        least = min(least, beyond)
        worst = max(worst, beyond - least)
    assert worst <= burst_s + late + 1e-9


@settings(deadline=None)
@given(_phases)
def test_it_does_not_flap(phases: list[tuple[int, list[float]]]) -> None:
    run = Run(0.1, 3.0)
    for steps, demands in phases:
        for _ in range(steps):
            run.step(demands)
    began = [i for i in range(1, len(run.states)) if run.states[i] is not run.states[i - 1]]
    spans = [(run.states[a], (b - a) * DT) for a, b in itertools.pairwise(began)]
    for state, seconds in spans:
        if state is State.ARMED:
            # What was saved up has to be spent first, and nobody can spend faster than three times a CPU.
            assert seconds >= RESUME * 3.0 / 3
        elif state is State.TRIPPED:
            assert seconds >= FIRST_COOL_DOWN_S - DT
    throttled = sum(seconds for state, seconds in spans if state is State.THROTTLED)
    rearmed = sum(1 for a, b in itertools.pairwise(run.changes) if (a, b) == (State.THROTTLED, State.ARMED))
    assert rearmed * (RESUME * 3.0 - 0.1) / 0.1 <= throttled + len(run.states) * DT


@settings(deadline=None)
@given(st.integers(1, 200_000), st.floats(1.0, 20.0))
def test_a_burst_that_fits_costs_no_hit(hits: int, seconds: float) -> None:
    run = Run(DEFAULT_BUDGETS.probe, DEFAULT_BUDGETS.burst_s)
    run.run(seconds, hits * HIT_S / seconds)
    run.run(10, 0.0)
    assert run.changes == [State.ARMED]


@settings(deadline=None)
@given(st.floats(0.0, 0.0999))
def test_what_stays_within_its_budget_is_never_cut(demand: float) -> None:
    run = Run(0.1, 0.1)
    run.run(50, demand)
    assert run.changes == [State.ARMED]


def test_a_hot_function_is_throttled_then_tripped_then_tried_again() -> None:
    run = Run(0.1, 3.0)
    run.run(10, 50_000 * HIT_S)
    assert run.changes == [State.ARMED, State.THROTTLED]
    throttled = run.states.index(State.THROTTLED)
    # 50,000 hits/s take half of a CPU's time: a fifth of it is seen, some tenths of a second at a time.
    assert sum(run.spent[throttled + 5 :]) == pytest.approx(0.1 * (len(run.spent) - throttled - 5) * DT, rel=0.3)
    run.run(3600, 50_000 * HIT_S)
    assert run.changes == [State.ARMED, *(State.THROTTLED, State.TRIPPED) * (len(run.changes) // 2)][: len(run.changes)]
    pauses = [len(list(group)) * DT for state, group in itertools.groupby(run.states) if state is State.TRIPPED]
    assert pauses[:5] == [pytest.approx(FIRST_COOL_DOWN_S * 2**n, abs=2 * DT) for n in range(5)]
    assert max(pauses) <= MAX_COOL_DOWN_S + 2 * DT
    # It calms down, and all is as before: the next time begins with the shortest pause.
    run.run(700, 0.0)
    assert run.changes[-1] is State.ARMED
    while run.fuse.state is not State.TRIPPED:
        run.step([0.9])
    assert run.changes[-3:] == [State.ARMED, State.THROTTLED, State.TRIPPED]
    assert run.fuse.out_s == FIRST_COOL_DOWN_S


def test_a_probe_is_not_tripped_before_it_was_cut_often() -> None:
    run = Run(0.1, 3.0)
    while run.fuse.state is not State.TRIPPED:
        run.step([0.95])
    turns = [group for spent, group in itertools.groupby(run.spent, key=bool) if spent]
    assert len(turns) == MAX_CUTS + 1


def test_only_the_heaviest_are_cut() -> None:
    run = Run(0.1, 1.0)
    run.run(30, 0.9, 0.01, 0.02)
    assert run.fuse.blamed == {point(0)}
    run.run(30, 0.9, 0.2, 0.02)
    assert run.fuse.blamed == {point(0), point(1)}


def test_what_costs_nothing_now_cannot_be_blamed() -> None:
    run = Run(0.1, 1.0)
    run.fuse.step(5.0, 5.0, {point(0): 4.0})  # nobody looked for a while
    assert run.fuse.state is State.THROTTLED
    calm = Run(0.1, 1.0)
    calm.fuse.level = -0.1
    calm.step([0.01])
    assert (calm.fuse.state, calm.fuse.cut) == (State.ARMED, frozenset())


# --- all fuses together -----------------------------------------------------------------------------------------------


def spend(
    breaker: Breaker, seconds: float, shares: dict[str, float | None], *loads: Load, cpu: float = 0.0
) -> Verdicts:
    verdicts = Verdicts()
    for _ in range(round(seconds / DT)):
        now = breaker._now + DT
        running = [load for load in loads if not all((v := verdicts.of(load.point, p)) and v.out for p in load.probes)]
        verdicts = breaker.step(now, [load._replace(seconds=load.seconds * DT) for load in running], shares, cpu * DT)
    return verdicts


def judged(verdicts: Verdicts, *asked: tuple[Point, str]) -> list[str]:
    found = [verdicts.of(p, probe) for p, probe in asked]
    return [v.state.text if v else "armed" for v in found]


def test_budgets_are_of_probe_process_and_host() -> None:
    a, b, c = point(1), point(2), point(1, pid=2)
    asked = [(a, "p"), (b, "q"), (c, "p")]
    # A probe's budget is for all its processes, and for it alone.
    own = Breaker(0.0, Budgets(probe=0.1, process=0, host=0, burst_s=1))
    loads = [Load(a, ("p",), 0.08), Load(b, ("q",), 0.04), Load(c, ("p",), 0.04)]
    verdicts = spend(own, 60, {"p": None, "q": None}, *loads)
    assert judged(verdicts, *asked) == ["throttled", "armed", "armed"]
    spend(own, 60, {"p": None, "q": None}, loads[0], loads[1])  # without the third it fits
    assert judged(own.step(own._now, [], {"p": None, "q": None}), *asked) == ["armed"] * 3
    # A process' is for all its probes.
    process = Breaker(0.0, Budgets(probe=0, process=0.1, host=0, burst_s=1))
    verdicts = spend(process, 60, {"p": None, "q": None}, *loads)
    assert judged(verdicts, *asked) == ["throttled", "armed", "armed"]
    # The host's is for all, with the tracer's own work.
    host = Breaker(0.0, Budgets(probe=0, process=0, host=0.3, burst_s=1))
    assert judged(spend(host, 60, {"p": None, "q": None}, *loads), *asked) == ["armed"] * 3
    assert "throttled" in judged(spend(host, 60, {"p": None, "q": None}, *loads, cpu=0.5), *asked)
    # Work that is not for hits is nobody's fault.
    idle = Breaker(0.0, Budgets(probe=0, process=0, host=0.3, burst_s=1))
    assert not spend(idle, 60, {"p": None}, Load(a, ("p",), 0.1), cpu=5.0)


def test_a_probe_may_have_a_budget_of_its_own_or_none() -> None:
    a, b, c = point(1), point(2), point(3)
    loads = [Load(a, ("p",), 0.5), Load(b, ("q",), 0.5), Load(c, ("r",), 0.5)]
    breaker = Breaker(0.0, Budgets(probe=0.1, process=0, host=0, burst_s=1))
    verdicts = spend(breaker, 20, {"p": None, "q": 0.9, "r": 0.0}, *loads)
    assert judged(verdicts, (a, "p"), (b, "q"), (c, "r")) == ["throttled", "armed", "armed"]


def test_a_probe_that_is_gone_is_forgotten_and_a_process_too() -> None:
    a = point(1)
    breaker = Breaker(0.0, Budgets(probe=0.1, process=0.1, host=0.1, burst_s=1))
    assert spend(breaker, 10, {"p": None}, Load(a, ("p",), 0.9))
    breaker.forget(a.process)
    assert not breaker.step(11.0, [], {"p": None})
    assert not breaker.step(12.0, [], {})
    assert breaker._probes == {}
    spend(breaker, 100, {})
    assert not breaker.pressed


def test_verdicts_of_several_budgets_are_the_graver_of_them() -> None:
    a = point(1)
    breaker = Breaker(0.0, Budgets(probe=0.05, process=0.1, host=0, burst_s=1))
    verdicts = spend(breaker, 300, {"p": None}, Load(a, ("p", "q"), 0.9))
    assert judged(verdicts, (a, "p")) == ["tripped"]
    ours, theirs = verdicts.own[a, "p"], verdicts.common[a]
    both = verdicts.of(a, "p")
    assert both is not None
    assert (both.state, both.out) == (max(ours.state, theirs.state), ours.out or theirs.out)
    assert verdicts.without("p").of(a, "p") == verdicts.common.get(a)
    assert verdicts.differ(Verdicts()) == {a.process}
    assert verdicts.differ(verdicts) == set()


def _nobody(process: ProcessId, done: Callable[[], None]) -> None:
    raise AssertionError(f"{process} is nobody's")


def test_a_look_that_fails_is_not_repeated_at_once() -> None:
    table = Table()
    table.publish(Register(id=1, probe="p", generation=1, sites=[], plans=[]), HitRing)
    guard = Guard(table, _nobody, clock=lambda: 50.0, cpu_s=lambda: 0.0)
    assert guard.due <= 50.0
    table.meters.take = lambda: 1 / 0  # type: ignore[method-assign,assignment,return-value]
    with pytest.raises(ZeroDivisionError):
        guard.look()
    assert guard.due > 50.0
    table.withdraw("p")
    assert guard.due == math.inf


# --- how long a target was out ----------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["out", "in", "begin"]), st.integers(1, 1000)), max_size=40))
def test_the_time_that_was_not_covered_is_what_it_was_out(events: list[tuple[str, int]]) -> None:
    outages, key = Outages(), (1, 2, 3, 4)
    now = out = state_out = state_began = 0
    is_out = False
    outages.mark(key, out=False, since_ns=0)
    for what, passes in events:
        now += passes
        out, state_out = out + is_out * passes, state_out + is_out * passes
        assert outages.uncovered_ns(key, now) == outages.total_ns(now) == out
        assert outages.covered(key, now) == pytest.approx(1 - state_out / (now - state_began))
        if what == "begin":
            outages.begin(key, now)
            state_began, state_out = now, 0
        else:
            is_out = what == "out"
            outages.mark(key, out=is_out, since_ns=now)
    outages.end(key, now)
    assert (outages.total_ns(now + 5), key in outages, outages.covered(key, now)) == (out, False, 1.0)
