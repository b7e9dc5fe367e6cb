"""What ``trapline trace`` does: a tracer of its own, a reconciler over it, and a thread that writes the lines.

The event loop never waits for the terminal: it renews the tracer's lease, and a reader that stops reading (a pager, a
full pipe) must not end that. Batches wait for the writer in an outbox-like queue bounded in bytes; what does not fit is
dropped and counted, as everywhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from rich.live import Live
from rich.text import Text

from trapline.aggregates import Table, capacity_of
from trapline.cli.console import (
    ENDS,
    EXIT_ERROR,
    Budget,
    err,
    first_error,
    microseconds,
    note,
    out,
    print_table,
    progress,
    uncovered,
    unreturned,
)
from trapline.cli.folded import Folded
from trapline.cli.local import settings_from
from trapline.cli.rows import Lines, plain
from trapline.cli.tables import folded_lines, frame_of, lines
from trapline.errors import NotFound, SpecError, TraplineError
from trapline.expressions import is_stack
from trapline.model import AggregateTable, DesiredProbe, ProbeLimits, ProbeSpec, StackFrame, Target, TargetState
from trapline.protocol import aggregates
from trapline.protocol.hits import HitBatch, decode
from trapline.spec import parse_probe, require_supported
from trapline.state import state_dir
from trapline.tables import table_of
from trapline_agent.capture.redaction import redaction
from trapline_agent.config import AgentSettings
from trapline_agent.debuginfo.files import DebugFiles
from trapline_agent.keeper import TracerKeeper
from trapline_agent.policy import read_policy
from trapline_agent.reconcile import ProbeRun, Reconciler
from trapline_agent.resolve import Resolver
from trapline_agent.symbols.index import IndexCache
from trapline_agent.tracer import messages as t
from trapline_agent.tracer.client import Event
from trapline_agent.unwind.names import Names
from trapline_agent.unwind.tables import Tables

_WAITING_BYTES = 64 * 1024 * 1024
_STAGE = "terminal"
_MAX_KEYS = 10_000
_LIVE_S = 0.5
_LIVE_ROWS = 12


@dataclass
class Options:
    """What the command line asked for."""

    texts: Sequence[str]
    command: Sequence[str] = ()
    pid: int | None = None
    name: str = ""
    max_hits: int | None = None
    duration_s: float | None = None
    wait: bool = False
    overhead: Budget = None
    output: Path | None = None
    json: bool = False
    folded: bool = False


class Writer:
    """Writes batches as lines, in a thread of its own.

    Attributes:
        shown: hits written so far.
        dropped: hits that the reader was too slow for, by probe.
        ended: set when the reader has gone (a closed pipe), or ``limit`` hits are written.
    """

    def __init__(self, file: IO[bytes], names: Names, *, json: bool, limit: int | None, folded: bool = False) -> None:
        self._file = file
        self._lines = Lines(names, names.described)
        self._folded = Folded(names) if folded else None
        self._json = json
        self._limit = limit
        self._waiting: deque[bytes] = deque()
        self._bytes = 0
        self._more = threading.Condition()
        self._closing = False
        self._loop = asyncio.get_running_loop()
        self.shown = 0
        self.dropped: dict[str, int] = {}
        self.ended = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="writer", daemon=True)
        self._thread.start()

    def put(self, batch: bytes) -> None:
        """Takes an encoded batch; called on the event loop, never waits."""
        with self._more:
            if self._bytes + len(batch) > _WAITING_BYTES:
                header = decode(batch).header
                self.dropped[header.probe] = self.dropped.get(header.probe, 0) + header.count
                return
            self._waiting.append(batch)
            self._bytes += len(batch)
            self._more.notify()

    def _run(self) -> None:
        try:
            while (batch := self._next()) is not None:
                self._write(decode(batch))
                if not self._waiting:
                    self._file.flush()
                if self._limit is not None and self.shown >= self._limit:
                    break
            if self._folded is not None:
                self._folded.write(self._file)
            self._file.flush()
        except (BrokenPipeError, ValueError):
            self._give_up()  # the reader has enough
        except OSError as e:
            self._give_up()
            note(f"trapline: {e.strerror}: the hits cannot be written")
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(self.ended.set)

    def _give_up(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()  # what it holds still cannot be written either, and would be tried again at the end

    def _next(self) -> bytes | None:
        with self._more:
            while not self._waiting:
                if self._closing:
                    return None
                self._more.wait()
            batch = self._waiting.popleft()
            self._bytes -= len(batch)
            return batch

    def _write(self, batch: HitBatch) -> None:
        rows = batch.header.count
        if self._limit is not None:
            rows = min(rows, self._limit - self.shown)
        if rows > 0:
            if self._folded is not None:
                self._folded.add(batch, rows)
                self.shown += rows
                return
            text = self._lines.ndjson(batch, rows) if self._json else self._lines.text(batch, rows)
            self._file.write(text.encode())
            self.shown += rows

    async def close(self) -> None:
        """Writes what waits, and ends."""
        with self._more:
            self._closing = True
            self._more.notify()
        await asyncio.to_thread(self._thread.join)


@dataclass
class Traced:
    """One probe of the session."""

    run: ProbeRun
    table: Table | None = None
    """Of a probe with an aggregate."""
    lost: int = 0
    """Hits that are not in the table."""
    processes: set[tuple[int, int]] = field(default_factory=set)
    """(pid, start time) of every process that it was ever armed in."""


class Session:
    """One ``trapline trace``; ``run`` is its life."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._host = socket.gethostname()
        self._specs = [self._spec(text) for text in options.texts]
        self._keeper = TracerKeeper(host_id=self._host, budgets=_budgets(options.overhead))
        self._probes: dict[str, Traced] = {}
        self._symbols = IndexCache(directory=state_dir() / "symbols")
        host = settings_from(AgentSettings)
        self._policy = read_policy(host.policy)
        self._debug = DebugFiles(state_dir(), host.debuginfod_urls.split()).of
        self._names = Names(self._symbols, self._debug)
        self._over_budget: dict[tuple[str, int, int, int, int], str] = {}
        """The state of the targets that are over their budget."""
        self._reconciler: Reconciler
        self._writer: Writer
        self._command_pid = 0
        self._interrupts = 0
        self._began = False
        self._ending = asyncio.Event()
        self._changed = asyncio.Event()
        self.status = 0

    def _spec(self, text: str) -> ProbeSpec:
        """Raises SpecError for a text that is wrong, Unsupported for one that this release cannot do."""
        spec = parse_probe(text)
        require_supported(spec)
        of_stacks = [*(c.text for c in spec.captures), *(spec.aggregate.by if spec.aggregate is not None else ())]
        if self._options.folded and not any(is_stack(each) for each in of_stacks):
            add = "-> count() by (ustack())"
            raise SpecError("--folded counts stacks, and this probe captures none", text=text, hint=f"add `{add}`")
        for key, value in (("pid", self._options.pid), ("comm", self._options.name)):
            if value:
                if spec.where.get(key, str(value)) != str(value):
                    raise SpecError(f"the probe says {key}={spec.where[key]} and the command line {value}", text=text)
                spec.where[key] = str(value)
        return spec

    # --- events of the tracer -----------------------------------------------------------------------------------------

    def tracer_up(self, tracer: object) -> None:
        """The session has its tracer already, and it gets no other one: see ``tracer_lost``."""

    def tracer_lost(self, why: TraplineError) -> None:
        raise why

    def handle(self, event: Event) -> None:
        self._reconciler.handle(event)
        if isinstance(event, t.Exited) and event.pid == self._command_pid:
            self.status = event.status if event.status >= 0 else 128 - event.status
            self._ending.set()
        elif isinstance(event, t.Targets) and (traced := self._probes.get(event.probe)):
            traced.processes |= {(s.pid, s.start_time) for s in event.targets if s.state == "armed"}
            self._tell_of_budget(event)
        elif isinstance(event, t.Completed) and all(p.run.completed for p in self._probes.values()):
            self._ending.set()

    def _tell_of_budget(self, event: t.Targets) -> None:
        """Says once of each change that a probe is not counted all the time, or is again."""
        for target in event.targets:
            key = (event.probe, target.pid, target.start_time, target.site, target.addr)
            before = self._over_budget.pop(key, "")
            if target.state in ("throttled", "tripped"):
                self._over_budget[key] = target.state
                if before != target.state:
                    hint = "" if before else "; --overhead sets how much it may be"
                    note(f"{event.probe}: {target.state} in process {target.pid}: {target.message}{hint}")
            elif before and target.state == "armed":
                note(f"{event.probe}: every call in process {target.pid} is counted again")

    # --- the course of it ---------------------------------------------------------------------------------------------

    async def run(self) -> int:
        """Traces until the end; returns the exit status."""
        options = self._options
        loop = asyncio.get_running_loop()
        for number in ENDS:
            loop.add_signal_handler(number, self._interrupt, number)
        file = options.output.open("wb") if options.output else os.fdopen(os.dup(sys.stdout.fileno()), "wb")
        with file:
            self._writer = Writer(file, self._names, json=options.json, limit=options.max_hits, folded=options.folded)
            try:
                with progress("starting a tracer"):
                    tracer = await self._keeper.start()
                try:
                    resolver = Resolver(
                        self._host,
                        self._host,
                        [os.getpid()],
                        tracer.ready.pid,
                        symbols=self._symbols,
                        debug=self._debug,
                        redact=redaction(self._policy.redact),
                    )
                    await self._trace(resolver)
                finally:
                    await self._keeper.stop()
            finally:
                await self._writer.close()
                if self._began:
                    self._write_tables(file)
                    self._summary()
        return self.status

    def _take(self, frame: bytes) -> None:
        """Takes a hit batch, or what an aggregate has gained."""
        if not aggregates.is_delta(frame):
            self._writer.put(frame)
            return
        delta = aggregates.decode(frame)
        traced = self._probes.get(delta.probe)
        if traced is not None and traced.table is not None:
            delta.add_to(traced.table)
            traced.lost += sum(delta.drops.values())

    def _tables(self, top: int | None) -> list[AggregateTable]:
        tables = []
        for probe, traced in self._probes.items():
            aggregate = traced.run.desired.spec.aggregate
            if aggregate is not None and traced.table is not None:
                table = table_of(aggregate, traced.table, probe=probe, top=top)
                table.lost = traced.lost
                tables.append(table)
        return tables

    def _name(self, frame: StackFrame) -> Sequence[str]:
        return self._names(frame_of(frame))

    def _name_all(self, tables: Sequence[AggregateTable]) -> None:
        for table in tables:
            for frame in table.frames:
                self._name(frame)

    def _shown(self, tables: Sequence[AggregateTable]) -> str:
        """Returns tables as text. Naming what is in them may take seconds."""
        shown = []
        for table in tables:
            title = table.probe if table.aggregate.text in table.probe else f"{table.probe} -> {table.aggregate.text}"
            shown.append("\n".join([plain(title), *lines(table, self._name), ""]))
        return "\n".join(shown)

    def _write_tables(self, file: IO[bytes]) -> None:
        """Writes what the aggregates came to."""
        if self._options.json:
            text = "".join(table.model_dump_json() + "\n" for table in self._tables(None))
        elif self._options.folded:
            text = "".join(f"{line}\n" for table in self._tables(None) for line in folded_lines(table, self._name))
        else:
            text = self._shown(self._tables(None))
        with contextlib.suppress(BrokenPipeError, ValueError):  # the reader has enough
            file.write(text.encode())
            file.flush()

    async def _show_tables(self) -> None:
        """Shows on a terminal how the tables grow. Where nobody looks on it names the frames of stacks all the same: at the
        end their files may be gone."""
        unseen = self._options.json or self._options.output is not None or not out.is_terminal
        if not any(traced.table is not None for traced in self._probes.values()):
            return
        if unseen:
            while not self._options.json:
                await asyncio.to_thread(self._name_all, self._tables(None))
                await asyncio.sleep(_LIVE_S)
            return
        with Live(console=out, auto_refresh=False, transient=True) as live:
            while True:
                live.update(Text(await asyncio.to_thread(self._shown, self._tables(_LIVE_ROWS))), refresh=True)
                await asyncio.sleep(_LIVE_S)

    def _interrupt(self, number: int) -> None:
        self._interrupts += 1
        if self._command_pid and self._interrupts == 1 and self._keeper.client is not None:
            # As in a shell, it is the command that Ctrl-C is for; we end when it does.
            self._send(number)
        else:
            self._ending.set()

    def _send(self, number: int) -> None:
        client = self._keeper.client
        assert client is not None
        self._signalling = asyncio.get_running_loop().create_task(client.signal(self._command_pid, number))

    async def _trace(self, resolver: Resolver) -> None:
        tracer = self._keeper.client
        assert tracer is not None
        if not tracer.ready.available:
            raise TraplineError(f"the {tracer.ready.engine} engine does not work here: {tracer.ready.reason}")
        async with asyncio.TaskGroup() as tasks:
            self._reconciler = Reconciler(
                host_id=self._host,
                resolver=resolver,
                tasks=tasks,
                changed=lambda _: self._changed.set(),
                tables=_tables(),
            )
            self._reconciler.tracer_up(tracer)
            tasks.create_task(self._keeper.keep(self, self._take), name="tracer")
            try:
                if self._options.command:
                    self._command_pid = await tracer.launch(self._options.command)
                    for spec in self._specs:
                        spec.where.setdefault("tree", str(self._command_pid))
                await self._begin()
                if self._command_pid:
                    await tracer.release(self._command_pid)
                await self._until_the_end()
            finally:
                await self._reconciler.remove_all()
                await self._keeper.stop()

    async def _begin(self) -> None:
        with progress("resolving and arming"):
            for number, spec in enumerate(self._specs, 1):
                probe = spec.name or spec.text
                if probe in self._probes:
                    probe = f"{probe} ({number})"
                desired = DesiredProbe(id=probe, spec=spec, limits=ProbeLimits(max_hits=self._options.max_hits))
                table = None
                if (aggregate := spec.aggregate) is not None:
                    table = Table(_MAX_KEYS, capacity_of(aggregate.function, aggregate.parameters))
                self._probes[probe] = Traced(self._reconciler.upsert(desired), table)
            for traced in self._probes.values():
                await traced.run.settled.wait()
        for traced in self._probes.values():
            self._check(traced.run)
        self._began = True

    def _check(self, run: ProbeRun) -> None:
        """Says what a probe waits for. Raises where waiting is of no use."""
        spec = run.desired.spec
        error = run.error
        may_come = not self._options.pid or self._options.wait
        if error is not None and not (isinstance(error, NotFound) and error.reason == "NotMapped" and may_come):
            raise error
        for sentence in run.notes:
            note(f"{spec.text}: {sentence}")
        targets = list(run.targets.values())
        armed = len({target.pid for target in targets if target.state is TargetState.ARMED})
        refused = [target for target in targets if target.state is TargetState.REFUSED]
        if armed:
            note(f"{spec.text}: armed in {armed} {'process' if armed == 1 else 'processes'}{_but(refused)}")
        elif refused and not may_come:
            raise TraplineError(refused[0].message or refused[0].reason, reason=refused[0].reason)
        elif not may_come:
            raise NotFound(
                f"process {self._options.pid} does not map {spec.object}",
                hint="with --wait the probe is armed when it does",
            )
        elif not self._command_pid:
            note(f"waiting for a process that maps {spec.object}{_but(refused)}")

    async def _until_the_end(self) -> None:
        ends = [asyncio.ensure_future(self._ending.wait()), asyncio.ensure_future(self._writer.ended.wait())]
        showing = asyncio.ensure_future(self._show_tables())
        try:
            await asyncio.wait(ends, timeout=self._options.duration_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for end in (*ends, showing):
                end.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await showing

    def _summary(self) -> None:
        rows = []
        for probe, traced in self._probes.items():
            stats = traced.run.stats
            lost = sum(stats.drops.values()) if stats else 0
            rows.append(
                (
                    probe,
                    len(traced.processes),
                    stats.hits if stats else 0,
                    lost + self._writer.dropped.get(probe, 0),
                    microseconds(stats.overhead_ns if stats else None),
                )
            )
        note("")
        print_table(("PROBE", "PROCESSES", "HITS", "DROPPED", "OVERHEAD/HIT"), rows, console=err)
        for probe, traced in self._probes.items():
            stats = traced.run.stats
            if stats and (
                text := unreturned(stats.calls, stats.hits + stats.filtered + stats.limited, stats.unreturned)
            ):
                note(f"{probe}: of {stats.calls:,} calls, not seen to return: {text}")
            if stats and stats.filtered:
                note(f"{probe}: {stats.filtered:,} more did not match the condition")
            if traced.run.stats and (text := uncovered(traced.run.stats.uncovered_ms)):
                note(f"{probe}: there were more hits than these{text} (--overhead off counts all)")


def _tables() -> Tables:
    """Returns what makes unwind tables; they are kept where this user's agent keeps them."""
    return Tables(state_dir() / "unwind")


def _budgets(overhead: Budget) -> t.Budgets:
    """Returns the budgets of a session: the tracer is this user's alone, so what the option says holds for all of them."""
    usual = t.DEFAULT_BUDGETS
    if overhead is None:
        return usual
    if overhead == "off":
        return t.Budgets(probe=0, process=0, host=0)
    return t.Budgets(
        probe=overhead,
        process=max(overhead, usual.process),
        host=max(overhead, usual.host),
        burst_s=usual.burst_s,
    )


def _but(refused: Sequence[Target]) -> str:
    """Returns what was refused as the tail of a sentence."""
    reasons: dict[str, int] = {}
    for target in refused:
        reasons[target.reason or "refused"] = reasons.get(target.reason or "refused", 0) + 1
    return f" (not in {', '.join(f'{count}: {reason}' for reason, count in reasons.items())})" if reasons else ""


def run_session(options: Options) -> int:
    """Runs a session in this process; returns the exit status."""

    async def session() -> int:
        return await Session(options).run()

    try:
        return asyncio.run(session())
    except BaseExceptionGroup as group:
        raise first_error(group) from group
    except KeyboardInterrupt:
        return EXIT_ERROR
