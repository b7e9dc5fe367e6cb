"""The agent's WebSocket to the service: hello, the desired set, reports, hit batches, and a new try after every cut.

What is to be said is not queued but *pulled*: a caller posts a key and a function that makes the message, and the
function runs when the socket can take it. However slow the service is, a probe's report is there once, and it is the
latest. After a cut nothing of it is sent again: the handler posts its whole state at the next welcome. Hit batches are
the exception; they wait in the outbox and are sent again until acknowledged.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Callable
from typing import Any, NoReturn, Protocol

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus, InvalidURI

from trapline.errors import AuthError, ProtocolError, TraplineError, Unavailable
from trapline.model import Model
from trapline.protocol import messages as m
from trapline.state import is_loopback
from trapline_agent.outbox import Outbox

log = logging.getLogger(__name__)

_WELCOME_TIMEOUT_S = 10.0
_FIRST_PAUSE_S = 0.25
_STEADY_S = 5.0
"""A connection that lasted so long was a good one: the next pause is a short one again."""
_MAX_REQUESTS = 32

Maker = Callable[[], Model | None]
"""Makes a message when it can be sent, or None when there is nothing to say any more."""


class Handler(Protocol):
    """What the link tells the agent. All are called on the link's event loop."""

    def hello(self) -> m.Hello: ...

    async def welcomed(self, welcome: m.Welcome) -> None:
        """A new connection: the whole state is to be posted. The desired set follows."""
        ...

    def desired(self, desired: m.Desired) -> None: ...

    async def request(self, request: m.Request) -> dict[str, Any]:
        """Answers a question; a TraplineError goes back as the answer."""
        ...


class Link:
    """The connection to one service, for as long as the agent runs.

    Attributes:
        connected: set while the service has welcomed us.
    """

    def __init__(
        self, url: str, token: str, *, handler: Handler, outbox: Outbox, reconnect_max_s: float = 15.0
    ) -> None:
        """
        Args:
            url: the link's WebSocket URL.
            token: bearer token.
            handler: whom to tell.
            outbox: the hit batches to send; the link is its only reader.
            reconnect_max_s: the longest pause between two tries, in seconds.
        """
        self._url = url
        self._token = token
        self._handler = handler
        self._outbox = outbox
        self._reconnect_max_s = reconnect_max_s
        self._posted: dict[str, Maker] = {}
        self._answering: set[str] = set()
        self._was_welcome = False
        self.connected = asyncio.Event()

    def post(self, key: str, make: Maker) -> None:
        """Says something as soon as the socket can take it; replaces what was posted under ``key`` and not sent yet.

        Nothing happens while there is no connection: the handler's ``welcomed`` posts everything anew.
        """
        if self.connected.is_set():
            self._posted[key] = make
            self._outbox.ready.set()

    async def run(self) -> NoReturn:
        """Keeps the connection; returns only by being cancelled.

        Raises:
            AuthError: the service refuses the token, and has never accepted it.
            ProtocolError: the service speaks another protocol, and never spoke this one.
        """
        attempt = 0
        loop = asyncio.get_running_loop()
        while True:
            began = loop.time()
            try:
                await self._connect_once()
                log.warning("the service at %s closed the link", self._url)
            except (AuthError, ProtocolError) as e:
                if not self._was_welcome:
                    raise
                log.warning("the service at %s: %s", self._url, e)
            except (OSError, TimeoutError, InvalidHandshake, ConnectionClosed, TraplineError) as e:
                level = logging.WARNING if attempt == 0 else logging.DEBUG
                log.log(level, "no link to the service at %s: %s; trying again", self._url, e or type(e).__name__)
            if loop.time() - began > _STEADY_S:
                attempt = 0
            ceiling = min(self._reconnect_max_s, _FIRST_PAUSE_S * 2 ** min(attempt, 16))
            attempt += 1
            # Half fixed, half random: a fleet that lost its service must not come back all at once.
            await asyncio.sleep(ceiling * random.uniform(0.5, 1.0))

    async def _connect_once(self) -> None:
        try:
            connection = await connect(
                self._url,
                additional_headers={"Authorization": f"Bearer {self._token}"},
                compression=None,  # it costs latency (p50 18 -> 91 ms measured), and columns barely shrink per frame
                max_size=m.MAX_TEXT_BYTES,
                open_timeout=_WELCOME_TIMEOUT_S,
                proxy=None if is_loopback(self._url) else True,
            )
        except InvalidStatus as e:
            # Before it accepts a WebSocket, an ASGI service can only say 403.
            if e.response.status_code in (401, 403):
                raise AuthError(
                    f"the service at {self._url} refuses this agent's token",
                    hint="give the token that the service printed, with --token or TRAPLINE_AGENT_TOKEN",
                ) from e
            raise
        except InvalidURI as e:
            raise ProtocolError(f"{self._url} is not a URL of a service", hint="use http://HOST:PORT") from e
        try:
            await self._session(connection)
        finally:
            self.connected.clear()
            self._posted.clear()
            # Bounded: a peer that is gone does not answer the closing handshake either.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    await connection.close()

    async def _session(self, connection: ClientConnection) -> None:
        await connection.send(m.encode(self._handler.hello()))
        async with asyncio.timeout(_WELCOME_TIMEOUT_S):
            first = self._parse(await connection.recv())
        if isinstance(first, m.LinkError):
            raise TraplineError.from_wire(first.error)
        if not isinstance(first, m.Welcome):
            raise ProtocolError(f"the service at {self._url} began with `{first.type}` instead of `welcome`")
        if first.protocol != m.PROTOCOL_VERSION:
            raise ProtocolError(
                f"the service at {self._url} speaks protocol {first.protocol}, this agent {m.PROTOCOL_VERSION}",
                hint="upgrade the older one",
            )
        self._was_welcome = True
        self._answering.clear()
        self._outbox.rewind(first.last_link_seq)
        self.connected.set()
        await self._handler.welcomed(first)
        log.info("linked to %s as host %s", self._url, first.host)
        try:
            async with asyncio.TaskGroup() as tasks:
                sender = tasks.create_task(self._send(connection), name="link-send")
                beat = tasks.create_task(self._beat(first.heartbeat_s), name="link-beat")
                try:
                    await self._receive(connection, tasks)
                finally:
                    sender.cancel()
                    beat.cancel()
        except BaseExceptionGroup as group:
            raise _first(group) from group

    @staticmethod
    def _parse(frame: str | bytes) -> m.Welcome | m.Desired | m.Request | m.Ack | m.Heartbeat | m.LinkError:
        if isinstance(frame, bytes):
            raise ProtocolError("the service sent a binary frame")
        return m.parse_service_message(frame)

    async def _receive(self, connection: ClientConnection, tasks: asyncio.TaskGroup) -> None:
        async for frame in connection:
            message = self._parse(frame)
            if isinstance(message, m.Ack):
                self._outbox.ack(message.link_seq)
            elif isinstance(message, m.Desired):
                self._handler.desired(message)
            elif isinstance(message, m.Request):
                if len(self._answering) >= _MAX_REQUESTS:
                    self._reply(message.id, Unavailable("this host's agent has too many questions to answer"))
                else:
                    self._answering.add(message.id)
                    tasks.create_task(self._answer(message), name=f"answer-{message.method}")
            elif isinstance(message, m.LinkError):
                raise TraplineError.from_wire(message.error)

    async def _answer(self, request: m.Request) -> None:
        try:
            self._reply(request.id, await self._handler.request(request))
        except TraplineError as e:
            self._reply(request.id, e)
        except Exception as e:  # one bad question must not cost the host its link
            log.exception("request %s failed", request.method)
            self._reply(request.id, TraplineError(f"the agent failed on `{request.method}`: {type(e).__name__}: {e}"))
        finally:
            self._answering.discard(request.id)

    def _reply(self, request_id: str, answer: dict[str, Any] | TraplineError) -> None:
        if isinstance(answer, TraplineError):
            reply = m.Reply(id=request_id, error=answer.to_wire())
        else:
            reply = m.Reply(id=request_id, result=answer)
        self.post(f"reply {request_id}", lambda: reply)

    async def _beat(self, every_s: float) -> NoReturn:
        while True:
            await asyncio.sleep(every_s)
            self.post("heartbeat", m.Heartbeat)

    async def _send(self, connection: ClientConnection) -> NoReturn:
        outbox = self._outbox
        while True:
            await outbox.ready.wait()
            outbox.ready.clear()
            while True:
                # Words before hits, one batch at a time, so that a report never waits behind megabytes.
                while self._posted:
                    key = next(iter(self._posted))
                    message = self._posted.pop(key)()
                    if message is not None:
                        await connection.send(m.encode(message))
                await self._tell_drops(connection)
                item = outbox.next()
                if item is None:
                    break
                link_seq, batch = item
                await connection.send(link_seq.to_bytes(m.LINK_SEQ_BYTES, "little") + batch)

    async def _tell_drops(self, connection: ClientConnection) -> None:
        drops = self._outbox.take_drops()
        while drops:
            drop = drops[-1]
            try:
                await connection.send(m.encode(m.LinkDrops(probe=drop.probe, stage=drop.stage, count=drop.count)))
            except ConnectionClosed:
                self._outbox.untake_drops(drops)
                raise
            drops.pop()


def _first(group: BaseExceptionGroup[Any]) -> BaseException:
    """Returns one of the errors that ended a session; they all say that it is over."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
