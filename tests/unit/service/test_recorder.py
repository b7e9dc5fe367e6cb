"""What was recorded: written, found again, bounded."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.service.peers import OFFSET, T0, World, batch
from trapline.errors import ProtocolError, Unavailable
from trapline_service.config import Settings
from trapline_service.frames import HitFrame, LinkPosition
from trapline_service.recorder import Recorder, pack, unpack
from trapline_service.server import Server
from trapline_service.store.base import Chunk
from trapline_service.store.sql import SqlStore
from trapline_service.store.sqlite import sqlite_store


@pytest.fixture
async def store(settings: Settings) -> Any:
    store = sqlite_store(settings.state_dir / "trapline.db")
    await store.open()
    yield store
    await store.close()


def recorder(store: SqlStore, **fields: Any) -> Recorder:
    values: dict[str, Any] = {"max_queue_bytes": 1 << 20, "retention_bytes": 1 << 30, "retention_s": 1e9} | fields
    return Recorder(store, **values)


async def test_newest_last_in_order_of_time_over_hosts_and_probes(store: SqlStore) -> None:
    r = recorder(store)
    # Chunks that overlap in time: two hosts, two probes, written in three rounds.
    for n in range(3):
        for probe in ("prb_a", "prb_b"):
            for host in ("hst_a", "hst_b"):
                r.deliver([HitFrame(batch(probe, host=host, seq=100 * n, count=100))])
        await r.flush()
    page = await r.query(limit=50)
    stamps = [int(hit.ts_ns) for hit in page.hits]
    assert stamps == sorted(stamps)
    assert stamps[-1] == OFFSET + T0 + 299_000
    assert {(h.probe, h.host) for h in page.hits} == {(p, h) for p in ("prb_a", "prb_b") for h in ("hst_a", "hst_b")}

    seen = list(reversed(page.hits))
    while page.before is not None:
        page = await r.query(limit=50, before=page.before)
        seen += reversed(page.hits)
    keys = [(h.probe, h.host, h.seq) for h in seen]
    assert len(keys) == len(set(keys)) == 1200
    only = await r.query(probe="prb_b", host="hst_a", before_seq=200, limit=3)
    assert [(h.probe, h.host, h.seq) for h in only.hits] == [("prb_b", "hst_a", n) for n in (197, 198, 199)]


async def test_more_chunks_than_a_query_reads_at_once(store: SqlStore) -> None:
    r = recorder(store)
    for n in range(40):
        r.deliver([HitFrame(batch("prb_a", seq=n, count=1))])
        await r.flush()
    page = await r.query(limit=39)
    assert [h.seq for h in page.hits] == list(range(1, 40))
    assert page.before is not None
    assert [h.seq for h in (await r.query(limit=39, before=page.before)).hits] == [0]


async def test_retention_by_bytes_and_by_age(store: SqlStore) -> None:
    r = recorder(store)
    for n in range(10):
        r.deliver([HitFrame(batch("prb_a", seq=10 * n))])
        await r.flush()
    sizes = [len(c.data) for c in await store.chunks(probe=None, host=None, until_ns=None, offset=0, limit=100)]
    assert len(sizes) == 10
    assert await store.trim_chunks(max_bytes=sum(sizes[:4]), before_ns=0) == 6
    assert [h.seq for h in (await r.query(limit=1000)).hits] == list(range(60, 100))
    await recorder(store, retention_s=1).trim()  # all of it is of November 2023
    assert (await r.query()).hits == []


async def test_a_slow_store_loses_the_oldest_and_counts_them(store: SqlStore) -> None:
    size = len(batch("prb_a"))
    r = recorder(store, max_queue_bytes=size * 3)
    r.deliver([HitFrame(batch("prb_a", seq=10 * n)) for n in range(5)])
    assert r.unrecorded == 20
    assert [h.seq for h in (await r.query()).hits] == list(range(20, 50))


async def test_what_could_not_be_written_is_written_later(store: SqlStore, monkeypatch: pytest.MonkeyPatch) -> None:
    r = recorder(store)
    r.deliver([HitFrame(batch("prb_a"))])
    whole = store.add_chunks

    async def away(*_: object) -> None:
        raise Unavailable("the disk is full")

    monkeypatch.setattr(store, "add_chunks", away)
    with pytest.raises(Unavailable):
        await r.flush()
    monkeypatch.setattr(store, "add_chunks", whole)
    assert len((await r.query()).hits) == 10


async def test_a_damaged_chunk_costs_only_itself(store: SqlStore) -> None:
    r = recorder(store)
    r.deliver([HitFrame(batch("prb_a"))])
    await r.flush()
    data = pack([batch("prb_a", seq=10)])
    await store.add_chunks([Chunk("c", "prb_a", "hst_a", "src", 10, 19, 0, 2**62, 10, data[:-4])], [])
    assert [h.seq for h in (await r.query()).hits] == list(range(10))


def test_chunks_are_what_was_packed() -> None:
    batches = [batch("prb_a", seq=n) for n in range(100)]
    data = pack(batches)
    assert unpack(data) == batches
    assert len(data) < sum(map(len, batches)) / 10
    with pytest.raises(ProtocolError):
        unpack(b"no chunk")


async def test_positions_are_those_of_what_is_written(store: SqlStore) -> None:
    r = recorder(store)
    r.deliver([HitFrame(batch("prb_a", seq=10 * n), LinkPosition("hst_a", "lnk", n + 1)) for n in range(3)])
    await r.flush()
    assert await store.positions() == [LinkPosition("hst_a", "lnk", 3)]
    assert await store.sequences() == {("prb_a", "hst_a", "src_1"): 30}


async def test_over_http(world: World) -> None:
    async with world.agent() as agent:
        probe = (await world.create())["id"]
        await agent.send_batch(batch(probe, count=250))
        await agent.until(lambda: agent.acked == 1)
        first = await world.get("/probes/f/hits", limit=200)
        assert [h["seq"] for h in first["items"]] == list(range(50, 250))
        rest = await world.get("/probes/f/hits", limit=200, page_token=first["next_page_token"])
        assert ([h["seq"] for h in rest["items"]], rest["next_page_token"]) == (list(range(50)), None)
        assert [h["seq"] for h in (await world.get("/hits", host="web-1", limit=1, before_seq=9))["items"]] == [8]
        assert (await world.http.get("/hits", params={"probe": "nobody"})).status_code == 404
        assert (await world.http.get("/hits", params={"page_token": "x"})).json()["code"] == "page-token-invalid"
        await world.http.delete("/probes/f")
        # The record outlives the probe.
        assert len((await world.get("/hits", probe=probe))["items"]) == 100


async def test_a_restart_goes_on_where_the_record_ends(settings: Settings) -> None:
    async with Server(settings) as first, World(first.url, first.new_token or "") as world, world.agent() as agent:
        token = world.token
        probe = (await world.create())["id"]
        await agent.send_batch(batch(probe, seq=0))
        await agent.until(lambda: agent.acked == 1)
        await world.get("/hits")
    async with Server(settings) as second, World(second.url, token) as world, world.agent() as agent:
        assert agent.welcome.last_link_seq == 1
        await agent.send_batch(batch(probe, seq=0), link_seq=1)
        await agent.send_batch(batch(probe, seq=15), link_seq=2)
        await agent.until(lambda: agent.acked == 2)
        status = (await world.get("/probes/f"))["status"]
        assert (status["counters"]["hits"], status["dropped_by_reason"]) == (25, {"unknown": 5})
        assert len((await world.get("/hits"))["items"]) == 20
