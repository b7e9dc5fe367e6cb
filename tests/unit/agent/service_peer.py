"""A service's end of the agent link for tests: a real WebSocket server that does what the test says."""

from __future__ import annotations

import asyncio
import http
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.http11 import Request, Response

from trapline.model import Model
from trapline.protocol import hits
from trapline.protocol import messages as m

TIMEOUT_S = 10.0


class Peer:
    """One connection as the service sees it. Frames are read as they come; the ``next_*`` methods wait for them."""

    def __init__(self, connection: ServerConnection) -> None:
        self.connection = connection
        self.said: asyncio.Queue[Model] = asyncio.Queue()
        self.batches: asyncio.Queue[tuple[int, hits.Header]] = asyncio.Queue()

    async def read(self) -> None:
        async for frame in self.connection:
            if isinstance(frame, bytes):
                seq = int.from_bytes(frame[: m.LINK_SEQ_BYTES], "little")
                self.batches.put_nowait((seq, hits.decode(frame[m.LINK_SEQ_BYTES :]).header))
            else:
                self.said.put_nowait(m.parse_agent_message(frame))

    async def next(self, kind: type[Model]) -> Model:
        """Returns the next message of a kind; others before it are passed over."""
        async with asyncio.timeout(TIMEOUT_S):
            while not isinstance(message := await self.said.get(), kind):
                pass
        return message

    async def next_batch(self) -> tuple[int, hits.Header]:
        async with asyncio.timeout(TIMEOUT_S):
            return await self.batches.get()

    async def say(self, message: Model) -> None:
        await self.connection.send(m.encode(message))

    async def welcome(
        self, *, last_link_seq: int = 0, heartbeat_s: float = 10.0, pid: int = 1, boot: str = "b"
    ) -> m.Hello:
        hello = await self.next(m.Hello)
        assert isinstance(hello, m.Hello)
        await self.say(
            m.Welcome(
                host=hello.instance_id,
                last_link_seq=last_link_seq,
                heartbeat_s=heartbeat_s,
                service_pid=pid,
                service_boot_id=boot,
            )
        )
        return hello

    async def cut(self) -> None:
        """Ends the connection without a closing handshake."""
        self.connection.transport.abort()


class ServicePeer:
    """The listening service; ``accept`` gives one connection after the other."""

    def __init__(self, token: str) -> None:
        self.token = token
        self.refused = 0
        self._coming: asyncio.Queue[Peer] = asyncio.Queue()
        self._server: Server

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def _check(self, connection: ServerConnection, request: Request) -> Response | None:
        if request.headers.get("Authorization") == f"Bearer {self.token}" and request.path == "/api/v1/agents/link":
            return None
        self.refused += 1
        return connection.respond(http.HTTPStatus.FORBIDDEN, "")

    async def _serve(self, connection: ServerConnection) -> None:
        peer = Peer(connection)
        self._coming.put_nowait(peer)
        await peer.read()

    async def accept(self) -> Peer:
        async with asyncio.timeout(TIMEOUT_S):
            return await self._coming.get()


@asynccontextmanager
async def service_peer(token: str = "tlp_test") -> AsyncIterator[ServicePeer]:
    peer = ServicePeer(token)
    async with serve(peer._serve, "127.0.0.1", 0, process_request=peer._check, max_size=None) as server:
        peer._server = server
        yield peer
        server.close(close_connections=True)
