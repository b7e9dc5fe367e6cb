"""In the place of a ring: hits are added up where they happen, and what was gained goes out now and then.

However many hits there are, what is sent is bounded by the keys; and nothing is dropped while the agent is slow or away:
what was not sent yet is added to.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import msgspec

from trapline.aggregates import Key, Part, Table, capacity_of, recorder, stack_bytes
from trapline.protocol import aggregates
from trapline_agent.capture.compute import Floats, Scalar
from trapline_agent.capture.evaluate import Kept
from trapline_agent.capture.values import compile_return_values, compile_values, part_of
from trapline_agent.engines.ring import HitRing
from trapline_agent.plans import AggregatePlan, FetchPlan, Program
from trapline_agent.unwind.walk import Stacks

INTERVAL_S = 0.25
"""Between two frames of a probe, at least."""
MAX_STACK_BYTES = 16 * 1024 * 1024
"""Of the stacks in the keys of one store."""
_NO_VALUE: Part = (None, 0)


class AggregateStore(HitRing):
    """What the hits of one probe add up to. Sinks write from any thread; one thread drains.

    The bound of the keys is of the store's whole life: a key that has a row keeps it, and one that came too late has none
    ever. So a row that is there is exact.
    """

    def __init__(
        self,
        plan: AggregatePlan,
        fetches: Sequence[FetchPlan],
        comms: Mapping[int, str],
        *,
        max_hits: int = 0,
        returns: bool = False,
        stacks: Stacks | None = None,
        floats: Floats | None = None,
        on_data: Callable[[], None] = lambda: None,
        on_limit: Callable[[], None] = lambda: None,
    ) -> None:
        """
        Args:
            plan: what to do with each hit.
            fetches: the probe's columns, of which the first ``plan.by`` are its rows' key.
            comms: names of processes by pid; it may change.
            max_hits, returns, stacks, floats, on_data, on_limit: as of a ``HitRing``.
        """
        plain = all(f.register for f in fetches)
        # Of the ring itself are the counters, what a call keeps for its return, and sites' programs. It has no rows, so
        # that columns may be called alike, or as those that each row has.
        own = [msgspec.structs.replace(f, name=str(i)) for i, f in enumerate(fetches)]
        super().__init__(
            [f for f in own if f.entry] if plain else own,
            max_hits=max_hits,
            returns=returns,
            stacks=stacks,
            floats=floats,
            on_data=on_data,
            on_limit=on_limit,
        )
        self._plan = plan
        self._stack_keys = tuple(i for i, f in enumerate(fetches[: plan.by]) if f.column == "stack")
        self._stack_bytes = 0
        """Of the keys that have a row."""
        self.of_stacks = bool(self._stack_keys)
        self._keys = plan.by
        self._comms = comms
        self._values = compile_values(fetches if plain and not returns else (), comms, self._stacks.walk)
        self._return_values = compile_return_values(fetches if plain and returns else (), comms, self._stacks.walk)
        self._record = recorder(plan.function, plan.parameters)
        self._known: set[Key] = set()
        self._table = self._new_table()
        self._begin_ns = time.time_ns()
        self._seq = 0
        self._next_drain = 0.0
        self._pending = False
        """There are hits that were not drained."""

    def _new_table(self) -> Table:
        return Table(self._plan.max_keys, capacity_of(self._plan.function, self._plan.parameters))

    def _take(self, values: Key) -> None:
        """Adds one hit. The caller has the lock."""
        if self._max and self.hits >= self._max:
            self.limited += 1
            return
        key = values[: self._keys]
        if key in self._known:
            cell = self._table.cell(key)
        elif len(self._known) < self._plan.max_keys and self._has_room(key):
            self._known.add(key)
            cell = self._table.cell(key)
        else:
            cell = self._table.beyond()
        cell.count += 1
        self._record(cell, values[self._keys] if len(values) > self._keys else _NO_VALUE)
        self.hits += 1
        if not self._pending:
            self._pending = True
            self._on_data()
        if self._max and self.hits == self._max:
            self._on_limit()

    def _has_room(self, key: Key) -> bool:
        """Takes the room that a new key's stacks need, if there is so much."""
        if not self._stack_keys:
            return True
        size = stack_bytes(key, self._stack_keys)
        if self._stack_bytes + size > MAX_STACK_BYTES:
            return False
        self._stack_bytes += size
        return True

    @property
    def due(self) -> float:
        return self._next_drain if self._pending else 0.0

    def sink(self, site: int, program: Program | None = None) -> Callable[[int, int, int, Sequence[int], int], None]:
        if program is not None:
            return self.program_sink(site, program)
        values, lock, take = self._values, self._lock, self._take

        def record(ts: int, pid: int, tid: int, words: Sequence[int], memory: int) -> None:
            with lock:
                take(values(words, memory, pid, tid))

        return record

    def record(self, site: int, ts: int, pid: int, tid: int, values: Sequence[tuple[Scalar, int]]) -> None:
        parts = [part_of(value, status, stack=i in self._stack_keys) for i, (value, status) in enumerate(values)]
        with self._lock:
            self._take(tuple(parts))

    def end(
        self, site: int, ts: int, pid: int, tid: int, words: Sequence[int], memory: int, latency_ns: int, kept: Kept
    ) -> None:
        with self._lock:
            self._take(self._return_values(words, memory, pid, tid, latency_ns, kept))

    def drain(
        self,
        *,
        host: str,
        probe: str,
        source: str,
        generation: int,
        sites: Sequence[str],
        comms: Mapping[int, str],
        last: bool = True,
    ) -> list[tuple[int, bytes]]:
        now = time.monotonic()
        if not last and now < self._next_drain:
            return []
        self._next_drain = now + INTERVAL_S
        with self._lock:
            if not self._pending:
                return []
            self._pending = False
            table, self._table = self._table, self._new_table()
            begin_ns, self._begin_ns = self._begin_ns, time.time_ns()
            end_ns = max(begin_ns, self._begin_ns)
            drops, self._unreported = self._unreported, {}
            seq, self._seq = self._seq, self._seq + table.count
        frames = aggregates.split(
            table.cells.items(),
            table.other,
            host=host,
            probe=probe,
            source=source,
            seq=seq,
            begin_ns=begin_ns,
            end_ns=end_ns,
            generation=generation,
            drops=drops,
            of_stacks=self._stack_keys,
            file=self._stacks.file,
        )
        return frames

    def _skip(self) -> None:
        self._seq += 1
