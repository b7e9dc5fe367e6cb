"""The thread that sends to the agent: what is due later goes out though nobody calls."""

from __future__ import annotations

import socket
import threading

from tests.support.children import TIMEOUT_S
from trapline.protocol.aggregates import decode
from trapline_agent.engines.aggregate import AggregateStore
from trapline_agent.engines.ring import HitRing
from trapline_agent.plans import AggregatePlan
from trapline_agent.tracer import messages as m
from trapline_agent.tracer.shipper import Shipper


def test_what_came_too_soon_for_a_frame_goes_in_the_next() -> None:
    """The first hit goes at once, those that follow together when their time has come; nothing but the first said so."""
    counts: list[int] = []
    second = threading.Event()

    def drain() -> list[tuple[HitRing, int, bytes]]:
        frames = store.drain(host="h", probe="p", source="s", generation=1, sites=[], comms={}, last=False)
        shipper.again_at = store.due
        counts.extend(decode(frame).count for _, frame in frames)
        if counts and store.hits == 1:
            for _ in range(3):
                sink(0, 1, 1, (), -1)
        if len(counts) == 2:
            second.set()
        return [(store, count, frame) for count, frame in frames]

    shipper = Shipper(drain)
    store = AggregateStore(AggregatePlan("count"), [], {}, on_data=shipper.data)
    sink = store.sink(0)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        shipper.connect(ours, m.Renew())
        sink(0, 1, 1, (), -1)
        assert second.wait(TIMEOUT_S)
        shipper.close()
    assert counts == [1, 3]
    assert store.hits == 4
