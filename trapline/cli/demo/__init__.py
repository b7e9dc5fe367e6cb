"""``trapline demo``: everything on this machine, on real programs, for as long as one looks.

A service with a state directory of its own, an agent and its tracer; programs that the tracer starts as its own children
(so that an ordinary user may trace them where Yama restricts that to descendants). They wait until the probes on them,
made over HTTP, are armed, and count what they do: in the end that must be what was hit.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import sys
import tempfile
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Group, RenderableType
from rich.live import Live
from rich.text import Text

from trapline.cli.console import EXIT_ERROR, err, microseconds, note, out, print_json, print_table, progress, run
from trapline.cli.demo.workload import Program, programs
from trapline.cli.local import agent_settings, dashboard_url
from trapline.cli.rows import Lines
from trapline.client import AsyncClient, Gap, HitBatch
from trapline.errors import Unavailable
from trapline.model import Phase, Probe, TargetState
from trapline.state import DEFAULT_PORT, Access, write_access
from trapline_agent.agent import Agent
from trapline_agent.tracer.client import TracerClient
from trapline_service.config import Settings
from trapline_service.server import Server

_LINES_PER_S = 8
_SHOWN = 14
_END_TIMEOUT_S = 5.0
_SETTLE_TIMEOUT_S = 5.0


@dataclass
class Watched:
    """One probe of the demo."""

    probe: Probe
    program: Program
    name: str
    processes: int = 0
    hits: int = 0
    """Hits that came over the stream."""
    lost: int = 0

    @property
    def own_count(self) -> int | None:
        return self.program.counted.get(self.name)


@dataclass
class Screen:
    """What the terminal shows: the last hits, at a rate that can be read, and every probe's counts."""

    watched: dict[str, Watched]
    json: bool
    recent: deque[str] = field(default_factory=lambda: deque(maxlen=_SHOWN))
    _lines: Lines = field(default_factory=Lines)
    _next_line: float = 0.0

    def show(self, batch: HitBatch, live: Live | None) -> None:
        """Takes a batch."""
        if self.json:
            sys.stdout.write(self._lines.ndjson(batch))
            sys.stdout.flush()
            return
        now = time.monotonic()
        if now < self._next_line:
            return
        self._next_line = now + 1 / _LINES_PER_S
        line = self._lines.text(batch, 1).rstrip("\n")
        if live is None:
            print(line, flush=True)
        else:
            self.recent.append(line)
            live.update(self.render())

    def render(self) -> RenderableType:
        """Returns the live picture."""
        counts = Text()
        for watched in self.watched.values():
            counts.append(f"{watched.name:20}", style="bold cyan")
            counts.append(f"{watched.hits:>9,} hits   {watched.lost:,} lost   {watched.program.title}\n")
        lines = Text("\n".join(self.recent), no_wrap=True, overflow="ellipsis")
        return Group(lines, Text(), counts)


class Demo:
    """One demonstration; ``run`` is its life.

    Attributes:
        status: the exit status: 0, or 1 where a count was not what it should have been.
    """

    def __init__(self, directory: Path, *, seconds: float | None, port: int | None, json: bool) -> None:
        self._directory = directory
        self._seconds = seconds
        self._json = json
        self._port_given = port is not None
        self._settings = Settings(
            host="127.0.0.1",
            port=DEFAULT_PORT if port is None else port,
            state_dir=directory / "state",
            admin_token=None,
        )
        self._watched: dict[str, Watched] = {}
        self.status = 0

    async def run(self) -> None:
        """Shows until the time is over or it is cancelled; the summary comes in both cases."""
        with progress("preparing the programs"):
            workload, left_out = await programs(self._directory)
        for reason in left_out:
            note(reason)
        if not workload:
            raise Unavailable("there is no program to show", hint="install gcc, or a python3 with sqlite3")
        async with self._server() as server:
            assert server.new_token is not None, "a new state directory has no token yet"
            token = server.new_token
            write_access(self._settings.state_dir, Access(server.url, token))
            settings = agent_settings(server.url, token, self._settings, process_interval_s=1.0)
            async with Agent(settings) as agent, AsyncClient(server.url, token) as client:
                with progress("starting"):
                    await agent.linked.wait()
                    await self._start(agent, client, workload)
                self._introduce(server.url, token)
                await self._show(agent, client, workload)

    @contextlib.asynccontextmanager
    async def _server(self) -> AsyncIterator[Server]:
        """Runs the service on the usual port, or where that is taken and nobody asked for it, on a free one."""
        server = Server(self._settings)
        try:
            await server.start()
        except Unavailable:
            if self._port_given:
                raise
            server = Server(self._settings.model_copy(update={"port": 0}))
            await server.start()
        try:
            yield server
        finally:
            await server.stop()

    # --- the beginning ------------------------------------------------------------------------------------------------

    async def _start(self, agent: Agent, client: AsyncClient, workload: list[Program]) -> None:
        """Starts the programs, and puts probes on them; they wait to begin."""
        for program in workload:
            tracer = _tracer(agent)
            program.pid = await tracer.launch(program.argv, cwd=str(self._directory), output="null")
            await tracer.release(program.pid)
        for program in workload:
            await _until(program.ready.exists, f"{program.title} does not start")
            for name, text in program.texts():
                probe = await client.create_probe(text, name=name)
                self._watched[probe.id] = Watched(probe, program, name)
        for watched in self._watched.values():
            watched.probe = await client.wait(watched.probe.id)
            if watched.probe.status.phase is not Phase.ARMED:
                reasons = "; ".join(c.message for c in watched.probe.status.conditions) or "nothing was armed"
                raise Unavailable(f"probe {watched.name} is {watched.probe.status.phase}: {reasons}")
            targets = await client.targets(watched.probe.id)
            watched.processes = len({t.pid for t in targets if t.state is TargetState.ARMED})

    def _introduce(self, url: str, token: str) -> None:
        if self._json:
            print_json({"url": url, "token": token, "probes": [w.probe.spec.text for w in self._watched.values()]})
            return
        note(f"\nDashboard   {dashboard_url(url, token)}")
        note(f"Token       {token}")
        for watched in self._watched.values():
            note(f"Probe       {watched.probe.spec.text}")
        note("" if self._seconds else "Ctrl-C ends it and leaves every process as it was.\n")

    # --- the show -----------------------------------------------------------------------------------------------------

    async def _show(self, agent: Agent, client: AsyncClient, workload: list[Program]) -> None:
        screen = Screen(self._watched, self._json)
        live = Live(screen.render(), console=out, auto_refresh=False) if out.is_terminal and not self._json else None
        async with asyncio.TaskGroup() as tasks:
            stream = tasks.create_task(self._stream(client, screen, live), name="stream")
            try:
                with live or contextlib.nullcontext():
                    for program in workload:
                        await _tracer(agent).signal(program.pid, signal.SIGUSR1)
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(self._seconds):
                            await asyncio.get_running_loop().create_future()
            finally:
                try:
                    await self._finish(agent, client, workload)
                finally:
                    stream.cancel()

    async def _stream(self, client: AsyncClient, screen: Screen, live: Live | None) -> None:
        async for item in client.batches(list(self._watched)):
            probe = item.probe if isinstance(item, Gap) else item.header.probe
            if (watched := self._watched.get(probe)) is None:
                continue
            if isinstance(item, Gap):
                watched.lost += item.count
            else:
                watched.hits += item.header.count
                screen.show(item, live)

    # --- the end ------------------------------------------------------------------------------------------------------

    async def _finish(self, agent: Agent, client: AsyncClient, workload: list[Program]) -> None:
        for program in workload:
            await _tracer(agent).signal(program.pid, signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_END_TIMEOUT_S):
                for program in workload:
                    await agent.ended(program.pid)
        for program in workload:
            program.read_report()
        for watched in self._watched.values():
            watched.probe = await self._settled(client, watched)
            await client.delete_probe(watched.probe.id)
        self._summary()

    @staticmethod
    async def _settled(client: AsyncClient, watched: Watched) -> Probe:
        """Returns a probe when its last counters have come; they do so once a second."""
        own = watched.own_count or 0
        try:
            return await client.wait_for(
                watched.probe.id, lambda probe: probe.status.counters.hits >= own, timeout=_SETTLE_TIMEOUT_S
            )
        except Unavailable:
            return await client.probe(watched.probe.id)

    def _summary(self) -> None:
        documents, table = [], []
        for watched in self._watched.values():
            status, own = watched.probe.status, watched.own_count
            hits, dropped = status.counters.hits, status.counters.dropped
            if own not in (None, hits):
                self.status = EXIT_ERROR
            documents.append(
                {
                    "probe": watched.name,
                    "processes": watched.processes,
                    "hits": hits,
                    "dropped": dropped,
                    "counted_by_program": own,
                    "overhead_ns": status.overhead_ns,
                }
            )
            count = "-" if own is None else own
            table.append((watched.name, watched.processes, hits, dropped, count, microseconds(status.overhead_ns)))
        if self._json:
            print_json({"summary": documents})
            return
        note("")
        headings = ("PROBE", "PROCESSES", "HITS", "DROPPED", "PROGRAM'S OWN COUNT", "OVERHEAD/HIT")
        print_table(headings, table, console=err)
        if self.status:
            note("hits and the programs' own counts differ; please report this")


def _tracer(agent: Agent) -> TracerClient:
    if agent.tracer is None:
        raise Unavailable("the tracer ended", hint="its log is on standard error")
    return agent.tracer


async def _until(true: Callable[[], bool], otherwise: str) -> None:
    """Waits for what only a look can tell. Raises Unavailable with ``otherwise`` when it takes too long."""
    deadline = time.monotonic() + _SETTLE_TIMEOUT_S
    while not true():
        if time.monotonic() > deadline:
            raise Unavailable(otherwise)
        await asyncio.sleep(0.02)


def run_demo(*, seconds: float | None, port: int | None, json: bool) -> int:
    """Runs the demonstration in this process until its end, SIGINT or SIGTERM; returns the exit status."""
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(name)s: %(message)s", force=True)
    with tempfile.TemporaryDirectory(prefix="trapline-demo-") as directory:
        demo = Demo(Path(directory), seconds=seconds, port=port, json=json)
        run(demo.run)
    return demo.status
