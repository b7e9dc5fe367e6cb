"""The service's peers in its tests: an agent, a subscriber and an HTTP client, each speaking the real protocol."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Self

import httpx
import numpy as np
from websockets.asyncio.client import ClientConnection, connect

from trapline.model import Counters, HostFacts, HostResolution, ResolvedSite, Target, TargetState
from trapline.protocol import messages as m
from trapline.protocol import stream as st
from trapline.protocol.hits import Header, HitBatch, row_dtype, schema

WAIT_S = 10.0
T0 = 1_000_000_000
OFFSET = 1_700_000_000_000_000_000
"""CLOCK_REALTIME - CLOCK_MONOTONIC of the hosts in these tests."""


def batch(
    probe: str,
    *,
    host: str = "hst_a",
    seq: int = 0,
    count: int = 10,
    source: str = "src_1",
    drops: dict[str, int] | None = None,
    text: str = "",
    pad: int = 0,
) -> bytes:
    """Returns an encoded batch; hit number n has ``n`` in its only word, at T0 + n microseconds."""
    columns = schema([("n", "u64"), ("s", "str")])
    rows = np.zeros(count, row_dtype(columns))
    rows["ts"] = T0 + np.arange(seq, seq + count, dtype=np.uint64) * 1000
    rows["pid"], rows["tid"] = 7, 8
    rows["n"] = np.arange(seq, seq + count)
    header = Header(
        host=host,
        probe=probe,
        source=source,
        seq=seq,
        count=count,
        t0=int(rows["ts"][0]),
        t1=int(rows["ts"][-1]),
        clock_offset=OFFSET,
        columns=columns,
        strings=[(text or "x").encode() + b"." * pad],
        sites=["app:f"],
        comms={7: "app"},
        drops=drops or {},
    )
    return HitBatch(header, {name: rows[name] for name in rows.dtype.names or ()}).encode()


def target(pid: int = 7, *, state: TargetState = TargetState.ARMED, reason: str = "", message: str = "") -> Target:
    return Target(
        pid=pid, start_time=1, comm="app", module="/bin/app", symbol="f", state=state, reason=reason, message=message
    )


def good(host: str) -> HostResolution:
    """What a host answers that can do the probe."""
    return HostResolution(
        host=host, sites=[ResolvedSite(module="/bin/app", symbol="f", offset=4096)], targets=[target()]
    )


class AgentPeer:
    """An agent as the service sees one. ``answer`` gives the result or error of each request."""

    def __init__(self, connection: ClientConnection, host: str, link_id: str) -> None:
        self._connection = connection
        self.host = host
        self.link_id = link_id
        self.welcome: m.Welcome | None = None
        self.desired: dict[str, m.DesiredProbe] = {}
        self.full_sets: list[list[str]] = []
        self.removals: list[str] = []
        self.acked = 0
        self.errors: list[dict[str, Any]] = []
        self.answer: Callable[[m.Request], dict[str, Any] | None] = lambda r: (
            good(host).model_dump(mode="json") if r.method == "resolve" else {}
        )
        self.confirm_removals = True
        self._changed = asyncio.Condition()
        self._link_seq = 0

    async def say(self, message: m.Model) -> None:
        await self._connection.send(m.encode(message))

    async def raw(self, frame: str | bytes) -> None:
        await self._connection.send(frame)

    async def send_batch(self, encoded: bytes, *, link_seq: int | None = None) -> int:
        """Sends a batch under the next link sequence, or a given one, which is returned."""
        if link_seq is None:
            self._link_seq += 1
            link_seq = self._link_seq
        await self._connection.send(link_seq.to_bytes(8, "little") + encoded)
        return link_seq

    async def observe(self, probe: str, **fields: Any) -> None:
        """Reports a probe; by default resolved, with one armed target."""
        values: dict[str, Any] = {"generation": 1, "resolved": True, "targets": [target()]} | fields
        if isinstance(values.get("counters"), int):
            values["counters"] = Counters(hits=values["counters"])
        await self.say(m.Observed(probe=probe, **values))

    async def until(self, done: Callable[[], bool]) -> None:
        """Waits for what the service says to make ``done`` true."""
        async with asyncio.timeout(WAIT_S), self._changed:
            await self._changed.wait_for(done)

    async def closed(self) -> int:
        """Waits for the service to close the link; returns the code."""
        async with asyncio.timeout(WAIT_S):
            await self._connection.wait_closed()
        assert self._connection.close_code is not None
        return self._connection.close_code

    async def _receive(self) -> None:
        async for frame in self._connection:
            assert isinstance(frame, str)
            message = m.parse_service_message(frame)
            async with self._changed:
                await self._take(message)
                self._changed.notify_all()

    async def _take(self, message: Any) -> None:
        if isinstance(message, m.Welcome):
            self.welcome = message
            self._link_seq = max(self._link_seq, message.last_link_seq)
        elif isinstance(message, m.Desired):
            if message.full:
                self.desired = {}
                self.full_sets.append([p.id for p in message.upsert])
            self.desired |= {p.id: p for p in message.upsert}
            for probe in message.remove:
                self.desired.pop(probe, None)
                self.removals.append(probe)
                if self.confirm_removals:
                    await self.observe(probe, targets=[], removed=True)
        elif isinstance(message, m.Ack):
            self.acked = message.link_seq
        elif isinstance(message, m.LinkError):
            self.errors.append(message.error)
        elif isinstance(message, m.Request):
            answer = self.answer(message)
            if answer is not None:
                error = answer.get("error") if set(answer) == {"error"} else None
                await self.say(m.Reply(id=message.id, error=error, result=None if error else answer))


class SubscriberPeer:
    """A program on /stream; JSON messages are parsed, binary frames are (subscription number, batch)."""

    def __init__(self, connection: ClientConnection) -> None:
        self.connection = connection

    async def send(self, message: m.Model | str | bytes) -> None:
        await self.connection.send(message.model_dump_json() if isinstance(message, m.Model) else message)

    async def next(self) -> Any:
        async with asyncio.timeout(WAIT_S):
            frame = await self.connection.recv()
        if isinstance(frame, bytes):
            return int.from_bytes(frame[:4], "little"), frame[8:]
        return st.parse_server_message(frame)

    async def until(self, done: Callable[[Any], bool]) -> Any:
        """Returns the first message for which ``done`` is true; those before are thrown away."""
        while True:
            message = await self.next()
            if done(message):
                return message

    async def subscribe(self, id: str, topic: Any = "hits", **fields: Any) -> st.Subscribed:
        await self.send(st.Subscribe(id=id, topic=topic, **fields))
        answer = await self.next()
        assert isinstance(answer, st.Subscribed)
        assert answer.id == id
        return answer


class World:
    """A running service and the ways to reach it."""

    def __init__(self, url: str, token: str) -> None:
        self.url = url
        self.token = token
        self.http = httpx.AsyncClient(
            base_url=f"{url}/api/v1", headers={"Authorization": f"Bearer {token}"}, timeout=WAIT_S, trust_env=False
        )

    @property
    def ws(self) -> str:
        return "ws" + self.url.removeprefix("http") + "/api/v1"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.http.aclose()

    async def get(self, path: str, **params: Any) -> Any:
        response = await self.http.get(path, params=params)
        assert response.status_code == 200, response.text
        return response.json()

    async def create(self, text: str = "app:f", **fields: Any) -> dict[str, Any]:
        response = await self.http.post("/probes", json={"probe": text, **fields})
        assert response.status_code == 201, response.text
        probe: dict[str, Any] = response.json()
        assert response.headers["location"] == f"/api/v1/probes/{probe['id']}"
        return probe

    def _dial(self, path: str, **fields: Any) -> connect:
        headers = {"Authorization": f"Bearer {self.token}"}
        return connect(f"{self.ws}{path}", additional_headers=headers, compression=None, proxy=None, **fields)

    @asynccontextmanager
    async def agent(
        self, host: str = "hst_a", *, name: str = "web-1", link_id: str = "lnk_1", hello: bool = True
    ) -> Any:
        """Links an agent, and yields it once it has its whole set of probes."""
        async with self._dial("/agents/link") as connection:
            agent = AgentPeer(connection, host, link_id)
            receiving = asyncio.create_task(agent._receive())
            try:
                if hello:
                    facts = HostFacts(name=name, boot_id="boot")
                    await agent.say(m.Hello(instance_id=host, link_id=link_id, pid=1, facts=facts))
                    await agent.until(lambda: bool(agent.full_sets))
                yield agent
            finally:
                await connection.close()
                await asyncio.gather(receiving, return_exceptions=True)

    @asynccontextmanager
    async def subscriber(self, protocols: Sequence[str] = (st.JSON_SUBPROTOCOL,), **fields: Any) -> Any:
        async with self._dial("/stream", subprotocols=protocols, max_size=None, **fields) as connection:
            yield SubscriberPeer(connection)


def rows(message: Any) -> list[dict[str, Any]]:
    """Returns the hits of a JSON batch as plain dicts."""
    assert isinstance(message, st.HitItems)
    items: list[dict[str, Any]] = json.loads(message.model_dump_json())["items"]
    return items
