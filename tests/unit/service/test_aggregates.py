"""Aggregates from agents to people: added up over hosts, each frame once, over time, and live."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as some

from tests.unit.service.peers import NOW, World, frame
from trapline.model import Aggregate, AggregateTable
from trapline.protocol import aggregates as wire
from trapline.protocol import stream as st
from trapline_service.aggregates import Aggregates
from trapline_service.config import Settings
from trapline_service.hub import Hub
from trapline_service.server import Server
from trapline_service.store.sqlite import sqlite_store


async def whole(world: World, probe: dict[str, Any], **params: Any) -> AggregateTable:
    return AggregateTable.model_validate(await world.get(f"/probes/{probe['id']}/aggregates", **params))


def figures(table: AggregateTable) -> dict[Any, tuple[int, Any]]:
    return {row.key[0]: (row.count, row.value) for row in table.rows}


async def test_hosts_are_added_up(world: World) -> None:
    async with world.agent() as a, world.agent("hst_b", name="db-1", link_id="l2") as b:
        probe = await world.create("app:f -> sum(arg0) by (comm)")
        assert probe["spec"]["aggregate"]["text"] == "sum(arg0) by (comm)"
        await a.until(lambda: probe["id"] in a.desired)
        assert a.desired[probe["id"]].spec.aggregate == Aggregate.model_validate(probe["spec"]["aggregate"])
        assert (await whole(world, probe)).rows == []
        await a.send_batch(frame(probe["id"], {"x": [1, 2], "y": [5]}))
        await b.send_batch(frame(probe["id"], {"x": [10]}, host="hst_b"))
        await a.send_batch(frame(probe["id"], {"z": [7] * 9}, seq=3))
        await a.until(lambda: a.acked == 2)
        await b.until(lambda: b.acked == 1)
        table = await whole(world, probe)
        assert figures(table) == {"z": (9, 63), "x": (3, 13), "y": (1, 5)}
        assert [row.key[0] for row in table.rows] == ["z", "x", "y"]
        assert (table.count, table.keys, table.lost, table.other) == (13, 3, 0, None)
        assert table.until == datetime.fromtimestamp(NOW / 1e9, UTC)
        assert len((await whole(world, probe, top=1)).rows) == 1
        status = (await world.get(f"/probes/{probe['id']}"))["status"]
        assert (status["counters"]["hits"], status["counters"]["dropped"]) == (13, 0)


async def test_a_frame_that_comes_again_is_added_once(world: World) -> None:
    async with world.agent() as agent:
        probe = await world.create("app:f -> sum(arg0) by (comm)")
        sent = frame(probe["id"], {"x": [1, 2]})
        await agent.send_batch(sent)
        await agent.until(lambda: agent.acked == 1)
    async with world.agent() as agent:  # the same agent, after a cut
        await agent.send_batch(sent, link_seq=1)
        await agent.send_batch(sent, link_seq=2)
        await agent.send_batch(frame(probe["id"], {"x": [4]}, seq=2), link_seq=3)
        await agent.until(lambda: agent.acked == 3)
    assert figures(await whole(world, probe)) == {"x": (3, 7)}
    assert (await world.get(f"/probes/{probe['id']}"))["status"]["counters"]["hits"] == 3


async def test_what_is_missing_is_said_with_its_cause(world: World) -> None:
    async with world.agent() as agent, world.subscriber() as subscriber:
        probe = await world.create("app:f -> sum(arg0) by (comm)")
        await subscriber.subscribe("s")
        await agent.send_batch(frame(probe["id"], {"x": [1]}, seq=4, drops={"tracer-socket": 4}))
        await agent.send_batch(frame(probe["id"], {"x": [1]}, seq=7))
        await agent.until(lambda: agent.acked == 2)
        gaps = [await subscriber.until(lambda m: isinstance(m, st.Gap)) for _ in range(2)]
    assert [(g.count, g.stage) for g in gaps] == [(4, "tracer-socket"), (2, "unknown")]
    assert (await whole(world, probe)).lost == 6
    status = (await world.get(f"/probes/{probe['id']}"))["status"]
    assert status["dropped_by_reason"] == {"tracer-socket": 4, "unknown": 2}
    assert status["counters"]["hits"] == 8


async def test_over_time(world: World) -> None:
    start = datetime(2026, 1, 31, 12, tzinfo=UTC)
    at = [int((start + timedelta(seconds=s)).timestamp() * 1e9) for s in (3, 9, 12, 25, 58)]
    async with world.agent() as agent:
        probe = await world.create("app:f -> sum(arg0) by (comm)")
        for seq, end_ns in enumerate(at):
            await agent.send_batch(frame(probe["id"], {"x": [10**seq]}, seq=seq, end_ns=end_ns))
        await agent.until(lambda: agent.acked == 5)

    async def ask(since: float, until: float, **more: Any) -> AggregateTable:
        times = [(start + timedelta(seconds=s)).isoformat() for s in (since, until)]
        return await whole(world, probe, since=times[0], until=times[1], **more)

    assert figures(await ask(0, 60)) == {"x": (5, 11111)}
    assert figures(await ask(10, 30)) == {"x": (2, 1100)}
    assert figures(await ask(15, 21)) == {"x": (2, 1100)}  # to ten seconds
    assert (await ask(30, 50)).rows == []
    series = (await ask(0, 60, step=20)).series
    assert [(int((p.start - start).total_seconds()), p.count, p.rows[0].value) for p in series] == [
        (0, 3, 111), (20, 1, 1000), (40, 1, 10000),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({"until": "2026-01-01T00:00:00Z"}, "`since`"),
        ({"step": 10}, "`since`"),
        ({"since": "2026-01-02T00:00:00Z", "until": "2026-01-01T00:00:00Z"}, "not after"),
        ({"since": "2026-01-02T00:00:00"}, "zone"),
        ({"since": "2026-01-02T00:00:00Z", "step": 15}, "multiple"),
        ({"since": "2020-01-02T00:00:00Z", "step": 10}, "1000 points"),
        ({"since": "yesterday"}, "since"),
        ({"top": 0}, "top"),
    ],
)
async def test_a_range_that_makes_no_sense_is_a_problem(world: World, params: dict[str, Any], says: str) -> None:
    async with world.agent():
        probe = await world.create("app:f -> count()")
    response = await world.http.get(f"/probes/{probe['id']}/aggregates", params=params)
    assert response.status_code == 422
    assert response.headers["content-type"] == "application/problem+json"
    assert says in response.json()["detail"]


async def test_a_probe_without_one_has_none(world: World) -> None:
    async with world.agent() as agent:
        probe = await world.create("app:f")
        await agent.send_batch(frame(probe["id"], {"x": [1]}))
        await agent.until(lambda: agent.acked == 1)
    response = await world.http.get(f"/probes/{probe['id']}/aggregates")
    assert response.status_code == 404
    assert "has no aggregate" in response.json()["detail"]
    assert (await world.http.get("/probes/nonsense/aggregates")).status_code == 404


async def test_live(world: World) -> None:
    """The whole state at once, and again when it has changed; the latest, however slow the reader."""
    async with world.agent() as agent, world.subscriber() as subscriber:
        probe, other = await world.create("app:f -> sum(arg0) by (comm)"), await world.create("app:g -> count()")
        await agent.send_batch(frame(probe["id"], {"x": [1]}))
        await agent.until(lambda: agent.acked == 1)
        await subscriber.subscribe("a", "aggregates", filter={"probes": [probe["id"]]})
        first = await subscriber.next()
        assert isinstance(first, st.Status)
        assert first.aggregate is not None
        assert figures(first.aggregate) == {"x": (1, 1)}
        await agent.send_batch(frame(other["id"], {"": [1]}, function="count"))
        for seq in range(1, 40):
            await agent.send_batch(frame(probe["id"], {"x": [1]}, seq=seq))

        def last(message: Any) -> bool:
            assert isinstance(message, st.Status)
            assert message.aggregate is not None
            assert message.aggregate.probe == probe["id"]
            return message.aggregate.count == 40

        await subscriber.until(last)


async def test_a_restart_forgets_and_doubles_nothing(settings: Settings) -> None:
    async with Server(settings) as server, World(server.url, server.new_token or "") as world:
        token = world.token
        async with world.agent() as agent:
            probe, gone = [await world.create(f"app:{f} -> sum(arg0) by (comm)") for f in "fg"]
            for p in (probe, gone):
                await agent.send_batch(frame(p["id"], {"x": [1 << 70, 2]}))
            await agent.until(lambda: agent.acked == 2)
            await world.http.delete(f"/probes/{gone['id']}")
            await agent.until(lambda: gone["id"] in agent.removals)
    async with Server(settings) as server, World(server.url, token) as world:
        assert figures(await whole(world, probe)) == {"x": (2, str((1 << 70) + 2))}
        async with world.agent(link_id="lnk_2") as agent:  # it knows nothing of what it had sent
            await agent.send_batch(frame(probe["id"], {"x": [1 << 70, 2]}))
            await agent.send_batch(frame(probe["id"], {"y": [3]}, seq=2))
            await agent.until(lambda: agent.acked == 2)
        assert figures(await whole(world, probe)) == {"x": (2, str((1 << 70) + 2)), "y": (1, 3)}
        since = datetime.fromtimestamp(NOW / 1e9 - 60, UTC).isoformat()
        assert figures(await whole(world, probe, since=since)) == figures(await whole(world, probe))
    store = sqlite_store(settings.state_dir / "trapline.db")
    await store.open()
    assert await store.rollups(gone["id"], 0, 2**62) == []
    assert [w.probe for w in await store.wholes()] == [probe["id"]]
    assert len(await store.rollups(probe["id"], 0, 2**62)) == 2
    assert await store.trim_rollups(max_bytes=10**9, before_ns=0) == 0
    assert await store.trim_rollups(max_bytes=0, before_ns=0) == 2
    await store.close()


class _NoStore:
    pass


@given(
    some.lists(
        some.tuples(some.sampled_from(["hst_a", "hst_b"]), some.sampled_from(["s1", "s2"]), some.integers(1, 5)),
        max_size=12,
    ),
    some.data(),
)
async def test_whatever_comes_twice_or_never_the_sum_is_exact(
    sent: list[tuple[str, str, int]], data: some.DataObject
) -> None:
    """What is in the table and what is lost are together what the sources have counted, up to the last that came."""
    aggregate = Aggregate(text="count() by (comm)", function="count", by=["comm"])
    aggregates = Aggregates(
        _NoStore(),
        Hub(),
        lambda probe: aggregate,
        max_keys=2,
        retention_bytes=1,
        retention_s=1,  # type: ignore[arg-type]
    )
    next_seq: dict[tuple[str, str], int] = {}
    arrived: dict[tuple[str, str], int] = {}
    counted = 0
    for host, source, count in sent:
        at = next_seq.get((host, source), 0)
        next_seq[host, source] = at + count
        times = data.draw(some.integers(0, 2))
        keys: dict[str, list[int]] = {}
        for hit in range(count):
            keys.setdefault(f"key{(at + hit) % 3}", []).append(0)
        delta = frame("p", keys, function="count", seq=at, host=host, source=source)
        for again in range(times):
            assert aggregates.take(wire.decode(delta)) == (again == 0)
        if times:
            arrived[host, source] = at + count
            counted += count
    table = aggregates.table("p")
    assert table is not None
    assert table.count == counted == sum(row.count for row in table.rows) + (table.other.count if table.other else 0)
    assert table.count + table.lost == sum(arrived.values())
    assert table.keys <= 2
