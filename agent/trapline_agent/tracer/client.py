"""The agent's end of the tracer's socket, and how a tracer is started.

The tracer runs in a session of its own, so that what ends the agent (a terminal's hang-up, its cgroup, a signal to its
process group) does not end the tracer, which has bytes to take out first.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Self

from trapline.errors import ProtocolError, TraplineError, Unavailable
from trapline_agent.plans import AggregatePlan, FetchPlan, FileKey, SitePlan
from trapline_agent.tracer import messages as m

Event = m.FrameFile | m.Targets | m.Covered | m.Stats | m.Completed | m.Mapped | m.Exited | m.LeaseEnded
"""What comes unasked; an encoded hit batch or aggregate comes as bytes."""

_START_TIMEOUT_S = 20.0


def spawn_tracer(socket: Path, *, log: Path | None = None, args: Sequence[str] = ()) -> subprocess.Popen[bytes]:
    """Starts a tracer that listens on ``socket`` and returns its process at once.

    Args:
        socket: path of the Unix socket, whose directory must exist; made with mode 0600.
        log: file for its log (default: this process' standard error).
        args: further arguments of ``trapline-tracer``.
    """
    stderr = log.open("ab") if log else None
    try:
        return subprocess.Popen(
            [sys.executable, "-m", "trapline_agent.tracer", "--socket", str(socket), *args],
            stderr=stderr,
            start_new_session=True,
        )
    finally:
        if stderr:
            stderr.close()


class TracerClient:
    """One connection to a tracer. All methods belong to one event loop.

    The lease is renewed in the background for as long as the event loop runs; an agent that hangs loses it.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._ids = itertools.count(1)
        self._pending: dict[int, asyncio.Future[m.Done]] = {}
        self._events: asyncio.Queue[Event | bytes | None] = asyncio.Queue()
        self._tasks: list[asyncio.Task[None]] = []
        self.ready: m.Ready

    @classmethod
    async def connect(
        cls,
        socket: Path,
        *,
        host: str,
        lease_s: float = 30.0,
        self_pids: Sequence[int] = (),
        budgets: m.Budgets = m.DEFAULT_BUDGETS,
        process: subprocess.Popen[bytes] | None = None,
        timeout: float = _START_TIMEOUT_S,
    ) -> Self:
        """Connects, waiting until the tracer listens.

        Args:
            socket: the tracer's socket.
            host: the host's id, for the headers of its batches.
            lease_s: seconds after which the tracer takes everything out when it does not hear of us.
            self_pids: processes beside this one and the tracer that are never to be probed.
            budgets: what probes may add to the time of programs.
            process: the tracer if it was just spawned: its early end is reported instead of waited for.
            timeout: seconds to wait.

        Raises:
            Unavailable: nobody listens there, or the tracer ended.
            ProtocolError: the tracer is of another release.
        """
        deadline = asyncio.get_running_loop().time() + timeout
        while True:
            try:
                reader, writer = await asyncio.open_unix_connection(str(socket), limit=m.MAX_FRAME_BYTES)
                break
            except (FileNotFoundError, ConnectionRefusedError) as e:
                if process is not None and (status := process.poll()) is not None:
                    raise Unavailable(f"the tracer ended with status {status} before it listened on {socket}") from e
                if process is None or asyncio.get_running_loop().time() > deadline:
                    raise Unavailable(
                        f"no tracer listens on {socket}", hint="start one with `trapline-tracer --socket PATH`"
                    ) from e
                await asyncio.sleep(0.02)
            except PermissionError as e:
                raise Unavailable(f"the tracer's socket {socket} belongs to another user") from e
        self = cls(reader, writer)
        self._send(
            m.Hello(agent_pid=os.getpid(), host=host, lease_s=lease_s, self_pids=list(self_pids), budgets=budgets)
        )
        first = await self._read()
        if not isinstance(first, m.Ready) or first.protocol != m.PROTOCOL:
            writer.close()
            raise ProtocolError(f"the tracer on {socket} speaks another protocol", hint="restart it with this release")
        self.ready = first
        self._tasks = [
            asyncio.create_task(self._receive(), name="tracer-receive"),
            asyncio.create_task(self._renew(max(lease_s / 5, 0.05)), name="tracer-renew"),
        ]
        return self

    async def _read(self) -> m.ToAgent | bytes | None:
        try:
            length, kind = m.FRAME.unpack(await self._reader.readexactly(m.FRAME.size))
            if length > m.MAX_FRAME_BYTES:
                raise ProtocolError(f"frame of {length} bytes from the tracer")
            payload = await self._reader.readexactly(length)
        except (asyncio.IncompleteReadError, ConnectionError):
            return None
        return payload if kind == m.HITS else m.parse_to_agent(payload)

    async def _receive(self) -> None:
        try:
            while (item := await self._read()) is not None:
                if isinstance(item, m.Done):
                    if (future := self._pending.pop(item.id, None)) and not future.done():
                        future.set_result(item)
                elif not isinstance(item, m.Ready):
                    self._events.put_nowait(item)
        finally:
            for future in self._pending.values():
                if not future.done():
                    future.set_exception(Unavailable("the tracer is gone"))
            self._pending.clear()
            self._events.put_nowait(None)

    async def _renew(self, every_s: float) -> None:
        while True:
            await asyncio.sleep(every_s)
            self._send(m.Renew())

    def _send(self, message: m.Message) -> None:
        self._writer.write(m.frame(message))

    async def _call(self, message: m.Register | m.Unregister | m.Launch | m.Release | m.Signal | m.Shutdown) -> m.Done:
        if self._tasks and self._tasks[0].done():
            raise Unavailable("the tracer is gone", hint="restart the agent")
        future: asyncio.Future[m.Done] = asyncio.get_running_loop().create_future()
        self._pending[message.id] = future
        self._send(message)
        await self._writer.drain()
        done = await future
        if done.error is not None:
            raise TraplineError.from_wire(done.error)
        return done

    async def register(
        self,
        probe: str,
        *,
        generation: int,
        sites: Sequence[str],
        plans: Sequence[SitePlan],
        fetches: Sequence[FetchPlan] = (),
        where: Mapping[str, str] | None = None,
        max_hits: int = 0,
        overhead: float | None = None,
        returns: bool = False,
        aggregate: AggregatePlan | None = None,
    ) -> None:
        """Registers a probe, or adds sites to it; returns when every process that maps the files now is armed or refused.

        Per-process refusals come as ``Targets`` events. Raises EngineError where nothing may be registered at all.
        """
        await self._call(
            m.Register(
                id=next(self._ids),
                probe=probe,
                generation=generation,
                sites=list(sites),
                plans=list(plans),
                fetches=list(fetches),
                where=dict(where or {}),
                max_hits=max_hits,
                overhead=overhead,
                returns=returns,
                aggregate=aggregate,
            )
        )

    async def unregister(self, probe: str) -> None:
        """Takes a probe out; returns when its bytes are out. One that is not there is no error."""
        await self._call(m.Unregister(id=next(self._ids), probe=probe))

    def watch(self, names: Sequence[str]) -> None:
        """Sets the basenames whose unknown mappings are reported as ``Mapped``."""
        self._send(m.Watch(names=list(names)))

    def spare(self, self_pids: Sequence[int]) -> None:
        """Sets the processes beside this one and the tracer that are never to be probed, from now on."""
        self._send(m.Spare(self_pids=[os.getpid(), *self_pids]))

    def set_loaders(self, plans: Sequence[SitePlan]) -> None:
        """Tells where the dynamic loaders of this host report what they mapped; see ``Loaders``."""
        self._send(m.Loaders(plans=list(plans)))

    def set_frame_table(self, file: FileKey, build_id: str, table: bytes) -> None:
        """Tells how the callers of a file's code are found; see ``FrameTable``."""
        self._send(m.FrameTable(file=file, build_id=build_id, table=table))

    async def launch(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        output: str = "inherit",
    ) -> int:
        """Starts a command held before its first instruction; returns its pid. Raises EngineError if it cannot start."""
        done = await self._call(
            m.Launch(
                id=next(self._ids),
                argv=list(argv),
                env=dict(os.environ if env is None else env),
                cwd=cwd or os.getcwd(),
                output=output,
            )
        )
        return done.pid

    async def release(self, pid: int) -> None:
        """Lets a launched command run."""
        await self._call(m.Release(id=next(self._ids), pid=pid))

    async def signal(self, pid: int, signal: int) -> None:
        """Sends a signal to a launched command; one that has ended is no error."""
        await self._call(m.Signal(id=next(self._ids), pid=pid, signal=signal))

    async def shutdown(self) -> None:
        """Takes everything out and ends the tracer; returns when that is done."""
        with contextlib.suppress(Unavailable):
            await self._call(m.Shutdown(id=next(self._ids)))
        await self.close()

    async def events(self) -> AsyncIterator[Event | bytes]:
        """Yields what comes unasked, encoded hit batches as bytes; ends when the tracer does. One reader at a time."""
        while (item := await self._events.get()) is not None:
            yield item

    async def close(self) -> None:
        """Leaves the tracer, which keeps its sites until the lease ends."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._writer.close()
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()
