"""The agents' WebSocket: who is let in, what is refused, and what a cut does."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from tests.unit.service.peers import World, batch, frame, target
from trapline.model import Aggregate, HostFacts, Process
from trapline.protocol import messages as m
from trapline.protocol.stream import Status
from trapline_service.aggregates import Aggregates
from trapline_service.config import Settings
from trapline_service.fleet import Fleet
from trapline_service.hub import Hub
from trapline_service.ledger import Ledger
from trapline_service.link import AgentLink, Links
from trapline_service.probes import Probes
from trapline_service.server import Server
from trapline_service.store.sqlite import sqlite_store


@pytest.mark.parametrize("header", [None, "Bearer tlp_" + "x" * 43, "Bearer nonsense", "Basic abc"])
@pytest.mark.parametrize("path", ["/agents/link", "/stream"])
async def test_a_wrong_token_is_refused_before_the_socket_opens(world: World, header: str | None, path: str) -> None:
    headers = {"Authorization": header} if header else {}
    with pytest.raises(InvalidStatus) as refused:
        await connect(f"{world.ws}{path}", additional_headers=headers, proxy=None)
    response = refused.value.response
    assert response.status_code == 401
    assert response.body is not None
    assert json.loads(response.body)["code"] == "unauthorized"


async def test_a_page_of_another_site_cannot_open_the_stream(world: World) -> None:
    headers = {"Authorization": f"Bearer {world.token}"}
    with pytest.raises(InvalidStatus) as refused:
        await connect(f"{world.ws}/stream", additional_headers=headers, origin="http://evil.example", proxy=None)  # type: ignore[arg-type]
    assert refused.value.response.status_code == 403
    async with connect(f"{world.ws}/stream", additional_headers=headers, origin=world.url, proxy=None):  # type: ignore[arg-type]
        pass


async def test_a_ticket_opens_one_stream_and_no_link(world: World) -> None:
    ticket = (await world.http.post("/stream-tickets")).json()
    assert ticket["expires_in_s"] > 0
    with pytest.raises(InvalidStatus):
        await connect(f"{world.ws}/agents/link?ticket={ticket['ticket']}", proxy=None)
    async with connect(f"{world.ws}/stream?ticket={ticket['ticket']}", proxy=None):
        pass
    with pytest.raises(InvalidStatus):
        await connect(f"{world.ws}/stream?ticket={ticket['ticket']}", proxy=None)


async def test_hosts_and_processes(world: World) -> None:
    async with world.agent() as agent:
        assert agent.welcome is not None
        assert agent.welcome.host == "hst_a"
        ours = [Process(id=f"p{n}", host="?", pid=n, start_time=1, comm=f"app{n}") for n in range(5)]
        async with world.subscriber() as subscriber:
            await subscriber.subscribe("s", "hosts")
            await agent.say(m.Processes(full=True, upsert=ours))
            await subscriber.until(lambda s: isinstance(s, Status) and s.host is not None and s.host.process_count == 5)
            await agent.say(m.Processes(upsert=[ours[0].model_copy(update={"comm": "new"})], removed=["p4"]))
            await subscriber.until(lambda s: isinstance(s, Status) and s.host is not None and s.host.process_count == 4)
        found = await world.get("/hosts/web-1/processes", page_size=3)
        assert [p["comm"] for p in found["items"]] == ["new", "app1", "app2"]
        assert {p["host"] for p in found["items"]} == {"hst_a"}
        rest = await world.get("/hosts/web-1/processes", page_size=3, page_token=found["next_page_token"])
        assert ([p["comm"] for p in rest["items"]], rest["next_page_token"]) == (["app3"], None)
        assert [p["pid"] for p in (await world.get("/hosts/hst_a/processes", filter="APP2"))["items"]] == [2]


async def test_questions_are_asked_over_the_link(world: World) -> None:
    async with world.agent() as agent:

        def answer(request: m.Request) -> dict[str, Any]:
            if request.method == "modules":
                return {"modules": [{"path": "/bin/app", "processes": request.params["pid"]}]}
            symbol = {"name": request.params["q"], "module": "/bin/app", "offset": 1}
            return {"host": "hst_a", "total": 1, "symbols": [symbol]}

        agent.answer = answer
        assert (await world.get("/hosts/web-1/modules", pid=3))["items"][0]["processes"] == 3
        (page,) = (await world.get("/symbols", q="mal"))["items"]
        assert (page["host"], page["symbols"][0]["name"]) == ("hst_a", "mal")
        agent.answer = lambda _: {"symbols": "nonsense"}
        (page,) = (await world.get("/symbols", q="mal", host="web-1"))["items"]
        assert page["error"]["code"] == "protocol-error"
        agent.answer = lambda _: {"error": {"detail": ["no", "text"], "position": "x"}}
        (page,) = (await world.get("/symbols", q="mal"))["items"]
        assert "cannot be read" in page["error"]["detail"]
    (page,) = (await world.get("/symbols", q="mal", host="web-1"))["items"]
    assert page["error"]["code"] == "unavailable"
    assert (await world.http.get("/hosts/web-1/modules")).status_code == 503


async def test_an_agent_that_does_not_answer(settings: Settings) -> None:
    settings = settings.model_copy(update={"request_timeout_s": 0.05})
    async with Server(settings) as server, World(server.url, server.new_token or "") as world, world.agent() as agent:
        agent.answer = lambda _: None
        response = await world.http.post("/probes", json={"probe": "app:f"})
        assert response.status_code == 503
        assert "did not answer" in response.json()["detail"]
        assert (await world.get("/probes"))["items"] == []


async def test_a_silent_host_goes_offline(settings: Settings) -> None:
    settings = settings.model_copy(update={"heartbeat_s": 0.05})
    async with Server(settings) as server, World(server.url, server.new_token or "") as world, world.agent() as agent:
        assert await agent.closed() == 1013
        assert "nothing was heard" in agent.errors[0]["detail"]
        assert (await world.get("/hosts/web-1"))["online"] is False


async def test_a_second_link_of_a_host_replaces_the_first(world: World) -> None:
    async with world.agent() as first, world.agent(link_id="lnk_2") as second:
        assert await first.closed() == 4409
        assert first.errors[0]["code"] == "conflict"
        assert (await world.get("/hosts/hst_a"))["online"] is True
        probe = await world.create()
        await second.until(lambda: probe["id"] in second.desired)
    assert (await world.get("/hosts"))["items"][0]["online"] is False


async def test_what_was_received_is_not_asked_for_again(world: World) -> None:
    async with world.agent() as agent:
        probe = await world.create()
        for n in range(3):
            await agent.send_batch(batch(probe["id"], seq=10 * n))
        await agent.until(lambda: agent.acked == 3)
    async with world.agent() as agent:
        assert agent.welcome.last_link_seq == 3
        assert agent.full_sets == [[probe["id"]]]
        await agent.send_batch(batch(probe["id"], seq=20), link_seq=3)  # a cut before the ack: sent again
        await agent.send_batch(batch(probe["id"], seq=30), link_seq=4)
        await agent.until(lambda: agent.acked == 4)
        hits = await world.get("/hits")
        assert [h["seq"] for h in hits["items"]] == list(range(40))
        status = (await world.get("/probes/f"))["status"]
        assert (status["counters"]["hits"], status["counters"]["dropped"]) == (40, 0)
    async with world.agent(link_id="lnk_2") as agent:
        assert agent.welcome.last_link_seq == 0


MALFORMED: list[str | bytes] = [
    "",
    "null",
    "[]",
    '{"type": "observed"}',
    '{"type": "warp"}',
    '{"type": "observed", "probe": "x", "generation": "many"}',
    '{"type": "link-drops", "probe": "x", "count": -1}',
    '{"a": ' * 5000,
    b"",
    b"1234567",
    b"\1\0\0\0\0\0\0\0TLH1",
    b"\1\0\0\0\0\0\0\0" + b"\xff" * 64,
    b"\0\0\0\0\0\0\0\0" + batch("prb_x"),
    b"\1\0\0\0\0\0\0\0" + batch("prb_x", host="hst_other"),
    b"\1\0\0\0\0\0\0\0" + batch("prb_x")[:-8],
    m.encode(m.Hello(instance_id="hst_a", link_id="l", pid=1, facts=HostFacts(name="n", boot_id="b"))),
]


@pytest.mark.parametrize("frame", MALFORMED, ids=range(len(MALFORMED)))
async def test_a_malformed_frame_ends_the_link_and_nothing_else(world: World, frame: str | bytes) -> None:
    async with world.agent("hst_b", name="web-2", link_id="lnk_b") as other, world.agent() as agent:
        probe = await world.create()
        await agent.raw(frame)
        assert await agent.closed() == 4400
        assert agent.errors[0]["code"] == "protocol-error"
        assert (await world.get("/hosts/hst_a"))["online"] is False
        await other.observe(probe["id"])
        await other.send_batch(batch(probe["id"], host="hst_b"))
        await other.until(lambda: other.acked == 1)
        assert len((await world.get("/hits"))["items"]) == 10


@pytest.mark.parametrize("first", ["{}", b"12345678", m.encode(m.Heartbeat()), batch("prb_x")])
async def test_the_first_frame_must_be_hello(world: World, first: str | bytes) -> None:
    async with world.agent(hello=False) as agent:
        await agent.raw(first)
        assert await agent.closed() == 4400
    assert (await world.get("/hosts"))["items"] == []


async def test_another_protocol_version_is_refused(world: World) -> None:
    async with world.agent(hello=False) as agent:
        facts = HostFacts(name="n", boot_id="b")
        await agent.say(m.Hello(protocol=99, instance_id="hst_a", link_id="l", pid=1, facts=facts))
        assert await agent.closed() == 4400
        assert "99" in agent.errors[0]["detail"]


def _link() -> tuple[AgentLink, Ledger]:
    """Returns a link without a socket, and its ledger."""
    hub, ledger = Hub(), Ledger()
    store = _NoStore()
    fleet = Fleet(store, hub, heartbeat_s=10, request_timeout_s=1)  # type: ignore[arg-type]
    probes = Probes(store, fleet, hub, ledger, retention_s=1)  # type: ignore[arg-type]
    aggregate = Aggregate(text="count()", function="count")
    aggregates = Aggregates(store, hub, lambda probe: aggregate, max_keys=9, retention_bytes=1, retention_s=1)  # type: ignore[arg-type]
    return AgentLink(Links(fleet, probes, ledger, hub, aggregates)), ledger


class _NoStore:
    async def put_host(self, _host: object) -> None:
        pass


HELLO = m.encode(m.Hello(instance_id="hst_a", link_id="l", pid=1, facts=HostFacts(name="n", boot_id="b")))
GOOD = [HELLO, m.encode(m.Heartbeat()), m.encode(m.Observed(probe="prb_k", generation=1, targets=[target()]))]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=200)
@given(
    some.one_of(
        some.binary(max_size=300),
        some.text(max_size=300),
        # A sound frame with a few bytes changed.
        some.tuples(
            some.sampled_from(
                [batch("prb_k"), batch("prb_k", drops={"tracer-ring": 3}), frame("prb_k", {"key": [5, 1 << 70]})]
            ),
            some.lists(some.tuples(some.integers(0, 700), some.integers(0, 255)), min_size=1, max_size=4),
        ).map(lambda pair: _with_bytes(*pair)),
        some.tuples(some.sampled_from(GOOD), some.integers(0, 80), some.text(max_size=4)).map(
            lambda t: t[0][: t[1]] + t[2] + t[0][t[1] + len(t[2]) :]
        ),
    )
)
async def test_whatever_an_agent_sends_is_read_or_refused(frame: str | bytes) -> None:
    link, ledger = _link()
    await link.text(HELLO)
    ledger.open("prb_k")
    before = ledger.totals("prb_k")
    try:
        if isinstance(frame, bytes):
            link.binary(b"\1\0\0\0\0\0\0\0" + frame)
        else:
            await link.text(frame)
    except m.ProtocolError:
        assert ledger.totals("prb_k") == before
        assert link._received == 0
    finally:
        await link.gone()


def _with_bytes(frame: bytes, changes: list[tuple[int, int]]) -> bytes:
    changed = bytearray(frame)
    for at, value in changes:
        changed[at % len(changed)] = value
    return bytes(changed)


async def test_the_store_may_not_be_someone_elses(settings: Settings) -> None:
    store = sqlite_store(settings.state_dir / "trapline.db")
    await store.open()
    await store.close()
    assert (settings.state_dir / "trapline.db").stat().st_mode & 0o777 == 0o600
    assert settings.state_dir.stat().st_mode & 0o777 == 0o700
