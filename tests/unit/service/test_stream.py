"""Hits from an agent to subscribers: nothing lost without being counted, and nobody in another's way."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from websockets.asyncio.client import ClientConnection

from tests.unit.service.peers import OFFSET, T0, SubscriberPeer, World, batch, rows
from trapline.model import Counters, Hit
from trapline.protocol import hits
from trapline.protocol import messages as m
from trapline.protocol import stream as st
from trapline_service.config import Settings
from trapline_service.frames import HitFrame
from trapline_service.hub import Hub, Subscriber
from trapline_service.ledger import Loss
from trapline_service.server import Server


async def collect(subscriber: SubscriberPeer, hits_wanted: int) -> tuple[list[int], list[st.Gap]]:
    """Reads until so many hits came or were named in gaps; returns their sequences, and the gaps."""
    seqs: list[int] = []
    gaps: list[st.Gap] = []
    while len(seqs) + sum(g.count for g in gaps) < hits_wanted:
        message = await subscriber.next()
        if isinstance(message, st.Gap):
            gaps.append(message)
        elif isinstance(message, st.HitItems):
            seqs += [hit.seq for hit in message.items]
        elif isinstance(message, tuple):
            header, _ = hits.peek(message[1])
            seqs += range(header.seq, header.seq + header.count)
    return seqs, gaps


async def test_json_and_binary_say_the_same(world: World) -> None:
    async with (
        world.agent() as agent,
        world.subscriber() as plain,
        world.subscriber([st.BINARY_SUBPROTOCOL]) as binary,
    ):
        assert plain.connection.subprotocol == st.JSON_SUBPROTOCOL
        assert binary.connection.subprotocol == st.BINARY_SUBPROTOCOL
        probe = await world.create("app:f {n=arg0, s=str(arg1)}")
        await plain.subscribe("a")
        number = (await binary.subscribe("b")).number
        sent = batch(probe["id"], text='naïve \x07"')
        await agent.send_batch(sent)
        got_number, raw = await binary.next()
        assert (got_number, raw) == (number, sent)
        items = rows(await plain.next())
        assert items == [json.loads(hit.model_dump_json()) for hit in hits.decode(raw).hits()]
        assert items[3]["args"] == {"n": 3, "s": 'naïve \x07"'}
        assert items[3]["ts_ns"] == str(T0 + 3000 + OFFSET)
        assert (items[3]["comm"], items[3]["site"], items[3]["host"]) == ("app", "app:f", "hst_a")


async def test_filters_by_id_and_by_name(world: World) -> None:
    async with world.agent() as a, world.agent("hst_b", name="db-1", link_id="l2") as b, world.subscriber() as s:
        one, two = await world.create("app:one"), await world.create("app:two")
        await s.subscribe("by-name", filter={"probes": ["one"], "hosts": ["db-1"]})
        await s.subscribe("by-id", filter={"probes": [two["id"]]})
        for probe in (one, two):
            await a.send_batch(batch(probe["id"], count=1))
            await b.send_batch(batch(probe["id"], count=1, host="hst_b"))
        await a.until(lambda: a.acked == 2)
        await b.until(lambda: b.acked == 2)
        await s.send(st.Unsubscribe(id="nothing"))  # its answer comes after all that was due
        got = []
        while True:
            message = await s.next()
            if isinstance(message, st.StreamError):
                break
            got += [(message.id, hit["probe"], hit["host"]) for hit in rows(message)]
        while len(got) < 3:
            message = await s.next()
            got += [(message.id, hit["probe"], hit["host"]) for hit in rows(message)]
        assert sorted(got) == sorted(
            [("by-name", one["id"], "hst_b"), ("by-id", two["id"], "hst_a"), ("by-id", two["id"], "hst_b")]
        )


async def test_every_hit_is_delivered_or_counted(world: World) -> None:
    async with world.agent() as agent, world.subscriber() as s:
        probe = (await world.create())["id"]
        await s.subscribe("s")
        await agent.send_batch(batch(probe, seq=0))
        await agent.send_batch(batch(probe, seq=17, drops={"tracer-ring": 7}))  # 10 to 16
        await agent.say(m.LinkDrops(probe=probe, count=20))  # 27 to 46, told before the jump
        await agent.send_batch(batch(probe, seq=47))
        await agent.send_batch(batch(probe, seq=60))  # 57 to 59: nobody has said why
        await agent.send_batch(batch(probe, seq=75, drops={"tracer-ring": 2}))  # 70 to 74, of which 2 were said
        seqs, gaps = await collect(s, 85)
        assert seqs == [*range(10), *range(17, 27), *range(47, 57), *range(60, 70), *range(75, 85)]
        assert [(g.stage, g.count, g.seq_from, g.seq_to) for g in gaps] == [
            ("tracer-ring", 7, 10, 16),
            ("agent-outbox", 20, None, None),
            ("unknown", 3, 57, 59),
            ("unknown", 3, None, None),
            ("tracer-ring", 2, None, None),
        ]
        status = (await world.get("/probes/f"))["status"]
        assert status["counters"]["hits"] == 85
        assert status["counters"]["dropped"] == 35
        assert status["dropped_by_reason"] == {"agent-outbox": 20, "tracer-ring": 9, "unknown": 6}
        # The agent says after all where three of them went: they move, nothing is counted twice.
        await agent.say(m.LinkDrops(probe=probe, count=3))
        await agent.observe(probe, counters=Counters(hits=85, dropped=32), dropped_by_reason={"tracer-ring": 9})
        await s.subscribe("p", "probes")
        await s.until(lambda x: isinstance(x, st.Status) and x.probe.status.dropped_by_reason.get("unknown") == 3)
        status = (await world.get("/probes/f"))["status"]
        assert (status["counters"]["hits"], status["counters"]["dropped"]) == (85, 35)
        assert status["dropped_by_reason"] == {"agent-outbox": 23, "tracer-ring": 9, "unknown": 3}
        assert len((await world.get("/probes/f/hits"))["items"]) == 50


def stop_reading(connection: ClientConnection) -> None:
    """Makes a client read nothing more, as one whose program hangs."""
    connection.transport.pause_reading()


async def test_a_stuck_subscriber_harms_nobody_and_learns_what_it_missed(settings: Settings) -> None:
    settings = settings.model_copy(update={"subscriber_queue_bytes": 128 * 1024})
    batches, count, pad = 120, 4, 65536  # 8 MB: more than any socket's buffers hold
    async with (
        Server(settings) as server,
        World(server.url, server.new_token or "") as world,
        world.agent() as agent,
        world.subscriber([st.BINARY_SUBPROTOCOL]) as stuck,
        world.subscriber([st.BINARY_SUBPROTOCOL]) as healthy,
    ):
        probe = (await world.create())["id"]
        await stuck.subscribe("s")
        await healthy.subscribe("s")
        stop_reading(stuck.connection)
        received: list[int] = []
        for n in range(batches):
            await agent.send_batch(batch(probe, seq=n * count, count=count, pad=pad))
            # Each arrives while the other one hangs.
            seqs, gaps = await collect(healthy, count)
            received += seqs
            assert gaps == []
        assert received == list(range(batches * count))
        (queue,) = [s for s in server.service.hub._subscribers if s._queued_bytes]
        assert queue._queued_bytes <= 128 * 1024
        stuck.connection.transport.resume_reading()
        seqs, gaps = await collect(stuck, batches * count)
        assert {g.stage for g in gaps} == {"subscriber-queue"}
        assert sum(g.count for g in gaps) == batches * count - len(seqs) > 0
        named = [n for g in gaps for n in range(g.seq_from or 0, (g.seq_to or 0) + 1)]
        assert sorted(seqs + named) == list(range(batches * count))
        status = (await world.get("/probes/f"))["status"]
        assert status["counters"]["dropped"] == 0


async def test_a_slow_subscriber_that_asked_for_it_is_disconnected(settings: Settings) -> None:
    settings = settings.model_copy(update={"subscriber_queue_bytes": 1024})
    async with (
        Server(settings) as server,
        World(server.url, server.new_token or "") as world,
        world.agent() as agent,
        world.subscriber() as s,
    ):
        probe = (await world.create())["id"]
        await s.subscribe("s", on_slow="disconnect")
        await agent.send_batch(batch(probe, count=100))
        assert isinstance(await s.until(lambda x: isinstance(x, st.Bye)), st.Bye)
        await asyncio.wait_for(s.connection.wait_closed(), 10)


async def test_pause_and_resume(world: World) -> None:
    async with world.agent() as agent, world.subscriber() as s:
        probe = (await world.create())["id"]
        await s.subscribe("s")
        await s.subscribe("witness")
        await agent.send_batch(batch(probe, seq=0))
        await s.until(lambda x: isinstance(x, st.HitItems) and x.id == "witness")
        await s.send(st.Pause(id="s"))
        await s.send(st.Subscribe(id="after-pause", topic="hosts"))
        await s.until(lambda x: isinstance(x, st.Subscribed))
        await agent.send_batch(batch(probe, seq=10))
        await agent.send_batch(batch(probe, seq=25, drops={"tracer-ring": 5}))
        await s.until(lambda x: isinstance(x, st.HitItems) and x.id == "witness" and x.items[-1].seq == 34)
        await s.send(st.Resume(id="s"))
        gap = await s.until(lambda x: x.id == "s")
        assert isinstance(gap, st.Gap)
        assert (gap.stage, gap.count, gap.seq_from, gap.seq_to) == ("paused", 25, 10, 34)
        await agent.send_batch(batch(probe, seq=35))
        message = await s.until(lambda x: x.id == "s")
        assert [hit.seq for hit in message.items] == list(range(35, 45))


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        ("{}", "protocol-error"),
        ('{"type":"subscribe","id":"","topic":"hits"}', "protocol-error"),
        ('{"type":"subscribe","id":"x","topic":"weather"}', "protocol-error"),
        ('{"type":"pause","id":"nobody"}', "not-found"),
        ('{"type":"subscribe","id":"s","topic":"hits"}', "conflict"),
        (b"\0\1", "protocol-error"),
        (" " * 70_000, "protocol-error"),
    ],
)
async def test_a_wrong_request_is_answered_and_the_stream_goes_on(world: World, frame: Any, code: str) -> None:
    async with world.agent() as agent, world.subscriber() as s:
        await s.subscribe("s")
        await s.send(frame)
        answer = await s.next()
        assert isinstance(answer, st.StreamError)
        assert answer.error["code"] == code
        probe = (await world.create())["id"]
        await agent.send_batch(batch(probe))
        assert len(rows(await s.next())) == 10


async def test_status_topics_begin_with_all_there_is(world: World) -> None:
    async with world.agent() as agent:
        probe = await world.create()
        async with world.subscriber() as s:
            await s.subscribe("p", "probes")
            first = await s.next()
            assert (first.probe.id, first.host, first.removed) == (probe["id"], None, None)
            await s.subscribe("h", "hosts")
            assert (await s.until(lambda x: x.id == "h")).host.facts.name == "web-1"
            await agent.observe(probe["id"], counters=3)
            await s.until(lambda x: x.id == "p" and x.probe.status.counters.hits == 3)
            await world.http.delete("/probes/f")
            await s.until(lambda x: x.id == "p" and x.removed == probe["id"])
        async with world.subscriber() as s:
            await s.subscribe("h", "hosts")
            await s.next()
            await agent._connection.close()
            await s.until(lambda x: x.host is not None and not x.host.online)


async def test_a_service_that_stops_says_so(settings: Settings) -> None:
    async with (
        Server(settings) as server,
        World(server.url, server.new_token or "") as world,
        world.agent() as agent,
        world.subscriber() as s,
    ):
        await s.subscribe("s")
        await asyncio.gather(server.stop(), s.until(lambda x: isinstance(x, st.Bye)), agent.closed())


async def test_hits_of_a_probe_that_is_gone_are_taken_and_forgotten(world: World) -> None:
    async with world.agent() as agent:
        await agent.send_batch(batch("prb_never"))
        await agent.until(lambda: agent.acked == 1)
        assert (await world.get("/hits"))["items"] == []


async def test_json_is_encoded_once_for_all() -> None:
    hub = Hub()
    subscribers = [Subscriber(binary=False, max_bytes=1 << 20) for _ in range(5)]
    frame = HitFrame(batch("prb_a"))
    for subscriber in subscribers:
        subscriber.subscribe(st.Subscribe(id="s", topic="hits"))
        hub.join(subscriber)
    hub.publish([frame])
    hub.flush()
    assert frame._json is not None
    assert all(subscriber._queue[0].item is frame for subscriber in subscribers)
    taken = [await subscriber.take() for subscriber in subscribers]
    assert taken == [taken[0]] * 5
    message = st.parse_server_message(taken[0][1])
    assert isinstance(message, st.HitItems)
    assert [h.seq for h in message.items] == list(range(10))
    assert isinstance(message.items[0], Hit)


async def test_one_tick_is_one_message() -> None:
    hub = Hub()
    subscriber = Subscriber(binary=False, max_bytes=1 << 20)
    subscriber.subscribe(st.Subscribe(id="s", topic="hits"))
    hub.join(subscriber)
    await subscriber.take()
    hub.publish([HitFrame(batch("prb_a", seq=10 * n)) for n in range(5)])
    (text,) = await subscriber.take()
    assert [h["seq"] for h in json.loads(text)["items"]] == list(range(50))


async def test_losses_that_wait_too_long_keep_their_stage() -> None:
    subscriber = Subscriber(binary=True, max_bytes=1024)
    subscriber.subscribe(st.Subscribe(id="s", topic="hits"))
    await subscriber.take()
    for n in range(100):
        subscriber.deliver([Loss("prb_a", "hst_a", 2, "tracer-ring", 2 * n, 2 * n + 1)])
    gaps = [st.parse_server_message(frame) for frame in await subscriber.take()]
    assert sum(g.count for g in gaps if isinstance(g, st.Gap)) == 200
    assert {g.stage for g in gaps if isinstance(g, st.Gap)} == {"tracer-ring"}
    assert len(gaps) < 10
