"""Fan-out: every batch to every subscriber that wants it, and no subscriber in the way of another.

Nothing here waits for a socket. A subscriber has a queue of its own, bounded in bytes; when it is full its oldest
batches give way, whole, and a ``Gap`` says how many hits of which probe it will not see. Batches are handed over on one
shared tick, so that a socket wakes up sixty times a second and not ten thousand times; JSON is encoded once a batch,
binary is passed on as the host encoded it.
"""

from __future__ import annotations

import asyncio
import json
import struct
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from trapline.errors import Conflict, NotFound, ProtocolError, TraplineError
from trapline.protocol.messages import encode
from trapline.protocol.stream import Bye, Gap, StreamError, Subscribe, Subscribed
from trapline_service.frames import HitFrame
from trapline_service.ledger import Loss

TICK_S = 0.016
BUSY_TICK_S = 0.033
BUSY_SUBSCRIBERS = 20
"""Beyond so many the tick is longer: fewer, larger writes."""
MAX_SUBSCRIPTIONS = 64
_TAKE_BYTES = 128 * 1024
_MAX_CONTROL = 1024
_LOSS_BYTES = 256
_ENTRY_BYTES = 128
"""What a queued entry costs beside its payload; it bounds the number of tiny batches too."""
_OF_PROBES = ("probes", "aggregates")
"""Topics whose resources are probes, or belong to one."""
_PREFIX = struct.Struct("<II")

Item = HitFrame | Loss
NameOf = Callable[[str], str]


class Sink(Protocol):
    """Whoever takes hits from the hub."""

    def deliver(self, items: Sequence[Item]) -> None:
        """Takes the items of one tick, in order. Must neither wait nor raise."""
        ...


@dataclass(eq=False)
class Subscription:
    """One of a subscriber's subscriptions."""

    id: str
    number: int
    topic: str
    probes: frozenset[str] | None
    hosts: frozenset[str] | None
    disconnect_when_slow: bool
    paused: bool = False
    missed: dict[tuple[str, str], _Span] = field(default_factory=dict)
    """What passed by while it was paused."""


@dataclass
class _Span:
    """A count of hits and the sequence range they lie in, where it is known."""

    count: int = 0
    seq_from: int | None = None
    seq_to: int | None = None

    def add(self, item: Item) -> None:
        first: int | None
        last: int | None
        if isinstance(item, HitFrame):
            h = item.header
            count, first, last = h.count, h.seq, h.seq + h.count - 1
        else:
            count, first, last = item.count, item.seq_from, item.seq_to
        self.count += count
        if first is not None and last is not None:
            self.seq_from = first if self.seq_from is None else min(self.seq_from, first)
            self.seq_to = last if self.seq_to is None else max(self.seq_to, last)


@dataclass(slots=True)
class _Entry:
    subscription: Subscription
    item: Item
    size: int


def _pair(item: Item) -> tuple[str, str]:
    if isinstance(item, HitFrame):
        return item.header.probe, item.header.host
    return item.probe, item.host


class Subscriber:
    """What waits for one socket. The hub fills it, the socket's writer drains it with ``take``. One event loop."""

    def __init__(self, *, binary: bool, max_bytes: int, probe_name: NameOf = str, host_name: NameOf = str) -> None:
        """
        Args:
            binary: hits as binary frames rather than JSON.
            max_bytes: bound of what waits.
            probe_name: gives a probe's name for its id, so that a filter may have either.
            host_name: the same for hosts.
        """
        self.binary = binary
        self._max_bytes = max_bytes
        self._probe_name = probe_name
        self._host_name = host_name
        self._subscriptions: dict[str, Subscription] = {}
        self._numbers = 0
        self._control: deque[str] = deque()
        self._gaps: dict[tuple[str, str, str, str], _Span] = {}
        self._statuses: dict[tuple[str, str], str] = {}
        self._queue: deque[_Entry] = deque()
        self._queued_bytes = 0
        self._wake = asyncio.Event()
        self.ended = asyncio.Event()

    @property
    def closed(self) -> bool:
        return self.ended.is_set()

    # --- what the client says ---

    def subscribe(self, message: Subscribe) -> Subscription:
        """Begins a subscription.

        Raises:
            Conflict: the id is in use.
            ProtocolError: too many subscriptions on this socket.
        """
        if message.id in self._subscriptions:
            raise Conflict(f"subscription `{message.id}` is there already", hint="unsubscribe it first")
        if len(self._subscriptions) >= MAX_SUBSCRIPTIONS:
            raise ProtocolError(f"more than {MAX_SUBSCRIPTIONS} subscriptions on one socket")
        self._numbers += 1
        wanted = message.filter
        subscription = Subscription(
            id=message.id,
            number=self._numbers,
            topic=message.topic,
            probes=None if wanted.probes is None else frozenset(wanted.probes),
            hosts=None if wanted.hosts is None else frozenset(wanted.hosts),
            disconnect_when_slow=message.on_slow == "disconnect",
        )
        self._subscriptions[message.id] = subscription
        self.say(encode(Subscribed(id=subscription.id, number=subscription.number)))
        return subscription

    def unsubscribe(self, id: str) -> None:
        """Ends a subscription; what waits for it is thrown away."""
        subscription = self._get(id)
        del self._subscriptions[id]
        kept = [entry for entry in self._queue if entry.subscription is not subscription]
        self._queue = deque(kept)
        self._queued_bytes = sum(entry.size for entry in kept)
        self._gaps = {key: span for key, span in self._gaps.items() if key[0] != id}
        self._statuses = {key: text for key, text in self._statuses.items() if key[0] != id}

    def pause(self, id: str) -> None:
        """Hits that come from now on are counted and not sent."""
        self._get(id).paused = True

    def resume(self, id: str) -> None:
        """Goes on; a gap of stage ``paused`` says what passed by."""
        subscription = self._get(id)
        subscription.paused = False
        for (probe, host), span in subscription.missed.items():
            loss = Loss(probe, host, span.count, "paused", span.seq_from, span.seq_to)
            self._push(_Entry(subscription, loss, _LOSS_BYTES))
        subscription.missed = {}
        self._wake.set()

    def _get(self, id: str) -> Subscription:
        try:
            return self._subscriptions[id]
        except KeyError:
            raise NotFound(f"no subscription `{id}` on this socket", suggestions=list(self._subscriptions)) from None

    # --- what the hub says ---

    def deliver(self, items: Sequence[Item]) -> None:
        wanted = [s for s in self._subscriptions.values() if s.topic == "hits"]
        if not wanted or self.closed:
            return
        for item in items:
            probe, host = _pair(item)
            for subscription in wanted:
                if not self._matches(subscription, probe, host):
                    continue
                if subscription.paused:
                    subscription.missed.setdefault((probe, host), _Span()).add(item)
                    continue
                if isinstance(item, Loss):
                    size = _LOSS_BYTES
                else:
                    size = _ENTRY_BYTES + (len(item.raw) if self.binary else len(item.json))
                self._push(_Entry(subscription, item, size))
        self._wake.set()

    def _matches(self, s: Subscription, probe: str, host: str) -> bool:
        return (s.probes is None or probe in s.probes or self._probe_name(probe) in s.probes) and (
            s.hosts is None or host in s.hosts or self._host_name(host) in s.hosts
        )

    def _push(self, entry: _Entry) -> None:
        self._queue.append(entry)
        self._queued_bytes += entry.size
        while self._queued_bytes > self._max_bytes and self._queue:
            oldest = self._queue.popleft()
            self._queued_bytes -= oldest.size
            if oldest.subscription.disconnect_when_slow:
                self.close("this subscriber is too slow, and asked to be disconnected then")
                return
            stage = oldest.item.stage if isinstance(oldest.item, Loss) else "subscriber-queue"
            key = (oldest.subscription.id, *_pair(oldest.item), stage)
            self._gaps.setdefault(key, _Span()).add(oldest.item)

    def changed(self, topic: str, id: str, fields: str) -> None:
        """Takes a resource's new state; one that waits still is replaced.

        Args:
            topic: ``probes``, ``hosts`` or ``aggregates``.
            id: the resource's.
            fields: the JSON members of ``Status`` after its own ``id``.
        """
        for subscription in self._subscriptions.values():
            if subscription.topic == topic and self.concerns(subscription, id):
                self.tell(subscription, id, fields)

    def watches(self, topic: str, id: str) -> bool:
        """Says whether one of its subscriptions is about this resource."""
        return any(s.topic == topic and self.concerns(s, id) for s in self._subscriptions.values())

    def concerns(self, s: Subscription, id: str) -> bool:
        """Says whether a resource of the subscription's topic passes its filter."""
        only, name = (s.probes, self._probe_name) if s.topic in _OF_PROBES else (s.hosts, self._host_name)
        return only is None or id in only or name(id) in only

    def tell(self, subscription: Subscription, id: str, fields: str) -> None:
        """Tells one subscription of a resource's state."""
        key = (subscription.id, id)
        self._statuses.pop(key, None)
        self._statuses[key] = f'{{"type":"status","id":{json.dumps(subscription.id)},{fields}}}'
        self._wake.set()

    def say(self, text: str) -> None:
        """Queues a control frame; these are never dropped, so a client that reads none of them is let go."""
        if len(self._control) >= _MAX_CONTROL:
            self.close("this client asks and does not read the answers")
            return
        self._control.append(text)
        self._wake.set()

    def refuse(self, error: TraplineError, id: str = "") -> None:
        """Answers a message that cannot be done."""
        self.say(encode(StreamError(id=id, error=error.to_wire())))

    def close(self, reason: str, *, retry_after: float = 1.0) -> None:
        """Ends it: what waits is thrown away, ``take`` gives a last ``bye`` and then nothing."""
        if self.closed:
            return
        self.ended.set()
        self._queue.clear()
        self._queued_bytes = 0
        self._gaps.clear()
        self._statuses.clear()
        self._control.clear()
        self._control.append(encode(Bye(reason=reason, retry_after=retry_after)))
        self._wake.set()

    # --- what the socket takes ---

    async def take(self) -> list[str | bytes]:
        """Waits for something to send, and returns some 128 KiB of it at most (one batch may be larger).

        Returns:
            Text and binary frames in order; empty when it is closed and the last was taken.
        """
        while True:
            if frames := self._drain():
                return frames
            if self.closed:
                return []
            self._wake.clear()
            await self._wake.wait()

    def _drain(self) -> list[str | bytes]:
        frames: list[str | bytes] = list(self._control)
        self._control.clear()
        # What was dropped is older than all that waits, so its gaps come first.
        for (id, probe, host, stage), span in self._gaps.items():
            frames.append(_gap(id, probe, host, stage, span))
        self._gaps.clear()
        frames += self._statuses.values()
        self._statuses.clear()
        size = 0
        rows: list[str] = []
        of: Subscription | None = None
        while self._queue and size < _TAKE_BYTES:
            entry = self._queue.popleft()
            size += entry.size
            item, subscription = entry.item, entry.subscription
            if isinstance(item, HitFrame) and not self.binary:
                if subscription is not of and of is not None:
                    frames.append(_rows(of, rows))
                    rows = []
                of = subscription
                rows.append(item.json)
                continue
            if of is not None:
                frames.append(_rows(of, rows))
                rows, of = [], None
            if isinstance(item, HitFrame):
                frames.append(_PREFIX.pack(subscription.number, 0) + item.raw)
            else:
                span = _Span(item.count, item.seq_from, item.seq_to)
                frames.append(_gap(subscription.id, item.probe, item.host, item.stage, span))
        if of is not None:
            frames.append(_rows(of, rows))
        self._queued_bytes -= size
        return frames


def _rows(subscription: Subscription, rows: list[str]) -> str:
    return f'{{"type":"batch","id":{json.dumps(subscription.id)},"items":[{",".join(rows)}]}}'


def _gap(id: str, probe: str, host: str, stage: str, span: _Span) -> str:
    gap = Gap(id=id, probe=probe, host=host, count=span.count, seq_from=span.seq_from, seq_to=span.seq_to, stage=stage)
    return gap.model_dump_json()


class Hub:
    """Where batches come in and subscribers hang on. Belongs to one event loop."""

    def __init__(self) -> None:
        self._sinks: list[Sink] = []
        self._subscribers: dict[Subscriber, None] = {}
        self._pending: list[Item] = []
        self._timer: asyncio.TimerHandle | None = None

    def attach(self, sink: Sink) -> None:
        """Gives hits to a sink that is no socket: the recorder."""
        self._sinks.append(sink)

    def join(self, subscriber: Subscriber) -> None:
        self._subscribers[subscriber] = None

    def leave(self, subscriber: Subscriber) -> None:
        self._subscribers.pop(subscriber, None)

    @property
    def subscribers(self) -> int:
        return len(self._subscribers)

    def publish(self, items: Sequence[Item]) -> None:
        """Passes items on at the next tick, in the order in which they came."""
        self._pending += items
        if self._timer is None and self._pending:
            tick = BUSY_TICK_S if len(self._subscribers) > BUSY_SUBSCRIBERS else TICK_S
            self._timer = asyncio.get_running_loop().call_later(tick, self.flush)

    def flush(self) -> None:
        """The tick."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        items, self._pending = self._pending, []
        if items:
            for sink in (*self._sinks, *self._subscribers):
                sink.deliver(items)

    def wanted(self, topic: str, id: str) -> bool:
        """Says whether anybody watches this resource of a topic."""
        return any(subscriber.watches(topic, id) for subscriber in self._subscribers)

    def changed(self, topic: str, id: str, fields: str) -> None:
        """Tells everybody who watches the topic of a resource's new state; see ``Subscriber.changed``."""
        for subscriber in self._subscribers:
            subscriber.changed(topic, id, fields)

    def close(self, reason: str) -> None:
        """Says good-bye to all subscribers."""
        self.flush()
        for subscriber in list(self._subscribers):
            subscriber.close(reason)
