"""The agent: the link to the service at one end, the tracer at the other, and the desired set between them.

Composition root of the agent process. All of it runs on one event loop; reading ELF files and /proc happens in worker
threads. Nothing here touches a traced process: that is the tracer's work alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import getpass
import logging
import os
import platform
from types import TracebackType
from typing import Any, NoReturn, Self

from pydantic import ValidationError

import trapline
from trapline.errors import ProtocolError, TraplineError
from trapline.ids import new_id
from trapline.model import (
    EngineInfo,
    FrameNames,
    HookInfo,
    HostFacts,
    Module,
    ProbeSpec,
    Process,
    StackFrame,
    Symbolize,
)
from trapline.protocol import messages as m
from trapline.protocol.stacks import Frame, StackFile
from trapline_agent.capture.redaction import redaction
from trapline_agent.config import AgentSettings, instance_id
from trapline_agent.debuginfo.files import DebugFiles
from trapline_agent.keeper import TracerKeeper
from trapline_agent.link import Link
from trapline_agent.outbox import STAGE, Outbox
from trapline_agent.policy import read_policy
from trapline_agent.reconcile import Reconciler
from trapline_agent.resolve import Resolver
from trapline_agent.symbols.index import IndexCache
from trapline_agent.targets.process import boot_id, list_processes
from trapline_agent.tracer.client import Event, TracerClient
from trapline_agent.tracer.messages import Exited
from trapline_agent.unwind.names import Names
from trapline_agent.unwind.tables import Tables

log = logging.getLogger(__name__)

_FLUSH_TIMEOUT_S = 3.0
_SYMBOLS_LIMIT = 200


def host_facts(settings: AgentSettings, tracer: TracerClient) -> HostFacts:
    """Returns what this agent says of its host."""
    ready = tracer.ready
    uname = os.uname()
    try:
        system = platform.freedesktop_os_release().get("PRETTY_NAME", "")
    except OSError:
        system = ""
    return HostFacts(
        name=settings.host_name,
        boot_id=boot_id(),
        kernel=uname.release,
        arch=uname.machine,
        os=system,
        cpus=os.cpu_count() or 0,
        agent_version=trapline.__version__,
        agent_user=_user(),
        engines=[EngineInfo(name=ready.engine, available=ready.available, reason=ready.reason)],
        hooks=[HookInfo(name=name, available=works, reason=reason) for name, works, reason in ready.hooks],
    )


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.geteuid())


class Agent:
    """One host's agent; ``async with Agent(settings) as agent: await agent.run()``.

    Entering starts or joins the tracer and begins to reach for the service; leaving takes every breakpoint out and
    sends what is left. A task that fails for good ends the body as in an ``asyncio.TaskGroup``: by an exception group.

    Attributes:
        host_id: this host's id.
    """

    def __init__(self, settings: AgentSettings) -> None:
        self._settings = settings
        self.host_id = instance_id(settings.state_dir)
        self._link_id = new_id("lnk")
        self._self_pids = [os.getpid()]
        self._outbox = Outbox(settings.outbox_bytes)
        self._link = Link(
            settings.link_url,
            settings.token.get_secret_value(),
            handler=self,
            outbox=self._outbox,
            reconnect_max_s=settings.reconnect_max_s,
        )
        self._keeper = TracerKeeper(
            host_id=self.host_id,
            directory=settings.state_dir,
            socket=settings.tracer_socket,
            args=settings.tracer_args,
            log_file=settings.tracer_log,
            lease_s=settings.lease_s,
            self_pids=self._self_pids,
            budgets=settings.budgets,
        )
        self._processes: dict[str, Process] = {}
        self._told: dict[str, Process] | None = None
        """The process list as the service knows it; None: not at all yet."""
        self._ends: dict[int, asyncio.Future[int]] = {}
        """How the launched commands ended."""
        self._policy = read_policy(settings.policy)
        self._symbols = IndexCache(directory=settings.state_dir / "symbols")
        self._debug = DebugFiles(settings.state_dir, settings.debuginfod_urls.split()).of
        self._names = Names(self._symbols, self._debug)
        self._stopping = False
        self._tasks = asyncio.TaskGroup()
        self._resolver: Resolver
        self._reconciler: Reconciler

    @property
    def linked(self) -> asyncio.Event:
        """Set while the service has welcomed this agent."""
        return self._link.connected

    @property
    def tracer(self) -> TracerClient | None:
        """The tracer's connection; None while there is none."""
        return self._keeper.client

    async def __aenter__(self) -> Self:
        tracer = await self._keeper.start()
        await self._look_at_processes()
        self._resolver = Resolver(
            self.host_id,
            self._settings.host_name,
            self._self_pids,
            tracer.ready.pid,
            symbols=self._symbols,
            max_keys=self._settings.aggregate_keys,
            debug=self._debug,
            redact=redaction(self._policy.redact),
        )
        await self._tasks.__aenter__()
        self._reconciler = Reconciler(
            host_id=self.host_id,
            resolver=self._resolver,
            tasks=self._tasks,
            changed=self._report,
            resolve_interval_s=self._settings.resolve_interval_s,
            tables=Tables(self._settings.state_dir / "unwind"),
        )
        self._facts = host_facts(self._settings, tracer)
        self._background = [
            self._tasks.create_task(self._keeper.keep(self, self._outbox.put), name="tracer"),
            self._tasks.create_task(self._watch_processes(), name="processes"),
            self._tasks.create_task(self._watch_drops(), name="drops"),
            self._tasks.create_task(self._link.run(), name="link"),
        ]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await self._stop()
        finally:
            for task in self._background:
                task.cancel()
            await self._tasks.__aexit__(kind, error, trace)

    async def _stop(self) -> None:
        self._stopping = True
        await self._reconciler.remove_all()
        await self._keeper.stop()
        if self._link.connected.is_set():
            # What the probes' last moments gave is still on its way.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_FLUSH_TIMEOUT_S):
                    await self._outbox.empty.wait()

    async def run(self) -> NoReturn:
        """Runs until cancelled, or until something fails for good, which cancels it too."""
        never: asyncio.Future[NoReturn] = asyncio.get_running_loop().create_future()
        await never
        raise AssertionError("nobody holds this future")

    async def ended(self, pid: int) -> int:
        """Waits for the end of a command that the tracer launched; returns its status as os.waitstatus_to_exitcode does.

        Raises:
            Unavailable: the tracer ended first.
        """
        return await self._end_of(pid)

    def _end_of(self, pid: int) -> asyncio.Future[int]:
        if pid not in self._ends:
            self._ends[pid] = asyncio.get_running_loop().create_future()
        return self._ends[pid]

    # --- what the tracer tells ----------------------------------------------------------------------------------------

    def tracer_up(self, tracer: TracerClient) -> None:
        """Another tracer may be another process."""
        self._resolver.tracer_pid = tracer.ready.pid
        self._reconciler.tracer_up(tracer)

    def tracer_lost(self, why: TraplineError) -> None:
        self._reconciler.tracer_lost(why)
        for end in self._ends.values():
            if not end.done():
                end.set_exception(why)

    def handle(self, event: Event) -> None:
        if isinstance(event, Exited):
            if not (end := self._end_of(event.pid)).done():
                end.set_result(event.status)
        else:
            self._reconciler.handle(event)

    # --- reports ------------------------------------------------------------------------------------------------------

    def _report(self, probe: str) -> None:
        self._link.post(f"observed {probe}", lambda: self._observed(probe))

    def _observed(self, probe: str) -> m.Observed | None:
        report = self._reconciler.observed(probe)
        if report is None:
            return None
        if dropped := self._outbox.dropped.get(probe):
            report.counters.dropped += dropped
            report.dropped_by_reason[STAGE] = report.dropped_by_reason.get(STAGE, 0) + dropped
        if self._stopping:
            # Out because the agent stops, not because nobody wants it any more.
            report.removed = False
        elif report.removed:
            self._reconciler.forget(probe)
            self._outbox.forget(probe)
        return report

    async def _watch_drops(self) -> NoReturn:
        told: dict[str, int] = {}
        while True:
            await asyncio.sleep(1.0)
            now = dict(self._outbox.dropped)
            for probe in now:
                if now[probe] != told.get(probe):
                    self._report(probe)
            told = now

    def _own_pids(self) -> list[int]:
        tracer = self._keeper.client
        return self._self_pids if tracer is None else [*self._self_pids, tracer.ready.pid]

    async def _look_at_processes(self) -> None:
        found = await asyncio.to_thread(list_processes, self.host_id, self._own_pids())
        self._processes = {process.id: process for process in found}

    async def _watch_processes(self) -> NoReturn:
        while True:
            await self._look_at_processes()
            if self._told is not None and self._processes != self._told:
                self._link.post("processes", self._process_list)
            await asyncio.sleep(self._settings.process_interval_s)

    def _process_list(self) -> m.Processes | None:
        told, now = self._told, self._processes
        self._told = now
        if told is None:
            return m.Processes(full=True, upsert=list(now.values()))
        upsert = [process for key, process in now.items() if told.get(key) != process]
        removed = [key for key in told if key not in now]
        return m.Processes(upsert=upsert, removed=removed) if upsert or removed else None

    # --- what the service tells ---------------------------------------------------------------------------------------

    def hello(self) -> m.Hello:
        """The first frame of each connection."""
        if self._keeper.client is not None:
            self._facts = host_facts(self._settings, self._keeper.client)
        return m.Hello(instance_id=self.host_id, link_id=self._link_id, pid=os.getpid(), facts=self._facts)

    async def welcomed(self, welcome: m.Welcome) -> None:
        """A new connection: posts everything there is to know."""
        self._told = None
        if welcome.service_boot_id == self._facts.boot_id and welcome.service_pid not in self._self_pids:
            self._keeper.spare(welcome.service_pid)
            await self._look_at_processes()  # it is not eligible any more
        self._link.post("processes", self._process_list)
        for probe in self._reconciler.probes:
            self._report(probe)

    def desired(self, desired: m.Desired) -> None:
        """Takes the desired set, or a change of it."""
        for probe in desired.upsert:
            self._reconciler.upsert(probe)
        for name in desired.remove:
            self._reconciler.remove(name)
        if desired.full:
            self._reconciler.keep_only({probe.id for probe in desired.upsert})

    def _name(self, frames: list[StackFrame]) -> FrameNames:
        files = (Frame(StackFile(f.path, f.build_id, f.file), f.offset) for f in frames)
        found = self._names.many(files)
        return FrameNames(names=[list(named.names) for named in found], sources=[named.source for named in found])

    async def request(self, request: m.Request) -> dict[str, Any]:
        """Answers a question about this host.

        Raises:
            ProtocolError: the parameters do not fit the method.
            ResolveError: what they name is not there.
        """
        params = request.params
        try:
            if request.method == "resolve":
                spec = ProbeSpec.model_validate(params["spec"])
                return (await asyncio.to_thread(self._resolver.resolve_dry, spec)).model_dump(mode="json")
            if request.method == "symbols":
                limit = min(int(params.get("limit", 50)), _SYMBOLS_LIMIT)
                module, query = str(params.get("module", "")), str(params.get("q", ""))
                page = await asyncio.to_thread(self._resolver.search_symbols, module, query, limit)
                return page.model_dump(mode="json")
            if request.method == "symbolize":
                frames = Symbolize.model_validate(params).frames
                return (await asyncio.to_thread(self._name, frames)).model_dump(mode="json")
            if request.method == "coverage":
                return self._reconciler.coverage(str(params["probe"])).model_dump(mode="json")
            modules: list[Module] = await asyncio.to_thread(self._resolver.modules, int(params.get("pid", 0)))
            return {"modules": [module.model_dump(mode="json") for module in modules]}
        except (KeyError, TypeError, ValueError, ValidationError) as e:
            raise ProtocolError(f"malformed parameters of `{request.method}`: {e}") from e
