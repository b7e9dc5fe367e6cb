"""The coverage log of a probe, as the agent keeps it."""

from __future__ import annotations

from trapline.model import DesiredProbe, Point, PointKind, ProbeSpec
from trapline_agent.reconcile import ProbeRun
from trapline_agent.tracer.messages import CoverageEntry

SPEC = ProbeSpec(text="x:f", object="x", point=Point(kind=PointKind.SYMBOL, value="f"))


def entry(number: int, ended_ns: int = 0, missed: bool = False) -> CoverageEntry:
    return CoverageEntry(
        number=number,
        pid=7,
        start_time=1,
        comm="x",
        site=0,
        path="/x",
        addr=16,
        cause="exec",
        hook="fanotify",
        begun_ns=10**18,
        ended_ns=ended_ns,
        may_have_missed=missed,
    )


def test_an_entry_that_ends_replaces_itself_and_old_ones_are_forgotten_and_counted() -> None:
    run = ProbeRun(DesiredProbe(id="p", spec=SPEC))
    run.update_coverage([entry(0), entry(1, missed=True)], "h")
    run.update_coverage([entry(0, ended_ns=10**18 + 1)], "h")
    first, second = run.coverage.values()
    assert (first.disarmed_at is not None, second.disarmed_at, second.may_have_missed) == (True, None, True)
    run.update_coverage([entry(n) for n in range(2, 1500)], "h")
    assert (len(run.coverage), run.forgotten) == (1000, 500)


def test_a_lost_tracer_ends_what_was_armed_and_the_next_ones_numbers_do_not_collide() -> None:
    run = ProbeRun(DesiredProbe(id="p", spec=SPEC))
    run.update_coverage([entry(0)], "h")
    run.tracer_lost()
    run.update_coverage([entry(0)], "h")
    before, now = run.coverage.values()
    assert (before.disarmed_at is None, now.disarmed_at) == (False, None)


def test_s2_what_a_lost_tracer_had_armed_may_have_been_missed_until_it_is_armed_again() -> None:
    run = ProbeRun(DesiredProbe(id="p", spec=SPEC))
    run.update_coverage([entry(0)], "h")
    assert not run.coverage[0].may_have_missed
    run.tracer_lost()
    run.update_coverage([entry(0)], "h")
    run.update_coverage([entry(0, ended_ns=10**18 + 1), entry(1)], "h")
    before, again, later = run.coverage.values()
    assert (before.may_have_missed, again.may_have_missed, later.may_have_missed) == (False, True, False)
    assert "the tracer that had it armed ended" in again.message
    run.tracer_lost()
    run.tracer_lost()
    run.update_coverage([entry(0)], "h")
    assert run.coverage[3].may_have_missed
