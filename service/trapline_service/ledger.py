"""Books every hit: what came, what is missing, and where it was lost (semantics H1: hits = delivered + dropped).

Three sources tell of losses, in any order: the drops in a batch's header (they lie before its sequence), the agent's
``LinkDrops`` (batches that fell out of its outbox), and a jump in the sequence itself. A jump that nobody declared is
booked as ``unknown`` at once, and moved to its right stage when the declaration comes after all.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pydantic import Field

from trapline.model import Counters, Model
from trapline.protocol.aggregates import Numbered
from trapline.protocol.messages import Observed

log = logging.getLogger(__name__)

UNKNOWN = "unknown"
_OTHER = "other"
_UNNAMED = "unnamed"
_COUNTED = ("hits", "filtered", "limited", "uncovered_ms", "calls")
_UNRETURNED = "unreturned:"
_DROP = "drop:"
_AGENT_OWN = _DROP + "agent-outbox"
"""Counted by the agent, not by its tracer: it goes on when a new tracer counts from zero."""


@dataclass(frozen=True, slots=True)
class Loss:
    """Hits of one probe on one host that nobody will get; ``seq_from`` to ``seq_to`` where the numbers are known."""

    probe: str
    host: str
    count: int
    stage: str
    seq_from: int | None = None
    seq_to: int | None = None


class Tally(Model):
    """What is known of one probe on one host; kept in the store, so that counters never go back."""

    source: str = ""
    """The tracer whose batches come now."""
    next_seq: int = 0
    """What its next batch begins with, if nothing is lost."""
    base: dict[str, int] = Field(default_factory=dict)
    """Sums of what former tracers reported."""
    last: dict[str, int] = Field(default_factory=dict)
    """What the present one reported, at most."""
    delivered: int = 0
    """Hits that arrived here."""
    lost: dict[str, int] = Field(default_factory=dict)
    """Losses booked here, by stage."""

    def report(
        self,
        counters: Counters,
        dropped_by_reason: Mapping[str, int],
        unreturned_by_reason: Mapping[str, int] | None = None,
    ) -> None:
        """Takes the host's own counters.

        They never go back within one tracer; an agent that has just started reports zero until its tracer has told it
        more, so a smaller number means nothing.
        """
        now = {name: getattr(counters, name) for name in _COUNTED}
        now |= {_DROP + stage: count for stage, count in dropped_by_reason.items()}
        now |= {_UNRETURNED + reason: count for reason, count in (unreturned_by_reason or {}).items()}
        now[_UNNAMED] = max(0, counters.dropped - sum(dropped_by_reason.values()))
        for key, count in now.items():
            self.last[key] = max(count, self.last.get(key, 0))

    def arrived(self, source: str, count: int) -> None:
        """Counts a batch; when it is of another tracer than the last one, that one's counters are closed."""
        self.delivered += count
        if self.source and source != self.source:
            own = self.last.pop(_AGENT_OWN, 0)
            for key, value in self.last.items():
                self.base[key] = self.base.get(key, 0) + value
            self.last = {_AGENT_OWN: own}
        self.source = source

    def _reported(self, key: str) -> int:
        return self.base.get(key, 0) + self.last.get(key, 0)

    def dropped(self) -> dict[str, int]:
        """Returns losses by stage: the larger of what the host says and what was seen here.

        What the host has told of a stage and no batch has declared yet explains as much of ``unknown``.
        """
        told = {key.removeprefix(_DROP) for key in (*self.base, *self.last) if key.startswith(_DROP)}
        result: dict[str, int] = {}
        explained = 0
        for stage in {*told, *self.lost} - {UNKNOWN}:
            seen, said = self.lost.get(stage, 0), self._reported(_DROP + stage)
            result[stage] = max(seen, said)
            explained += max(0, said - seen)
        result[UNKNOWN] = max(0, self.lost.get(UNKNOWN, 0) - explained)
        # What the host counts without a name may be what was seen here under one.
        result[_OTHER] = self._reported(_UNNAMED) - sum(n for stage, n in result.items() if stage not in told)
        return {stage: count for stage, count in sorted(result.items()) if count > 0}

    def unreturned(self) -> dict[str, int]:
        """Returns calls whose return was not seen, by reason."""
        keys = {key for key in (*self.base, *self.last) if key.startswith(_UNRETURNED)}
        return {key.removeprefix(_UNRETURNED): self._reported(key) for key in sorted(keys)}

    def counters(self) -> Counters:
        """Returns the totals. Hits that were counted on the host and are still under way are in ``hits`` already."""
        dropped = sum(self.dropped().values())
        return Counters(
            hits=max(self._reported("hits"), self.delivered + dropped),
            filtered=self._reported("filtered"),
            limited=self._reported("limited"),
            uncovered_ms=self._reported("uncovered_ms"),
            dropped=dropped,
            calls=self._reported("calls"),
            unreturned=sum(self.unreturned().values()),
        )


class Ledger:
    """The books of all probes. Belongs to the event loop."""

    def __init__(self) -> None:
        self._tallies: dict[str, dict[str, Tally]] = {}
        self._next: dict[tuple[str, str, str], int] = {}
        self._declared: dict[tuple[str, str], int] = {}
        self._undeclared: dict[tuple[str, str], int] = {}

    def load(self, sequences: Mapping[tuple[str, str, str], int]) -> None:
        """Goes on where the record ends: the next sequence of each (probe, host, source)."""
        self._next.update(sequences)

    def open(self, probe: str, tallies: Mapping[str, Tally] | None = None) -> None:
        """Begins to book a probe; hits of any other are not booked."""
        self._tallies[probe] = dict(tallies or {})
        for host, tally in self._tallies[probe].items():
            key = (probe, host, tally.source)
            self._next[key] = max(self._next.get(key, 0), tally.next_seq)

    def forget(self, probe: str) -> None:
        """Ends the books of a probe that is gone."""
        self._tallies.pop(probe, None)
        for key in [k for k in self._next if k[0] == probe]:
            del self._next[key]
        for books in (self._declared, self._undeclared):
            for pair in [k for k in books if k[0] == probe]:
                del books[pair]

    def knows(self, probe: str) -> bool:
        return probe in self._tallies

    def tallies(self, probe: str) -> Mapping[str, Tally]:
        """Returns a probe's tallies by host."""
        return self._tallies.get(probe, {})

    def _tally(self, probe: str, host: str) -> Tally:
        return self._tallies[probe].setdefault(host, Tally())

    def batch(self, header: Numbered) -> list[Loss]:
        """Books a batch, or an aggregate frame, of a known probe; returns the losses that it shows, oldest first."""
        pair = (header.probe, header.host)
        key = (*pair, header.source)
        tally = self._tally(*pair)
        # A source counts a probe's hits from 0 on.
        expected = self._next.get(key, 0)
        if header.seq < expected:
            log.warning("%s on %s: sequence went from %d back to %d", *pair, expected, header.seq)
            expected = 0
        losses = self._header_drops(header, expected)
        in_header = sum(header.drops.values())
        missing = header.seq - expected - in_header
        if missing > 0:
            declared = self._declared.get(pair, 0)
            covered = min(missing, declared)
            self._declared[pair] = declared - covered
            unknown = missing - covered
            if unknown:
                self._undeclared[pair] = self._undeclared.get(pair, 0) + unknown
                alone = not covered and not in_header
                span = (expected, header.seq - 1) if alone else (None, None)
                losses.insert(0, Loss(*pair, unknown, UNKNOWN, *span))
        for loss in losses:
            tally.lost[loss.stage] = tally.lost.get(loss.stage, 0) + loss.count
        tally.arrived(header.source, header.count)
        self._next[key] = tally.next_seq = header.seq + header.count
        return losses

    @staticmethod
    def _header_drops(header: Numbered, expected: int) -> list[Loss]:
        drops = [(stage, count) for stage, count in header.drops.items() if count]
        if len(drops) != 1:
            return [Loss(header.probe, header.host, count, stage) for stage, count in drops]
        stage, count = drops[0]
        first = header.seq - count
        # Where other hits are missing beside these, nobody knows which numbers are whose.
        span = (first, header.seq - 1) if first == expected else (None, None)
        return [Loss(header.probe, header.host, count, stage, *span)]

    def link_drops(self, probe: str, host: str, stage: str, count: int) -> list[Loss]:
        """Books what an agent let go; returns the loss unless a jump in the sequence has shown it before."""
        pair = (probe, host)
        tally = self._tally(probe, host)
        seen = min(count, self._undeclared.get(pair, 0))
        if seen:
            self._undeclared[pair] -= seen
            tally.lost[UNKNOWN] -= seen
        tally.lost[stage] = tally.lost.get(stage, 0) + count
        if count > seen:
            self._declared[pair] = self._declared.get(pair, 0) + count - seen
            return [Loss(probe, host, count - seen, stage)]
        return []

    def report(self, host: str, observed: Observed) -> None:
        """Takes a host's own counters of a known probe."""
        self._tally(observed.probe, host).report(
            observed.counters, observed.dropped_by_reason, observed.unreturned_by_reason
        )

    def totals(self, probe: str) -> tuple[Counters, dict[str, int]]:
        """Returns a probe's counters over all hosts, and its drops by reason."""
        return totals(self.tallies(probe).values())

    def unreturned(self, probe: str) -> dict[str, int]:
        """Returns the calls of a return probe that were not seen to return, over all hosts, by reason."""
        return unreturned(self.tallies(probe).values())


def totals(tallies: Iterable[Tally]) -> tuple[Counters, dict[str, int]]:
    """Returns the sum of tallies, and their drops by reason."""
    total = Counters()
    reasons: dict[str, int] = {}
    for tally in tallies:
        counters = tally.counters()
        total.hits += counters.hits
        total.filtered += counters.filtered
        total.limited += counters.limited
        total.uncovered_ms += counters.uncovered_ms
        total.calls += counters.calls
        total.unreturned += counters.unreturned
        total.dropped += counters.dropped
        for stage, count in tally.dropped().items():
            reasons[stage] = reasons.get(stage, 0) + count
    return total, reasons


def unreturned(tallies: Iterable[Tally]) -> dict[str, int]:
    """Returns the sum of what tallies say of calls that were not seen to return, by reason."""
    reasons: dict[str, int] = {}
    for tally in tallies:
        for reason, count in tally.unreturned().items():
            reasons[reason] = reasons.get(reason, 0) + count
    return reasons
