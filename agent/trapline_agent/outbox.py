"""What waits to go to the service: encoded hit batches and aggregate frames, bounded in bytes, numbered, and kept until
acknowledged.

No I/O and no clock here: the link takes batches with ``next``, tells of acknowledgements with ``ack`` and of a new
connection with ``rewind``.

A batch is in one of two places. *Waiting*: never sent. *In flight*: sent under a link sequence, not acknowledged; only
the service knows whether it arrived. Whatever must be dropped is taken from those that wait, oldest first and whole,
so that a hit is never both delivered and counted as dropped; and in-flight batches may fill no more than half of the
bound, so that there is always a waiting one to drop instead.

Aggregate frames of a probe that wait are added up to one: an hour without the service costs no more room than its keys do.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass

from trapline.protocol import aggregates

STAGE = "agent-outbox"
DEFAULT_CAPACITY_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True)
class Drop:
    """Hits of one probe that will not reach the service; ``stage`` says where they were lost."""

    probe: str
    stage: str
    count: int


@dataclass(eq=False, slots=True)
class _Waiting:
    """A frame that was never sent; while it waits, what follows on it may be added."""

    frame: bytes
    key: tuple[str, str] | None = None
    """Probe and source, of an aggregate."""


class Outbox:
    """Bounded queue of encoded batches with at-least-once sequences. Belongs to one event loop.

    Attributes:
        empty: set while everything that was put is acknowledged or dropped.
        ready: set whenever there may be something for ``next`` or ``take_drops``; the link clears it before it looks.
        dropped: hits dropped here since the start, by probe: the ``agent-outbox`` part of a probe's counters.
    """

    def __init__(self, capacity_bytes: int = DEFAULT_CAPACITY_BYTES) -> None:
        if capacity_bytes < 2:
            raise ValueError("an outbox needs room for something")
        self._capacity = capacity_bytes
        self._waiting: deque[_Waiting] = deque()
        self._growing: dict[tuple[str, str], _Waiting] = {}
        """The last of those that wait, of each aggregate."""
        self._waiting_bytes = 0
        self._flight: deque[tuple[int, bytes]] = deque()
        self._flight_bytes = 0
        self._resend = 0
        self._last_seq = 0
        self._notices: dict[tuple[str, str], int] = {}
        self.ready = asyncio.Event()
        self.empty = asyncio.Event()
        self.empty.set()
        self.dropped: dict[str, int] = {}

    @property
    def size_bytes(self) -> int:
        """Bytes held, waiting and in flight."""
        return self._waiting_bytes + self._flight_bytes

    def put(self, batch: bytes) -> None:
        """Adds an encoded batch; drops the oldest waiting ones where the bound is exceeded, this one if it must be."""
        if aggregates.is_delta(batch):
            self._put_delta(batch)
        else:
            self._append(_Waiting(batch))
        while self._waiting and self.size_bytes > self._capacity:
            self._drop(self._take())
        self._moved()

    def _append(self, item: _Waiting) -> None:
        self._waiting.append(item)
        self._waiting_bytes += len(item.frame)

    def _put_delta(self, frame: bytes) -> None:
        head = aggregates.peek(frame)
        key = (head.probe, head.source)
        before = self._growing.get(key)
        if before is not None and (sum_ := aggregates.merged(before.frame, frame)) is not None:
            self._waiting_bytes += len(sum_) - len(before.frame)
            before.frame = sum_
            return
        self._growing[key] = _Waiting(frame, key)
        self._append(self._growing[key])

    def _take(self) -> bytes:
        """Takes the oldest that waits."""
        item = self._waiting.popleft()
        self._waiting_bytes -= len(item.frame)
        if item.key is not None and self._growing.get(item.key) is item:
            del self._growing[item.key]
        return item.frame

    def _moved(self) -> None:
        if self._waiting or self._flight:
            self.empty.clear()
        else:
            self.empty.set()
        self.ready.set()

    def _drop(self, batch: bytes) -> None:
        header = aggregates.head(batch)
        self.dropped[header.probe] = self.dropped.get(header.probe, 0) + header.count
        # What the batch would have told of earlier losses is lost with it, so it is told here.
        for stage, count in {STAGE: header.count, **header.drops}.items():
            key = (header.probe, stage)
            self._notices[key] = self._notices.get(key, 0) + count

    def next(self) -> tuple[int, bytes] | None:
        """Returns the link sequence and the bytes of the batch to send now, or None: nothing waits, or too much is in
        flight."""
        if self._resend:
            item = self._flight[len(self._flight) - self._resend]
            self._resend -= 1
            return item
        # One batch may always fly, however large, or it would wait for ever.
        if not self._waiting or (
            self._flight and self._flight_bytes + len(self._waiting[0].frame) > self._capacity // 2
        ):
            return None
        batch = self._take()
        self._last_seq += 1
        self._flight.append((self._last_seq, batch))
        self._flight_bytes += len(batch)
        return self._flight[-1]

    def ack(self, link_seq: int) -> None:
        """Forgets what the service has: all sequences up to and with ``link_seq``."""
        while self._flight and self._flight[0][0] <= link_seq:
            self._flight_bytes -= len(self._flight.popleft()[1])
        self._resend = min(self._resend, len(self._flight))
        self._moved()

    def rewind(self, link_seq: int) -> None:
        """A new connection: the service has everything up to ``link_seq``; what flew beyond is to be sent again."""
        self.ack(link_seq)
        self._resend = len(self._flight)
        self.ready.set()

    def take_drops(self) -> list[Drop]:
        """Returns what was dropped and not told yet."""
        drops = [Drop(probe, stage, count) for (probe, stage), count in self._notices.items()]
        self._notices.clear()
        return drops

    def untake_drops(self, drops: list[Drop]) -> None:
        """Puts back what ``take_drops`` gave and could not be told."""
        for drop in drops:
            key = (drop.probe, drop.stage)
            self._notices[key] = self._notices.get(key, 0) + drop.count
        self.ready.set()

    def forget(self, probe: str) -> None:
        """Drops the counter of a probe that is gone; its batches still go out."""
        self.dropped.pop(probe, None)
