"""The link against a real WebSocket server: hello, words before hits, cuts, refusals."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.unit.agent.batches import batch
from tests.unit.agent.service_peer import TIMEOUT_S, Peer, ServicePeer, service_peer
from trapline.errors import AuthError, NotFound, ProtocolError
from trapline.model import HostFacts
from trapline.protocol import messages as m
from trapline_agent.link import Link
from trapline_agent.outbox import STAGE, Outbox


class Recorder:
    """The agent's side, as the link sees it."""

    def __init__(self) -> None:
        self.welcomes: asyncio.Queue[m.Welcome] = asyncio.Queue()
        self.wanted: asyncio.Queue[m.Desired] = asyncio.Queue()
        self.answers: dict[str, Any] = {}

    def hello(self) -> m.Hello:
        return m.Hello(instance_id="hst_a", link_id="lnk_a", pid=1, facts=HostFacts(name="a", boot_id="b"))

    async def welcomed(self, welcome: m.Welcome) -> None:
        self.welcomes.put_nowait(welcome)

    def desired(self, desired: m.Desired) -> None:
        self.wanted.put_nowait(desired)

    async def request(self, request: m.Request) -> dict[str, Any]:
        answer = self.answers[request.params["q"]]
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, asyncio.Event):
            await answer.wait()
            return {}
        assert isinstance(answer, dict)
        return answer


class Linked:
    """A link that runs against a service's end."""

    def __init__(self, service: ServicePeer, capacity_bytes: int = 1 << 20, token: str = "tlp_test") -> None:
        self.service = service
        self.handler = Recorder()
        self.outbox = Outbox(capacity_bytes)
        url = "ws" + service.url.removeprefix("http") + "/api/v1/agents/link"
        self.link = Link(url, token, handler=self.handler, outbox=self.outbox, reconnect_max_s=0.01)

    async def meet(self, **welcome: Any) -> Peer:
        """Accepts the next connection and welcomes it; returns when the agent has heard of it."""
        peer = await self.service.accept()
        await peer.welcome(**welcome)
        async with asyncio.timeout(TIMEOUT_S):
            await self.handler.welcomes.get()
        return peer


@pytest.fixture
async def linked() -> AsyncIterator[Linked]:
    async with service_peer() as service:
        one = Linked(service)
        task = asyncio.create_task(one.link.run())
        yield one
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def test_hello_comes_first_and_the_desired_set_arrives(linked: Linked) -> None:
    peer = await linked.service.accept()
    hello = await peer.welcome()
    assert (hello.instance_id, hello.protocol) == ("hst_a", m.PROTOCOL_VERSION)
    await peer.say(m.Desired(full=True, remove=["prb_x"]))
    async with asyncio.timeout(TIMEOUT_S):
        assert (await linked.handler.wanted.get()).remove == ["prb_x"]


async def test_batches_are_numbered_and_acknowledged(linked: Linked) -> None:
    peer = await linked.meet()
    for i in range(3):
        linked.outbox.put(batch(seq=3 * i))
    assert [(await peer.next_batch())[0] for _ in range(3)] == [1, 2, 3]
    await peer.say(m.Ack(link_seq=3))
    async with asyncio.timeout(TIMEOUT_S):
        await linked.outbox.empty.wait()


async def test_after_a_cut_only_what_the_service_lacks_is_sent_again(linked: Linked) -> None:
    peer = await linked.meet()
    for i in range(4):
        linked.outbox.put(batch(seq=3 * i))
    assert [(await peer.next_batch())[1].seq for _ in range(4)] == [0, 3, 6, 9]
    await peer.cut()
    second = await linked.meet(last_link_seq=2)
    linked.outbox.put(batch(seq=12))
    assert [(seq, header.seq) for seq, header in [await second.next_batch() for _ in range(3)]] == [
        (3, 6),
        (4, 9),
        (5, 12),
    ]


async def test_hits_of_the_time_without_a_service_are_kept_and_the_rest_is_counted() -> None:
    size = len(batch())
    async with service_peer() as service:
        one = Linked(service, capacity_bytes=2 * size)
        for i in range(5):
            one.outbox.put(batch(seq=3 * i))
        task = asyncio.create_task(one.link.run())
        peer = await one.meet()
        drops = await peer.next(m.LinkDrops)
        assert drops == m.LinkDrops(probe="prb_a", count=9, stage=STAGE)
        seqs = []
        for _ in range(2):
            link_seq, header = await peer.next_batch()
            seqs.append(header.seq)
            await peer.say(m.Ack(link_seq=link_seq))
        assert seqs == [9, 12]
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def test_a_report_is_the_latest_and_there_once(linked: Linked) -> None:
    peer = await linked.meet()
    made = []

    def make() -> m.Observed:
        made.append(1)
        return m.Observed(probe="prb_a", generation=len(made))

    for _ in range(100):
        linked.link.post("observed prb_a", make)
    linked.link.post("silent", lambda: None)
    linked.link.post("last", m.Heartbeat)
    observed = await peer.next(m.Observed)
    assert isinstance(observed, m.Observed)
    assert observed.generation == 1
    await peer.next(m.Heartbeat)
    assert peer.said.empty()
    assert len(made) == 1


async def test_nothing_posted_without_a_service_is_said_later(linked: Linked) -> None:
    linked.link.post("early", lambda: m.Observed(probe="prb_early", generation=1))
    peer = await linked.meet()
    linked.link.post("late", lambda: m.Observed(probe="prb_late", generation=1))
    observed = await peer.next(m.Observed)
    assert isinstance(observed, m.Observed)
    assert observed.probe == "prb_late"


async def test_heartbeats_come_at_the_service_s_pace(linked: Linked) -> None:
    peer = await linked.meet(heartbeat_s=0.01)
    await peer.next(m.Heartbeat)
    await peer.next(m.Heartbeat)


async def test_requests_are_answered_or_refused_with_the_error(linked: Linked) -> None:
    linked.handler.answers = {
        "good": {"total": 3},
        "missing": NotFound("no symbol `f`", suggestions=["g"]),
        "broken": RuntimeError("boom"),
    }
    peer = await linked.meet()
    for q in linked.handler.answers:
        await peer.say(m.Request(id=q, method="symbols", params={"q": q}))
    replies = {}
    for _ in range(3):
        reply = await peer.next(m.Reply)
        assert isinstance(reply, m.Reply)
        replies[reply.id] = reply
    assert replies["good"].result == {"total": 3}
    assert replies["missing"].error == {"code": "not-found", "detail": "no symbol `f`", "suggestions": ["g"]}
    assert replies["broken"].error is not None
    assert "boom" in replies["broken"].error["detail"]


async def test_a_flood_of_requests_is_refused_not_queued(linked: Linked) -> None:
    done = asyncio.Event()
    linked.handler.answers = {"slow": done}
    peer = await linked.meet()
    for i in range(33):
        await peer.say(m.Request(id=str(i), method="symbols", params={"q": "slow"}))
    reply = await peer.next(m.Reply)
    assert isinstance(reply, m.Reply)
    assert reply.error is not None
    assert (reply.id, reply.error["code"]) == ("32", "unavailable")
    done.set()
    await peer.next(m.Reply)


async def test_a_malformed_frame_costs_the_connection_and_no_more(linked: Linked) -> None:
    peer = await linked.meet()
    await peer.connection.send('{"type": "nonsense"}')
    second = await linked.meet()
    linked.outbox.put(batch())
    assert (await second.next_batch())[0] == 1


async def test_a_service_that_says_no_later_is_tried_again(linked: Linked) -> None:
    peer = await linked.meet()
    await peer.say(m.LinkError(error=AuthError("revoked").to_wire()))
    await linked.meet()


async def test_a_wrong_token_is_told_at_once() -> None:
    async with service_peer() as service:
        one = Linked(service, token="tlp_wrong")
        with pytest.raises(AuthError, match="refuses this agent's token"):
            async with asyncio.timeout(TIMEOUT_S):
                await one.link.run()
        assert service.refused == 1


async def test_a_service_of_another_protocol_is_told_at_once() -> None:
    async with service_peer() as service:
        one = Linked(service)
        task = asyncio.create_task(one.link.run())
        peer = await service.accept()
        await peer.next(m.Hello)
        await peer.say(m.Welcome(protocol=99, host="hst_a", service_pid=1, service_boot_id="b"))
        with pytest.raises(ProtocolError, match="protocol 99"):
            async with asyncio.timeout(TIMEOUT_S):
                await task
