"""What the traps cost the programs: by point, from what the engine counts and samples."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from trapline_agent.engines.base import ProcessId, Tally
from trapline_agent.engines.ring import HitRing
from trapline_agent.tracer.breaker import Load, Point

UNSEEN_NS = 5_000
"""What a trap adds beyond the time for which the engine sees that it holds the thread: the way into the kernel and the two
switches (docs/adr/0008)."""
_GUESS_NS = 8_000
"""For the time that the engine sees, before its first sample."""


class Metered(Protocol):
    """A consumer, as far as it matters here."""

    @property
    def probe(self) -> str: ...

    @property
    def ring(self) -> HitRing: ...


@dataclass(eq=False, slots=True)
class _Meter:
    tally: Tally = field(default_factory=Tally)
    read: int = 0
    consumers: tuple[Metered, ...] = ()


class Meters:
    """Points get theirs on the engine's threads, one process on one thread at a time; the control thread reads them."""

    def __init__(self) -> None:
        self._meters: dict[ProcessId, dict[Point, _Meter]] = {}
        self._ended: deque[ProcessId] = deque()

    def tally(self, point: Point, consumers: Sequence[Metered]) -> Tally:
        """Returns where the traps at a point are to be counted; it is the same one each time."""
        meter = self._meters.setdefault(point.process, {}).setdefault(point, _Meter())
        meter.consumers = tuple(consumers)
        return meter.tally

    def take(self) -> list[Load]:
        """Returns what was added to the programs' time since the last call."""
        loads: list[Load] = []
        costs: dict[str, float] = {}
        for meters in list(self._meters.values()):
            for point, meter in list(meters.items()):
                traps = meter.tally.traps
                count, meter.read = traps - meter.read, traps
                if not count or not meter.consumers:
                    continue
                for consumer in meter.consumers:
                    if consumer.probe not in costs:
                        costs[consumer.probe] = (consumer.ring.median_overhead_ns() or _GUESS_NS) + UNSEEN_NS
                probes = tuple(c.probe for c in meter.consumers)
                loads.append(Load(point, probes, count * max(costs[p] for p in probes) * 1e-9))
        return loads

    def forget(self, probe: str) -> None:
        """A probe is out: points that were of no other one go."""
        for meters in list(self._meters.values()):
            for point, meter in list(meters.items()):
                if all(c.probe == probe for c in meter.consumers):
                    meters.pop(point, None)

    def processes(self) -> list[ProcessId]:
        """Returns the processes that have points."""
        return list(self._meters)

    def end(self, process: ProcessId) -> None:
        """A process has ended. Any thread."""
        if self._meters.pop(process, None) is not None:
            self._ended.append(process)

    def take_ended(self) -> list[ProcessId]:
        """Returns the processes that ended since the last call."""
        return [self._ended.popleft() for _ in range(len(self._ended))]
