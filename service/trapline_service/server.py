"""Running it: a socket, uvicorn, and the application, in a process of its own or inside another asyncio program."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import logging
import signal
import socket
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Self

import uvicorn
import uvloop
from fastapi import FastAPI

from trapline.errors import Unavailable
from trapline.protocol.messages import MAX_TEXT_BYTES
from trapline_service.app import create_app
from trapline_service.config import Settings
from trapline_service.service import Service
from trapline_service.store.base import Store

log = logging.getLogger(__name__)

SEND_BUFFER_BYTES = 128 * 1024
"""SO_SNDBUF of every connection (inherited from the listening socket, socket(7)): what waits for a slow subscriber
should wait in its own bounded queue, not in the kernel, which would hoard megabytes of stale hits."""
_PING_INTERVAL_S = 20.0
_PING_TIMEOUT_S = 60.0
_GRACE_S = 2
_GC_THRESHOLD = 50_000


class _Uvicorn(uvicorn.Server):
    """uvicorn without its grip on the process: signals are the program's, and starting can be waited for."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()


class Server:
    """A service that listens: ``async with Server(settings) as server: ...``, or ``start`` and ``stop``.

    Attributes:
        port: the TCP port it listens on, once started.
        url: its base URL, for a client on this machine.
        new_token: the admin token where this start made one, to be shown once; None otherwise.
    """

    def __init__(self, settings: Settings, store: Store | None = None) -> None:
        """``store``: None: the SQLite file in the settings' state directory."""
        self._settings = settings
        self._app = create_app(settings, store)
        self._stopping = asyncio.Event()
        self._running: asyncio.Task[None] | None = None
        self.port = 0
        self.url = ""
        self.new_token: str | None = None

    @property
    def service(self) -> Service:
        """The parts behind HTTP, while it runs."""
        service: Service = self._app.state.service
        return service

    async def start(self) -> None:
        """Listens; returns when requests are answered.

        Raises:
            Unavailable: the address cannot be had, or the store cannot be opened.
            Conflict: the store is of another release.
        """
        # The address first: when another service has it, its database must not be touched.
        listener = _listen(self._settings.host, self._settings.port)
        host, self.port = listener.getsockname()[:2]
        self.url = f"http://{_reachable(host)}:{self.port}"
        ready = asyncio.Event()
        # A task of its own, so that start and stop may be called from any.
        self._running = asyncio.create_task(self._run(listener, ready), name="trapline-service")
        waiting = asyncio.create_task(ready.wait())
        await asyncio.wait({self._running, waiting}, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if self._running.done():
            await self._running
        log.info("listening on %s", self.url)

    async def stop(self) -> None:
        """Says good-bye to all peers, writes what is unsaved, and stops. May be called twice."""
        self._stopping.set()
        if self._running is not None:
            await self._running

    async def wait(self) -> None:
        """Returns when it has stopped; raises what went wrong if it did so by itself."""
        if self._running is not None:
            await asyncio.shield(self._running)

    async def _run(self, listener: socket.socket, ready: asyncio.Event) -> None:
        with contextlib.closing(listener):
            # Not uvicorn's own lifespan, which ends the process when it fails.
            async with self._app.router.lifespan_context(self._app):
                self.new_token = self.service.new_token
                server = _Uvicorn(_config(self._app))
                serving = asyncio.create_task(server.serve([listener]), name="uvicorn")
                try:
                    await server.listening.wait()
                    ready.set()
                    await self._stopping.wait()
                finally:
                    self.service.say_goodbye()
                    server.should_exit = True
                    await asyncio.shield(serving)
                    for connection in list(server.server_state.connections):
                        # A peer that reads nothing never takes the last bytes.
                        connection.transport.abort()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()


def _config(app: FastAPI) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        lifespan="off",
        ws="websockets-sansio",
        ws_max_size=MAX_TEXT_BYTES,
        ws_per_message_deflate=False,
        ws_ping_interval=_PING_INTERVAL_S,
        ws_ping_timeout=_PING_TIMEOUT_S,
        timeout_graceful_shutdown=_GRACE_S,
        log_config=None,
        access_log=False,  # URLs may hold stream tickets
        server_header=False,
        proxy_headers=False,
    )


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        sock = socket.socket(family, socket.SOCK_STREAM)
    except OSError as e:
        raise Unavailable(f"{host} is no address to listen on: {e.strerror}", hint="set TRAPLINE_HOST") from e
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        sock.bind(address)
        sock.listen(1024)
    except OSError as e:
        sock.close()
        hint = "set TRAPLINE_PORT, or 0 for a free one" if e.errno in (errno.EADDRINUSE, errno.EACCES) else ""
        raise Unavailable(f"cannot listen on {host} port {port}: {e.strerror}", hint=hint) from e
    sock.setblocking(False)
    return sock


def _reachable(host: str) -> str:
    if host in ("0.0.0.0", "::"):
        return "127.0.0.1" if host == "0.0.0.0" else "[::1]"
    return f"[{host}]" if ":" in host else host


def run(settings: Settings, *, on_ready: Callable[[Server], None] | None = None) -> None:
    """Serves in this process until SIGINT or SIGTERM.

    Args:
        settings: what to serve.
        on_ready: called once requests are answered, with the server: its ``url`` and ``new_token`` are of interest.

    Raises:
        Unavailable: it could not start.
    """

    async def main() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop.set)
        async with Server(settings) as server:
            if on_ready is not None:
                on_ready(server)
            ended = asyncio.create_task(server.wait())
            stopped = asyncio.create_task(stop.wait())
            await asyncio.wait({ended, stopped}, return_when=asyncio.FIRST_COMPLETED)
            stopped.cancel()
            if ended.done():
                await ended
            ended.cancel()

    # Decoding a large batch makes many small objects; the collector's default halves its speed (measured).
    gc.set_threshold(_GC_THRESHOLD, *gc.get_threshold()[1:])
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())
