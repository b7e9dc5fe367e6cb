"""Keeps a tracer: joins one that runs, or starts one and starts another when it dies.

A tracer that the agent starts is in a session of its own: it outlives the agent's death by its lease, and takes every
breakpoint out then. An agent that comes back before finds it at its socket in the state directory, and goes on with it. A
clean stop asks it to take everything out at once.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from trapline.errors import Conflict, ProtocolError, TraplineError, Unavailable
from trapline_agent.tracer.client import Event, TracerClient, spawn_tracer
from trapline_agent.tracer.messages import DEFAULT_BUDGETS, Budgets

log = logging.getLogger(__name__)

_FIRST_PAUSE_S = 0.2
_MAX_PAUSE_S = 5.0
_END_TIMEOUT_S = 10.0
_LOCK_FILE = "agent.lock"
_SOCKET = "tracer.sock"
_SOCKET_PATH_BYTES = 100
"""A little less than the 107 that a socket's path may have (unix(7))."""


class Listener(Protocol):
    """Whom the keeper tells; ``trapline_agent.reconcile.Reconciler`` is one."""

    def tracer_up(self, tracer: TracerClient) -> None: ...

    def tracer_lost(self, why: TraplineError) -> None: ...

    def handle(self, event: Event) -> None: ...


class TracerKeeper:
    """One tracer after the other. All methods belong to one event loop.

    Attributes:
        client: the tracer's connection; None while there is none.
        spawned: whether the tracer is of our own making.
    """

    def __init__(
        self,
        *,
        host_id: str,
        directory: Path | None = None,
        socket: Path | None = None,
        args: Sequence[str] = (),
        log_file: Path | None = None,
        lease_s: float = 30.0,
        self_pids: list[int] | None = None,
        budgets: Budgets = DEFAULT_BUDGETS,
    ) -> None:
        """
        Args:
            host_id: the host's id, for the headers of hit batches.
            directory: the agent's state directory, where the socket of a tracer that is started lies; None: a place of its
                own, which nobody finds again.
            socket: a tracer's socket to join; None starts a tracer.
            args: further arguments for a tracer that is started.
            log_file: its log; None is our standard error.
            lease_s: seconds after which the tracer takes everything out when it does not hear of us.
            self_pids: processes that are never to be probed; ``spare`` adds to this very list.
            budgets: what probes may add to the time of programs.
        """
        self._host_id = host_id
        self._join = socket
        self._args = args
        self._log_file = log_file
        self._lease_s = lease_s
        self._budgets = budgets
        self._self_pids = [] if self_pids is None else self_pids
        self._state = directory
        self._directory: Path | None = None
        self._lock: int | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._stopping = False
        self._kept = asyncio.Event()
        self._kept.set()
        self.client: TracerClient | None = None

    @property
    def spawned(self) -> bool:
        return self._join is None

    async def start(self) -> TracerClient:
        """Starts or joins a tracer. Raises Unavailable or ProtocolError where that cannot be."""
        if self._join is not None:
            self.client = await self._connect(self._join, None)
        else:
            self._claim()
            socket = self._socket()
            try:
                # What an agent before us left, if its lease has not ended.
                self.client = await self._connect(socket, None)
                log.info("the tracer of an earlier agent is there (pid %d)", self.client.ready.pid)
            except (Unavailable, ProtocolError):
                self._process = spawn_tracer(socket, log=self._log_file, args=self._args)
                try:
                    self.client = await self._connect(socket, self._process)
                except BaseException:
                    # It holds nothing yet, so it may simply be ended.
                    self._process.terminate()
                    self._process.wait(_END_TIMEOUT_S)
                    raise
        return self.client

    def _claim(self) -> None:
        """Makes sure that no other agent has this state directory: two would take the tracer from one another."""
        if self._lock is not None or self._state is None:
            return
        self._state.mkdir(parents=True, exist_ok=True, mode=0o700)
        fd = os.open(self._state / _LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise Conflict(
                f"another agent runs with the state directory {self._state}",
                hint="end that one, or give this one a directory of its own (TRAPLINE_STATE_DIR)",
            ) from None
        self._lock = fd

    def _socket(self) -> Path:
        if self._state is not None and len(os.fsencode(self._state / _SOCKET)) <= _SOCKET_PATH_BYTES:
            return self._state / _SOCKET
        if self._directory is None:
            # Too long a path for a socket (unix(7)): it gets a short place of its own, which nobody finds again.
            self._directory = Path(tempfile.mkdtemp(prefix="trapline-"))
        return self._directory / _SOCKET

    async def _connect(self, socket: Path, process: subprocess.Popen[bytes] | None) -> TracerClient:
        return await TracerClient.connect(
            socket,
            host=self._host_id,
            lease_s=self._lease_s,
            self_pids=self._self_pids,
            budgets=self._budgets,
            process=process,
        )

    async def keep(self, listener: Listener, on_hits: Callable[[bytes], None]) -> None:
        """Passes on what the tracer says, and gets another tracer when it ends; from ``start`` to ``stop``.

        Args:
            listener: told of tracers that come and go, and of events.
            on_hits: takes an encoded hit batch.
        """
        pause = _FIRST_PAUSE_S
        self._kept.clear()
        try:
            while (client := self.client) is not None:
                listener.tracer_up(client)
                async for item in client.events():
                    pause = _FIRST_PAUSE_S
                    if isinstance(item, bytes):
                        on_hits(item)
                    else:
                        listener.handle(item)
                if self._stopping:
                    return
                self.client = None
                why = Unavailable(await self._obituary(), hint="the agent is getting another one")
                log.error("%s", why)
                listener.tracer_lost(why)
                await client.close()
                while self.client is None and not self._stopping:
                    await asyncio.sleep(pause)
                    pause = min(2 * pause, _MAX_PAUSE_S)
                    try:
                        await self.start()
                    except (TraplineError, OSError) as e:
                        log.error("no tracer: %s", e)
        finally:
            self._kept.set()

    def spare(self, pid: int) -> None:
        """Keeps a further process of Trapline's own from being probed (semantics P11)."""
        self._self_pids.append(pid)
        if self.client is not None:
            self.client.spare(self._self_pids)

    async def _obituary(self) -> str:
        if self._process is None:
            return f"the tracer on {self._join or self._socket()} closed the connection"
        try:
            status = await asyncio.to_thread(self._process.wait, _END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return f"the tracer (pid {self._process.pid}) closed the connection"
        return f"the tracer (pid {self._process.pid}) ended with status {status}"

    async def stop(self) -> None:
        """Ends the connection; a tracer that we started takes everything out, and has ended on return.

        What it said until then was passed on, if ``keep`` still runs.
        """
        self._stopping = True
        if self.client is not None:
            await (self.client.shutdown() if self.spawned else self.client.close())
            await self._kept.wait()
            self.client = None
        elif self._process is not None:
            # One that was just started and has not answered yet. A SIGTERM takes everything out, whatever it may hold.
            self._process.terminate()
        if self._process is not None:
            try:
                await asyncio.to_thread(self._process.wait, _END_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                # Never killed from here: it may hold breakpoints, which are fatal to their programs once it is dead.
                log.error("the tracer (pid %d) does not end; it is left to finish", self._process.pid)
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
