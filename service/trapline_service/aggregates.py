"""What probes' aggregates come to: added up from all hosts, kept over time, told to whoever looks on.

Of each probe there is the whole so far, and what was gained in each stretch of ten seconds; both are added to as frames
come in, and written every two seconds, the whole with how far each source has come. A frame that comes a second time
(a cut, a restart) is known by its sequence and left out; one that never comes is ``lost``.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import TypeVar

import zstandard

from trapline.aggregates import Table, capacity_of
from trapline.errors import ProtocolError, TraplineError
from trapline.ids import new_id
from trapline.model import Aggregate, AggregatePoint, AggregateTable
from trapline.protocol.aggregates import Delta, pack, unpack
from trapline.tables import FrameList, table_of
from trapline_service.coalesce import Coalescer
from trapline_service.hub import Hub
from trapline_service.store.base import Rollup, Store, Whole

log = logging.getLogger(__name__)

BUCKET_S = 10
_BUCKET_NS = BUCKET_S * 1_000_000_000
FLUSH_S = 2.0
_TRIM_S = 30.0
_PUBLISH_S = 0.5
LIVE_ROWS = 100
_MAX_BYTES = 256 * 1024 * 1024
_ZSTD_LEVEL = 3

Kept = TypeVar("Kept", Whole, Rollup)


@dataclass(eq=False)
class _Bucket:
    """What was gained in a stretch of time, as long as something may still be added."""

    table: Table
    id: str = field(default_factory=lambda: new_id("agg"))
    changed: bool = True


@dataclass(eq=False)
class _Of:
    """One probe's."""

    aggregate: Aggregate
    table: Table
    next: dict[str, int] = field(default_factory=dict)
    """The next sequence, by host and source."""
    lost: int = 0
    since_ns: int = 0
    until_ns: int = 0
    buckets: dict[int, _Bucket] = field(default_factory=dict)
    """By begin, Unix ns."""
    changed: bool = False

    @property
    def hosts(self) -> list[str]:
        return sorted({_host_and_source(key)[0] for key in self.next})


class Aggregates:
    """The aggregates of all probes. Belongs to one event loop."""

    def __init__(
        self,
        store: Store,
        hub: Hub,
        aggregate_of: Callable[[str], Aggregate | None],
        *,
        max_keys: int,
        retention_bytes: int,
        retention_s: float,
    ) -> None:
        """
        Args:
            store: where to.
            hub: told of what changed, for topic ``aggregates``.
            aggregate_of: gives a probe's aggregate for its id; None where it has none, or is not known.
            max_keys: rows of a probe.
            retention_bytes: compressed bytes of stretches that are kept.
            retention_s: seconds for which they are kept.
        """
        self._store = store
        self._hub = hub
        self._aggregate_of = aggregate_of
        self._max_keys = max_keys
        self._retention_bytes = retention_bytes
        self._retention_s = retention_s
        self._probes: dict[str, _Of] = {}
        self._kept: dict[str, Whole] = {}
        """Of a former run, not asked for yet."""
        self._gone: set[str] = set()
        self._something = asyncio.Event()
        self._writing = asyncio.Lock()
        self._trimmed = 0.0
        self._publish = Coalescer(_PUBLISH_S, self._publish_now)

    async def load(self) -> None:
        """Brings back what was kept. Raises Unavailable."""
        self._kept = {whole.probe: whole for whole in await self._store.wholes()}

    def sequences(self) -> dict[tuple[str, str, str], int]:
        """Returns the next sequence of each (probe, host, source) by what a former run kept, for the ledger."""
        return {
            (whole.probe, *_host_and_source(key)): seq
            for whole in self._kept.values()
            for key, seq in whole.next.items()
        }

    def keep_only(self, probes: Iterable[str]) -> None:
        """Forgets what a former run kept of probes that are gone."""
        for probe in self._kept.keys() - set(probes):
            self.forget(probe)

    def _of(self, probe: str) -> _Of | None:
        of = self._probes.get(probe)
        if of is None and (aggregate := self._aggregate_of(probe)) is not None:
            of = self._probes[probe] = _Of(aggregate, self._table(aggregate))
            if (whole := self._kept.pop(probe, None)) is not None:
                _unpack(whole.data, of.table)
                of.next, of.lost = dict(whole.next), whole.lost
                of.since_ns, of.until_ns = whole.since_ns, whole.until_ns
        return of

    def _table(self, aggregate: Aggregate) -> Table:
        return Table(self._max_keys, capacity_of(aggregate.function, aggregate.parameters))

    def take(self, delta: Delta) -> bool:
        """Adds a frame; returns False where it has been added before, or its probe has no aggregate."""
        of = self._of(delta.probe)
        if of is None:
            return False
        source = f"{delta.host} {delta.source}"
        expected = of.next.get(source, 0)
        if delta.seq < expected:
            return False
        of.lost += delta.seq - expected
        of.next[source] = delta.seq + delta.count
        of.since_ns = min(of.since_ns or delta.begin_ns, delta.begin_ns)
        of.until_ns = max(of.until_ns, delta.end_ns)
        start = delta.end_ns // _BUCKET_NS * _BUCKET_NS
        bucket = of.buckets.get(start)
        if bucket is None:
            bucket = of.buckets[start] = _Bucket(self._table(of.aggregate))
        for table in (of.table, bucket.table):
            delta.add_to(table)
        of.changed = bucket.changed = True
        self._something.set()
        self._publish.add(delta.probe)
        return True

    def forget(self, probe: str) -> None:
        """Takes a probe out that is gone for good."""
        self._probes.pop(probe, None)
        self._kept.pop(probe, None)
        self._gone.add(probe)
        self._something.set()

    # --- what people ask ---

    def table(self, probe: str, top: int | None = None) -> AggregateTable | None:
        """Returns what a probe's aggregate says so far; None where it has none."""
        of = self._of(probe)
        if of is None:
            return None
        table = table_of(of.aggregate, of.table, probe=probe, top=top)
        table.lost, table.hosts = of.lost, of.hosts
        table.since, table.until = _time(of.since_ns), _time(of.until_ns)
        return table

    async def between(
        self, probe: str, since_ns: int, until_ns: int, *, step_s: int | None, top: int | None
    ) -> AggregateTable | None:
        """Returns what a probe's aggregate says of a time; None where it has none.

        Args:
            probe: id.
            since_ns: from when on, Unix ns, rounded down to ten seconds.
            until_ns: up to and without, rounded up likewise.
            step_s: for a series: seconds of each of its points, a multiple of ten.
            top: rows, of each point too.

        Raises:
            Unavailable: the store does not answer.
        """
        of = self._of(probe)
        if of is None:
            return None
        await self.flush()
        since_ns = since_ns // _BUCKET_NS * _BUCKET_NS
        until_ns = -(-until_ns // _BUCKET_NS) * _BUCKET_NS
        rollups = await self._store.rollups(probe, since_ns, until_ns)
        step_ns = (step_s or 0) * 1_000_000_000

        def added() -> AggregateTable:
            whole = self._table(of.aggregate)
            points: dict[int, Table] = {}
            for rollup in rollups:
                start = since_ns + (rollup.start_ns - since_ns) // step_ns * step_ns if step_ns else 0
                point = points.setdefault(start, self._table(of.aggregate))
                for table in (whole, point):
                    _unpack(rollup.data, table)
            frames = FrameList()
            shown = table_of(of.aggregate, whole, probe=probe, top=top, frames=frames)
            shown.since, shown.until = _time(since_ns), _time(until_ns)
            if step_ns:
                for start, point in sorted(points.items()):
                    rows = table_of(of.aggregate, point, top=top, frames=frames)
                    shown.series.append(
                        AggregatePoint(
                            start=datetime.fromtimestamp(start / 1e9, UTC),
                            count=rows.count,
                            rows=rows.rows,
                            other=rows.other,
                        )
                    )
            shown.frames, shown.hosts = frames.frames, of.hosts
            return shown

        return await asyncio.to_thread(added)

    def _publish_now(self, probes: set[str]) -> None:
        for probe in sorted(probes):
            if self._hub.wanted("aggregates", probe) and (table := self.table(probe, LIVE_ROWS)) is not None:
                self._hub.changed("aggregates", probe, status_fields(table))

    # --- keeping ---

    async def keep_writing(self) -> None:
        """Writes and trims; runs until it is cancelled."""
        while True:
            await self._something.wait()
            await asyncio.sleep(FLUSH_S)
            try:
                await self.flush()
                if time.monotonic() - self._trimmed > _TRIM_S:
                    self._trimmed = time.monotonic()
                    before_ns = time.time_ns() - int(self._retention_s * 1e9)
                    await self._store.trim_rollups(max_bytes=self._retention_bytes, before_ns=before_ns)
            except TraplineError as e:
                log.error("aggregates were not kept: %s", e)

    async def flush(self) -> None:
        """Writes everything that has changed. Raises Unavailable; what was not written is written the next time."""
        async with self._writing:
            self._something.clear()
            gone, self._gone = self._gone, set()
            wholes: list[Whole] = []
            rollups: list[Rollup] = []
            written: list[_Of | _Bucket] = []
            over = (time.time_ns() - 2 * _BUCKET_NS) // _BUCKET_NS * _BUCKET_NS
            for probe, of in self._probes.items():
                for start, bucket in list(of.buckets.items()):
                    if bucket.changed:
                        rollups.append(Rollup(bucket.id, probe, start, pack(bucket.table)))
                        written.append(bucket)
                    elif start < over:
                        del of.buckets[start]  # what comes this late goes in a row of its own
                if of.changed:
                    wholes.append(Whole(probe, dict(of.next), of.lost, of.since_ns, of.until_ns, pack(of.table)))
                    written.append(of)
            for each in written:
                each.changed = False
            try:
                if wholes or rollups or gone:
                    packed = await asyncio.to_thread(
                        lambda: ([_compressed(w) for w in wholes], [_compressed(r) for r in rollups])
                    )
                    await self._store.put_aggregates(*packed, gone=gone)
            except BaseException:
                for each in written:
                    each.changed = True
                self._gone |= gone
                self._something.set()
                raise


def status_fields(table: AggregateTable) -> str:
    """Returns a table as the members of a ``Status`` message after its ``id``."""
    return f'"probe":null,"host":null,"aggregate":{table.model_dump_json()},"removed":null'


def _host_and_source(key: str) -> tuple[str, str]:
    host, _, source = key.partition(" ")
    return host, source


def _time(ns: int) -> datetime | None:
    return datetime.fromtimestamp(ns / 1e9, UTC) if ns else None


def _compressed(row: Kept) -> Kept:
    return replace(row, data=zstandard.ZstdCompressor(level=_ZSTD_LEVEL).compress(row.data))


def _unpack(data: bytes, into: Table) -> None:
    """Adds what was kept; what is damaged is logged and left out."""
    try:
        unpack(zstandard.ZstdDecompressor().decompress(data, max_output_size=_MAX_BYTES), into)
    except (zstandard.ZstdError, ProtocolError) as e:
        log.error("a kept aggregate is damaged: %s", e)
