"""A probe's phase, for what its hosts say."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from tests.unit.service.peers import target
from trapline.errors import NotFound, Unsupported
from trapline.model import Counters, Phase, ProbeStatus, TargetState
from trapline.protocol.messages import Observed
from trapline_service.status import conditions_of, coverage_of, overhead_of, phase_of, status_of

ARMED, REFUSED, GONE = TargetState.ARMED, TargetState.REFUSED, TargetState.GONE
THROTTLED, TRIPPED = TargetState.THROTTLED, TargetState.TRIPPED
RESOLVING = Observed(probe="p", generation=1)
NOT_THERE = Observed(probe="p", generation=1, resolved=True, error=NotFound("no app here").to_wire())
BROKEN = Observed(probe="p", generation=1, resolved=True, error=Unsupported("cannot").to_wire())


def report(*states: TargetState) -> Observed:
    return Observed(probe="p", generation=1, resolved=True, targets=[target(state=s, reason="R") for s in states])


@pytest.mark.parametrize(
    ("online", "reports", "phase"),
    [
        ("", [], Phase.PENDING),
        ("", [report(ARMED)], Phase.PENDING),
        ("a", [], Phase.RESOLVING),
        ("a", [RESOLVING], Phase.RESOLVING),
        ("a", [report()], Phase.NO_TARGETS),
        ("a", [report(GONE)], Phase.NO_TARGETS),
        ("a", [report(ARMED, GONE)], Phase.ARMED),
        ("a", [report(ARMED, REFUSED)], Phase.PARTIAL),
        ("a", [report(REFUSED)], Phase.ERROR),
        ("a", [report(ARMED, THROTTLED)], Phase.PARTIAL),
        ("a", [report(TRIPPED)], Phase.PARTIAL),
        ("a", [NOT_THERE], Phase.ERROR),
        ("ab", [report(ARMED)], Phase.ARMED),
        ("ab", [report(ARMED), RESOLVING], Phase.ARMED),
        ("ab", [report(), RESOLVING], Phase.RESOLVING),
        ("ab", [report(ARMED), NOT_THERE], Phase.ARMED),
        ("ab", [report(ARMED), BROKEN], Phase.PARTIAL),
        ("ab", [report(), NOT_THERE], Phase.NO_TARGETS),
        ("ab", [BROKEN, NOT_THERE], Phase.ERROR),
    ],
)
def test_phase(online: str, reports: list[Observed], phase: Phase) -> None:
    assert phase_of(list(online), dict(zip("ab", reports, strict=False))) == phase


def test_coverage_counts_what_could_be_armed() -> None:
    states = (ARMED, ARMED, REFUSED, GONE, THROTTLED, TRIPPED)
    coverage = coverage_of(["a"], {"a": report(*states), "offline": report(ARMED)})
    assert (coverage.eligible, coverage.armed) == (5, 3)


def test_what_is_over_its_budget_is_not_exact_and_says_why() -> None:
    over = [
        target(state=state, reason="OverBudget", message=f"too much for {state}").model_copy(
            update={"covered": covered}
        )
        for state, covered in ((THROTTLED, 0.3), (TRIPPED, 0.0), (ARMED, 1.0))
    ]
    now = datetime(2026, 11, 1, tzinfo=UTC)
    observed = {"a": Observed(probe="p", generation=1, resolved=True, targets=over)}
    (condition,) = conditions_of(["a"], ["a"], observed, now)
    assert (condition.type, condition.status, condition.reason, condition.host) == ("Exact", "False", "OverBudget", "a")
    assert condition.message == (
        "1 target throttled and 1 target tripped: too much for tripped; calls are seen for 15% of the time"
    )
    observed["a"].targets = [over[2]]
    assert conditions_of(["a"], ["a"], observed, now) == []


def test_overhead_is_weighted_by_hits_and_never_nan() -> None:
    def of(ns: float | None, hits: int) -> Observed:
        return Observed(probe="p", generation=1, overhead_ns=ns, counters=Counters(hits=hits))

    assert overhead_of({"a": of(100.0, 3), "b": of(200.0, 1), "c": of(None, 50), "d": of(float("nan"), 9)}) == 125.0
    assert overhead_of({"c": of(None, 1)}) is None


def test_a_condition_that_stays_keeps_its_time() -> None:
    def look(former: ProbeStatus, at: datetime) -> ProbeStatus:
        return status_of(
            generation=1,
            settled=None,
            hosts=["a", "off"],
            online=["a"],
            observed={"a": report(REFUSED, REFUSED)},
            counters=Counters(),
            dropped_by_reason={},
            former=former,
            at=at,
        )

    early, late = datetime(2030, 1, 1, tzinfo=UTC), datetime(2030, 1, 2, tzinfo=UTC)
    status = look(look(ProbeStatus(), early), late)
    assert [(c.type, c.host, c.at) for c in status.conditions] == [("Armed", "a", early), ("Online", "off", early)]
    assert status.conditions[0].message.startswith("2 targets refused")
