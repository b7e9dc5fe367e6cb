"""What a probe's status is, given what its hosts report: pure functions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from math import isfinite

from trapline.model import Condition, Counters, Coverage, Phase, ProbeStatus, Target, TargetState
from trapline.protocol.messages import Observed
from trapline_service.peer import peer_error

_MAX_CONDITIONS = 32
_OVER_BUDGET = (TargetState.THROTTLED, TargetState.TRIPPED)


def phase_of(online: Sequence[str], observed: Mapping[str, Observed]) -> Phase:
    """Returns the phase of a probe that is to be there.

    Args:
        online: the hosts that it is for and that are online.
        observed: the last report of each host.

    A host that lacks the file or the symbol (``not-found``) counts as one without targets as long as another host has
    them: a probe for the whole fleet is not partial because only some hosts run the program.
    """
    reports = [observed[host] for host in online if host in observed]
    if not online:
        return Phase.PENDING
    failed = [r for r in reports if r.error is not None]
    targets = [t for r in reports for t in r.targets if t.state != TargetState.GONE]
    over = any(t.state in _OVER_BUDGET for t in targets)
    armed = over or any(t.state == TargetState.ARMED for t in targets)
    refused = any(t.state == TargetState.REFUSED for t in targets)
    grave = any(r.error is not None and r.error.get("code") != "not-found" for r in failed)
    if armed:
        return Phase.PARTIAL if over or refused or grave else Phase.ARMED
    if any(r.error is None and not r.resolved for r in reports) or len(reports) < len(online):
        return Phase.RESOLVING
    if refused or len(failed) == len(reports):
        return Phase.ERROR
    return Phase.NO_TARGETS


def coverage_of(online: Sequence[str], observed: Mapping[str, Observed]) -> Coverage:
    """Counts targets on the hosts that are online: those that could be armed, and those that are, if only for a part of
    the time."""
    states = [t.state for host in online if host in observed for t in observed[host].targets]
    armed = states.count(TargetState.ARMED) + states.count(TargetState.THROTTLED)
    return Coverage(eligible=armed + states.count(TargetState.TRIPPED) + states.count(TargetState.REFUSED), armed=armed)


def conditions_of(
    hosts: Iterable[str], online: Sequence[str], observed: Mapping[str, Observed], at: datetime
) -> list[Condition]:
    """Returns what is not as it should be, host by host; at most 32.

    Args:
        hosts: those that have reported before or are online.
        online: those of them that are online.
        observed: their last reports.
        at: time of this look.
    """
    conditions: list[Condition] = []
    for host in sorted(hosts):
        if host not in online:
            conditions.append(
                Condition(
                    type="Online",
                    status="False",
                    reason="HostOffline",
                    message="the host's agent is not linked; what it last reported may be out of date",
                    host=host,
                    at=at,
                )
            )
            continue
        report = observed.get(host)
        if report is None:
            continue
        if report.error is not None:
            error = peer_error(report.error)
            conditions.append(
                Condition(
                    type="Resolved",
                    status="False",
                    reason=error.reason or error.code,
                    message=str(error),
                    host=host,
                    at=at,
                )
            )
        conditions += _refusals(host, report.targets, at)
        conditions += _over_budget(host, report.targets, at)
    return conditions[:_MAX_CONDITIONS]


def _refusals(host: str, targets: Sequence[Target], at: datetime) -> list[Condition]:
    by_reason: dict[str, list[Target]] = {}
    for target in targets:
        if target.state == TargetState.REFUSED:
            by_reason.setdefault(target.reason, []).append(target)
    return [
        Condition(
            type="Armed",
            status="False",
            reason=reason or "Refused",
            message=f"{len(same)} target{'s' if len(same) > 1 else ''} refused: {same[0].message or reason}",
            host=host,
            at=at,
        )
        for reason, same in sorted(by_reason.items())
    ]


def _over_budget(host: str, targets: Sequence[Target], at: datetime) -> list[Condition]:
    over = [t for t in targets if t.state in _OVER_BUDGET]
    if not over:
        return []
    counts = [(state.value, sum(t.state == state for t in over)) for state in _OVER_BUDGET]
    which = " and ".join(f"{n} target{'s' if n > 1 else ''} {state}" for state, n in counts if n)
    gravest = max(over, key=lambda t: t.state == TargetState.TRIPPED)
    seen = sum(t.covered for t in over) / len(over)
    return [
        Condition(
            type="Exact",
            status="False",
            reason="OverBudget",
            message=f"{which}: {gravest.message}; calls are seen for {seen:.0%} of the time",
            host=host,
            at=at,
        )
    ]


def overhead_of(observed: Mapping[str, Observed]) -> float | None:
    """Returns the hosts' medians, weighted by their hits, in ns."""
    known = [
        (r.overhead_ns, max(1, r.counters.hits))
        for r in observed.values()
        if r.overhead_ns is not None and isfinite(r.overhead_ns)
    ]
    weight = sum(w for _, w in known)
    return sum(ns * w for ns, w in known) / weight if weight else None


def status_of(
    *,
    generation: int,
    settled: Phase | None,
    hosts: Iterable[str],
    online: Sequence[str],
    observed: Mapping[str, Observed],
    counters: Counters,
    dropped_by_reason: dict[str, int],
    unreturned_by_reason: dict[str, int] | None = None,
    former: ProbeStatus,
    at: datetime,
) -> ProbeStatus:
    """Puts a status together.

    Args:
        generation: the probe's.
        settled: Deleting, Expired or Completed, which no report changes; None while the probe is to be there.
        hosts: those that have reported before or are online.
        online: those the probe is for that are online.
        observed: the hosts' last reports.
        counters: totals by the ledger.
        dropped_by_reason: the same for drops.
        unreturned_by_reason: the same for calls that were not seen to return.
        former: the status up to now; a condition that stays keeps its time.
        at: now.
    """
    conditions = [] if settled in (Phase.EXPIRED, Phase.COMPLETED) else conditions_of(hosts, online, observed, at)
    since = {(c.type, c.host, c.reason): c.at for c in former.conditions}
    for condition in conditions:
        condition.at = since.get((condition.type, condition.host, condition.reason), at)
    current = [observed[host].generation for host in online if host in observed]
    return ProbeStatus(
        observed_generation=min(current) if current else former.observed_generation,
        phase=settled or phase_of(online, observed),
        coverage=coverage_of(online, observed),
        counters=counters,
        dropped_by_reason=dropped_by_reason,
        unreturned_by_reason=unreturned_by_reason or {},
        overhead_ns=overhead_of(observed) if observed else former.overhead_ns,
        conditions=conditions,
    )
