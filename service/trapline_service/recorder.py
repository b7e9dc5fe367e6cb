"""Keeps hits: one more subscriber of the hub, with a disk instead of a socket.

Batches wait in memory, by (probe, host, source), for two seconds or a mebibyte; then each group becomes one compressed
chunk. The bytes inside are the hosts' own. What is asked for is read from the chunks again, newest first.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import zstandard

from trapline.errors import ProtocolError, TraplineError
from trapline.ids import new_id
from trapline.model import Hit
from trapline.protocol import hits
from trapline.protocol.hits import HitBatch
from trapline_service.frames import HitFrame
from trapline_service.hub import Item
from trapline_service.store.base import Chunk, Store

log = logging.getLogger(__name__)

FLUSH_S = 2.0
_FLUSH_BYTES = 1024 * 1024
_TRIM_S = 30.0
_ZSTD_LEVEL = 3
_PAGE = 16
"""Chunks that a query reads at a time."""
_MAX_CHUNK_BYTES = 256 * 1024 * 1024

Key = tuple[str, str, str]
"""Probe, host, source."""
Order = tuple[int, str, str, str, int]
"""Wall-clock ns, probe, host, source, sequence: the order of hits, everywhere."""
_Found = tuple[Order, int, HitBatch, int]
"""A row: its order, a number that no other one has, its batch, its place in there."""


@dataclass(frozen=True)
class HitPage:
    """Hits, newest last, and where the older ones go on; None: there are none."""

    hits: list[Hit]
    before: Order | None


def pack(batches: Sequence[bytes]) -> bytes:
    """Returns batches as one compressed blob."""
    return zstandard.ZstdCompressor(level=_ZSTD_LEVEL).compress(msgspec.msgpack.encode(list(batches)))


def unpack(data: bytes) -> list[bytes]:
    """Returns the batches of a blob. Raises ProtocolError where it is damaged."""
    try:
        raw = zstandard.ZstdDecompressor().decompress(data, max_output_size=_MAX_CHUNK_BYTES)
        return msgspec.msgpack.decode(raw, type=list[bytes])
    except (zstandard.ZstdError, msgspec.DecodeError) as e:
        raise ProtocolError(f"a recorded chunk is damaged: {e}") from e


class Recorder:
    """Writes what the hub delivers. Belongs to one event loop; compresses and reads in worker threads.

    Attributes:
        unrecorded: hits that were not written, since the store was too slow or away.
    """

    def __init__(self, store: Store, *, max_queue_bytes: int, retention_bytes: int, retention_s: float) -> None:
        """
        Args:
            store: where to.
            max_queue_bytes: bound of what waits to be written; beyond it the oldest batches go unrecorded.
            retention_bytes: compressed bytes that are kept.
            retention_s: seconds for which hits are kept.
        """
        self._store = store
        self._max_queue_bytes = max_queue_bytes
        self._retention_bytes = retention_bytes
        self._retention_s = retention_s
        self._waiting: deque[HitFrame] = deque()
        self._waiting_bytes = 0
        self._full = asyncio.Event()
        self._something = asyncio.Event()
        self._writing = asyncio.Lock()
        self._trimmed = 0.0
        self.unrecorded = 0

    def deliver(self, items: Sequence[Item]) -> None:
        for item in items:
            if isinstance(item, HitFrame):
                self._waiting.append(item)
                self._waiting_bytes += len(item.raw)
        while self._waiting_bytes > self._max_queue_bytes:
            oldest = self._waiting.popleft()
            self._waiting_bytes -= len(oldest.raw)
            self.unrecorded += oldest.header.count
        if self._waiting_bytes >= _FLUSH_BYTES:
            self._full.set()
        if self._waiting:
            self._something.set()

    async def keep_writing(self) -> None:
        """Writes and trims; runs until it is cancelled."""
        while True:
            await self._something.wait()
            try:
                async with asyncio.timeout(FLUSH_S):
                    await self._full.wait()
            except TimeoutError:
                pass  # little has come: write it all the same
            try:
                await self.flush()
                if time.monotonic() - self._trimmed > _TRIM_S:
                    await self.trim()
            except TraplineError as e:
                log.error("hits were not recorded: %s", e)
                await asyncio.sleep(FLUSH_S)

    async def flush(self) -> None:
        """Writes everything that waits. Raises Unavailable; what was not written waits on."""
        async with self._writing:
            frames, self._waiting = self._waiting, deque()
            size, self._waiting_bytes = self._waiting_bytes, 0
            self._full.clear()
            self._something.clear()
            if not frames:
                return
            try:
                chunks = await asyncio.to_thread(_chunks_of, frames)
                reached = {f.position.host: f.position for f in frames if f.position is not None}
                await self._store.add_chunks(chunks, list(reached.values()))
            except BaseException:
                self._waiting.extendleft(reversed(frames))
                self._waiting_bytes += size
                self._something.set()
                raise

    async def trim(self) -> None:
        """Removes what is beyond the retention. Raises Unavailable."""
        self._trimmed = time.monotonic()
        before_ns = time.time_ns() - int(self._retention_s * 1e9)
        removed = await self._store.trim_chunks(max_bytes=self._retention_bytes, before_ns=before_ns)
        if removed:
            log.info("removed %d chunks of recorded hits: beyond the retention", removed)

    async def query(
        self,
        *,
        probe: str | None = None,
        host: str | None = None,
        before: Order | None = None,
        before_seq: int | None = None,
        limit: int = 100,
    ) -> HitPage:
        """Returns the newest hits that fit.

        Args:
            probe: id; None: of all.
            host: id; None: of all.
            before: only hits that come before this one.
            before_seq: only hits with a smaller sequence.
            limit: how many, at least 1.

        Raises:
            Unavailable: the store does not answer.
        """
        await self.flush()
        found: list[_Found] = []  # a min-heap: its root is the oldest of the best
        offset = 0
        while True:
            page = await self._store.chunks(
                probe=probe, host=host, until_ns=before[0] if before else None, offset=offset, limit=_PAGE
            )
            done = await asyncio.to_thread(_scan, page, found, before, before_seq, limit)
            offset += len(page)
            if done or len(page) < _PAGE:
                break
        shown = sorted(found)[-limit:]
        rows = await asyncio.to_thread(lambda: [hit for _, _, b, row in shown for hit in b.hits(row, row + 1)])
        return HitPage(rows, shown[0][0] if len(found) > limit else None)


def _chunks_of(frames: Sequence[HitFrame]) -> list[Chunk]:
    groups: dict[Key, list[HitFrame]] = {}
    for frame in frames:
        h = frame.header
        groups.setdefault((h.probe, h.host, h.source), []).append(frame)
    return [
        Chunk(
            id=new_id("chk"),
            probe=probe,
            host=host,
            source=source,
            seq_from=min(f.header.seq for f in group),
            seq_to=max(f.header.seq + f.header.count - 1 for f in group),
            t0_ns=min(f.first_ns for f in group),
            t1_ns=max(f.last_ns for f in group),
            count=sum(f.header.count for f in group),
            data=pack([f.raw for f in group]),
        )
        for (probe, host, source), group in groups.items()
    ]


def _scan(
    chunks: Sequence[Chunk],
    found: list[_Found],
    before: Order | None,
    before_seq: int | None,
    limit: int,
) -> bool:
    """Puts the best ``limit`` + 1 rows of chunks into the heap; True when no later chunk can have a better one."""
    number = max((n for _, n, _, _ in found), default=0)
    for chunk in chunks:
        if len(found) > limit and chunk.t1_ns < found[0][0][0]:
            return True
        try:
            batches = [hits.decode(raw) for raw in unpack(chunk.data)]
        except ProtocolError as e:
            log.error("chunk %s: %s", chunk.id, e)
            continue
        for batch in batches:
            h = batch.header
            for row, ts in enumerate(batch.columns["ts"].tolist()):
                order = (ts + h.clock_offset, h.probe, h.host, h.source, h.seq + row)
                if (before is not None and order >= before) or (before_seq is not None and order[4] >= before_seq):
                    continue
                number += 1
                if len(found) <= limit:
                    heapq.heappush(found, (order, number, batch, row))
                elif order > found[0][0]:
                    heapq.heapreplace(found, (order, number, batch, row))
    return False
