"""The tracer's control thread: commands of the agent, the lease, hooks' news, launched commands, signals.

It never waits for the agent (``shipper`` sends), never evaluates a hit (the engine's threads do), and looks at no process
(``looks`` does): it changes the table in the order of what it is told, begins a round of looks, and answers when that is
over. So a process that is slow, or hangs, keeps neither the lease from ending nor other probes from coming and going. It
waits for the engine alone when everything is to be taken out, and then not for a process that hangs.
"""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import signal
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from trapline.aggregates import FUNCTIONS
from trapline.errors import EngineError, PermissionDenied, ProtocolError, TraplineError
from trapline.ids import new_id
from trapline.protocol.hits import VALUE_TYPES
from trapline.protocol.stacks import MAX_DEPTH
from trapline_agent.arch.x86_64 import REGISTERS
from trapline_agent.capture.compute import fits, wrong
from trapline_agent.engines.aggregate import AggregateStore
from trapline_agent.engines.base import ProcessId
from trapline_agent.engines.ptrace.engine import PtraceEngine
from trapline_agent.engines.ring import HitRing
from trapline_agent.kernel import procfs
from trapline_agent.plans import CONTEXT, LATENCY
from trapline_agent.tracer import messages as m
from trapline_agent.tracer.connection import Connection, listen
from trapline_agent.tracer.guard import Guard
from trapline_agent.tracer.hooks import ExecHook, MappingHook
from trapline_agent.tracer.launch import Command, start
from trapline_agent.tracer.looks import Looks
from trapline_agent.tracer.mappers import Held, MapperHook
from trapline_agent.tracer.safeguard import Safeguard
from trapline_agent.tracer.shipper import Shipper
from trapline_agent.tracer.table import Consumer, Table
from trapline_agent.unwind.walk import NewFile

log = logging.getLogger(__name__)

_TICK_S = 1.0
_RECONCILE_S = 30.0
_RECONCILE_UNHOOKED_S = 2.0
"""How often /proc is looked through when the perf stream does not work here."""
_LOADER_GRACE_S = 0.05
"""How long a loader may take from a mapping to its report."""
_FIRST_AGENT_S = 60.0
_END_COMMAND_S = 2.0
_SETTLE_S = 0.2
"""How long the last words to an agent that hangs may take; nothing is armed then."""
_LEASES_S = (0.05, 86_400.0)
_MAX_FETCH_BYTES = 4096
_MAX_KEYS = 65_536
_MAX_CANDIDATES = 16
_UCRED = struct.Struct("=iII")


class Tracer:
    """One tracer process. ``run`` on the main thread; it returns when it is to exit and nothing is armed any more."""

    def __init__(
        self,
        path: Path,
        *,
        journal: Path | None = None,
        stay: bool = False,
        before_exec: Callable[[], None] = lambda: None,
    ) -> None:
        """
        Args:
            path: where to listen; a stale socket there is replaced.
            journal: what is armed; None: beside the socket. What an earlier tracer left is taken out by it.
            stay: go on without an agent after the lease ended (nothing is armed then), instead of exiting.
            before_exec: called in the child that becomes a launched command.

        Raises:
            OSError: the socket cannot be made there, or a tracer listens there already (EADDRINUSE).
        """
        self._path = path
        self._server = listen(path)
        self._stay = stay
        self._before_exec = before_exec
        self._source = new_id("trc")
        self._host = ""
        self._news: deque[Callable[[], None]] = deque()
        self._wake_r, self._wake_w = os.pipe()
        os.set_blocking(self._wake_w, False)
        self._pending: set[object] = set()
        """What is among the news already and needs not be there twice."""
        self._table = Table(lambda: self._post_once("targets", self._send_targets))
        self._safeguard = Safeguard(journal or path.with_suffix(".journal"))
        self._engine = PtraceEngine(self._table, self._safeguard.journal)
        self._table.on_exit = self._process_ended
        self._table.stacks.want = self._want_table
        self._guard = Guard(self._table, self._look_at)
        self._capabilities = self._engine.capabilities()
        self._looks = Looks(self._engine)
        self._looking: set[object] = set()
        """Looks that go on and need not be begun a second time."""
        self._leaving: list[Consumer] = []
        """Withdrawn, but their bytes may still be there, and hit."""
        self._draining: deque[Consumer] = deque()
        self._rings_lock = threading.Lock()
        self._shipper = Shipper(self._drain, on_failure=lambda: self._post(self._stop))
        self._hook = MappingHook(
            is_probed=lambda file: file in self._table.files(),
            on_mapping=lambda pid: self._post_once(pid, lambda: self._mapped(pid)),
            on_unknown=lambda mapped: self._shipper.send(mapped),
            on_lost=lambda: self._post_once("lost", self._reconcile_all),
            on_failure=lambda: self._post(self._stop),
        )
        self._hooked = self._hook.start()
        self._execs = ExecHook(
            on_exec=self._exec_told,
            on_lost=lambda: self._post_once("lost", self._reconcile_all),
        )
        # Two streams would tell of the same thing; the other one tells of more.
        self._exec_state = "stands by: perf-mmap tells of more" if self._execs.available and self._hooked else ""
        if self._hooked or not self._execs.start():
            self._execs.close()
        self._mappers = MapperHook(
            is_meant=self._table.is_meant,
            hold=self._engine.await_mapper,
            on_late=lambda held: self._post(lambda: self._late(held)),
            on_lost=lambda: self._post_once("mappers", self._mappers_lost),
        )
        self._spared: frozenset[int] = frozenset()
        self._commands: dict[int, Command] = {}
        self._ends: dict[int, int] = {}
        self._stats: dict[str, m.Stats] = {}
        self._agent: Connection | None = None
        self._candidates: list[Connection] = []
        """Connected, but not yet heard of: the agent is who says ``Hello``, the last one that did."""
        self._lease_s = 30.0
        self._lease_end = time.monotonic() + _FIRST_AGENT_S
        self._lease_running = True
        self._done = False
        self._next_tick = time.monotonic() + _TICK_S
        self._next_reconcile = time.monotonic() + _RECONCILE_S
        self._mapped_due: dict[int, float] = {}
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._server, selectors.EVENT_READ, self._accept)
        self._selector.register(self._wake_r, selectors.EVENT_READ, self._woken)

    # --- the thread --------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Serves until it is told to shut down, by message or by SIGTERM, SIGINT or SIGHUP."""
        signal.set_wakeup_fd(self._wake_w, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda signum, frame: self._post(self._stop))
        self._safely(self._start_guardian)
        log.info("tracer ready on %s (%s)", self._path, self._source)
        try:
            while not self._done:
                due = min((self._next_tick, self._lease_end, self._guard.due, *self._mapped_due.values()))
                timeout = 0.0 if self._news else max(0.0, due - time.monotonic())
                for key, _ in self._selector.select(timeout):
                    self._safely(key.data)
                # No more than there are now: news that never cease must not starve the agent and its lease.
                for _ in range(len(self._news)):
                    self._safely(self._news.popleft())
                now = time.monotonic()
                for pid in [p for p, at in self._mapped_due.items() if now >= at]:
                    del self._mapped_due[pid]
                    self._safely(self._reconcile_pid, pid, "mmap:perf-mmap")
                if now >= self._guard.due:
                    self._safely(self._guard.look)
                if now >= self._next_tick:
                    self._next_tick = now + _TICK_S
                    self._safely(self._tick, now)
                if self._lease_running and now >= self._lease_end:
                    self._safely(self._end_lease)
        finally:
            self._safely(self._take_all_out)
            self._safely(self._end_commands)
            self._safely(self._shipper.close)
            self._safely(self._hook.close)
            self._safely(self._execs.close)
            self._safely(self._mappers.close)
            self._safely(self._path.unlink, True)
            self._safely(self._safeguard.close)

    def _safely(self, work: Callable[..., object], *args: object) -> None:
        """Does what nobody waits for; a failure must not end the process that holds the traps, nor keep it from what is to
        be done after this."""
        try:
            work(*args)
        except Exception:
            log.exception("the tracer failed; it goes on")

    def _post(self, work: Callable[[], None]) -> None:
        self._news.append(work)
        with contextlib.suppress(BlockingIOError):
            os.write(self._wake_w, b"w")

    def _post_once(self, key: object, work: Callable[[], None]) -> None:
        """Posts, unless the same is waiting to be done: then that will see what is new."""
        if key in self._pending:
            return
        self._pending.add(key)

        def begin() -> None:
            self._pending.discard(key)
            work()

        self._post(begin)

    def _woken(self) -> None:
        os.read(self._wake_r, 4096)

    def _stop(self) -> None:
        self._done = True

    # --- the agent ---------------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        connection, _ = self._server.accept()
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        _, uid, _ = _UCRED.unpack(credentials)
        if uid not in (0, os.geteuid()):
            connection.close()
            return
        candidate = Connection(connection)
        self._candidates.append(candidate)
        self._selector.register(connection, selectors.EVENT_READ, lambda: self._receive(candidate))
        if len(self._candidates) > _MAX_CANDIDATES:
            self._drop(self._candidates[0])

    def _drop(self, connection: Connection) -> None:
        """One is gone. If it was the agent, what it registered stays until the lease ends."""
        if connection is self._agent:
            self._agent = None
            self._shipper.disconnect()
        elif connection in self._candidates:
            self._candidates.remove(connection)
        else:
            return
        self._selector.unregister(connection.socket)
        connection.close()

    def _receive(self, connection: Connection) -> None:
        try:
            for message in connection.receive():
                if isinstance(message, m.Hello):
                    _check_hello(message)
                    self._adopt(connection)
                elif connection is not self._agent:
                    raise ProtocolError(f"the first message is no Hello but {type(message).__name__}")
                self._serve(message)
                if connection is not self._agent:
                    return
        except (EOFError, ConnectionError):
            self._drop(connection)
        except ProtocolError as e:
            log.error("a connection is dropped: %s", e)
            self._drop(connection)
        except Exception:
            log.exception("a connection is dropped, since serving it failed")
            self._drop(connection)

    def _adopt(self, connection: Connection) -> None:
        """A valid ``Hello`` makes a candidate the agent, in the place of another."""
        if connection is not self._agent:
            if self._agent is not None:
                self._drop(self._agent)
            self._candidates.remove(connection)
            self._agent = connection

    def _serve(self, message: m.ToTracer) -> None:
        agent = self._agent
        done = m.Done(id=getattr(message, "id", 0))
        try:
            match message:
                case m.Hello():
                    self._hello(message)
                case m.Register():
                    self._register(message, lambda error: self._answer(agent, message.id, error))
                    done.id = 0
                case m.Unregister(probe=probe):
                    self._unregister(probe, lambda: self._answer(agent, message.id, None))
                    done.id = 0
                case m.Watch(names=names):
                    self._hook.watch(names)
                case m.Spare(self_pids=pids):
                    self._spare(pids)
                    self._reconcile_all()
                case m.FrameTable(file=file, build_id=build_id, table=table):
                    self._table.stacks.add(file, build_id, table)
                case m.Loaders(plans=plans):
                    self._table.set_loaders(plans)
                    if self._table.consumers:
                        self._look_once("loaders", self._everyone)
                    self._set_marks()
                case m.Launch():
                    done.pid = self._launch(message)
                case m.Release(pid=pid):
                    self._engine.release(pid)
                    self._commands[pid].held = False
                case m.Signal(pid=pid, signal=number):
                    if pid in self._commands and self._commands[pid].status is None:
                        _kill(self._commands[pid], number)
                case m.Shutdown():
                    self._take_all_out()
                    self._end_commands()
                    self._done = True
                case m.Renew():
                    pass
        except Exception as e:  # noqa: BLE001 - it is told to the agent
            done.error = _to_wire(e)
        self._lease_end = time.monotonic() + self._lease_s
        self._lease_running = True
        if done.id:
            self._shipper.send(done)

    def _answer(self, agent: Connection | None, request: int, error: Exception | None) -> None:
        """Answers a request when its looks are over; one of an agent that has gone since has no answer."""
        if agent is self._agent and request:
            self._shipper.send(m.Done(id=request, error=None if error is None else _to_wire(error)))

    def _hello(self, hello: m.Hello) -> None:
        self._host = hello.host
        self._guard.budgets = hello.budgets
        self._lease_s = hello.lease_s
        self._spare((hello.agent_pid, *hello.self_pids))
        assert self._agent is not None
        ready = m.Ready(
            protocol=m.PROTOCOL,
            pid=os.getpid(),
            source=self._source,
            engine=self._capabilities.name,
            available=self._capabilities.available,
            reason=self._capabilities.reason,
            hooks=[
                ("fork-exec", self._capabilities.available, ""),
                ("loader", self._capabilities.available, ""),
                (self._mappers.name, self._mappers.available, self._mappers.reason),
                (self._hook.name, self._hooked, self._hook.reason),
                (self._execs.name, self._execs.available, self._execs.reason or self._exec_state),
                ("reconcile", True, ""),
            ],
            probes=[c.probe for c in self._table.consumers],
        )
        self._shipper.connect(self._agent.socket, ready)
        self._table.stacks.ask_again()
        self._stats.clear()

    def _spare(self, pids: Iterable[int]) -> None:
        """Sets Trapline's own processes besides this one, the answerer and the guardian."""
        self._spared = frozenset(pids)
        own = {os.getpid(), self._mappers.pid, self._safeguard.pid, *self._spared} - {0}
        self._table.self_pids = frozenset(own)
        self._mappers.spare(self._table.self_pids)

    # --- the guardian ------------------------------------------------------------------------------------------------

    def _start_guardian(self) -> None:
        """Starts one, in the place of one that ended. Failing that it is tried again at each tick."""
        try:
            self._safeguard.start()
        finally:
            self._spare(self._spared)
        self._selector.register(self._safeguard.descriptor(), selectors.EVENT_READ, self._guardian_ended)
        if self._table.consumers:
            self._reconcile_all()  # it may have been taken for a target before it was known

    def _guardian_ended(self) -> None:
        with contextlib.suppress(KeyError):
            self._selector.unregister(self._safeguard.descriptor())
        if self._safeguard.ended():
            self._start_guardian()

    # --- probes ------------------------------------------------------------------------------------------------------

    def _register(self, message: m.Register, done: Callable[[Exception | None], None]) -> None:
        _check_register(message)
        if not self._capabilities.available:
            raise PermissionDenied(
                self._capabilities.reason, hint="run the tracer as root or with CAP_SYS_PTRACE", reason="NoPtrace"
            )

        def ring() -> HitRing:
            def complete() -> None:
                self._post(lambda: self._complete(message.probe, made))

            made: HitRing
            data, limit, returns = self._shipper.data, message.max_hits, message.returns
            if message.aggregate is None:
                made = HitRing(
                    message.fetches,
                    max_hits=limit,
                    returns=returns,
                    stacks=self._table.stacks,
                    floats=self._engine.floats,
                    on_data=data,
                    on_limit=complete,
                )
            else:
                made = AggregateStore(
                    message.aggregate,
                    message.fetches,
                    self._engine.comms,
                    max_hits=limit,
                    returns=returns,
                    stacks=self._table.stacks,
                    floats=self._engine.floats,
                    on_data=data,
                    on_limit=complete,
                )
            return made

        known = self._table.consumer(message.probe)
        before = None if known is None else (known.register, known.plans)
        # Publish, then look: a mapping that appears meanwhile is found by a hook or by the look (semantics R2).
        consumer = self._table.publish(message, ring)
        self._set_marks()

        def looked(error: Exception | None) -> None:
            if error is None:
                self._set_marks()  # also of files that only those who map them lead to
                # Before ``Done``: whoever waits for it must not take a probe that is armed for one without targets.
                self._send_targets()
                self._next_reconcile = min(self._next_reconcile, time.monotonic() + self._reconcile_every())
                done(None)
            elif before is not None:
                # Its processes are looked at once more, for what is wanted without the new sites (semantics R5).
                self._table.retract(message, *before)
                followed = self._engine.processes
                self._look(lambda: self._table.concerned(consumer, followed()), "reconcile", lambda _: done(error))
            elif self._table.consumer(message.probe) is not consumer or consumer.register is not message:
                done(error)  # it was taken out, or another registration came, which has a look of its own
            else:
                # Out by the way that any probe goes out, which lists the processes again (semantics R5).
                self._unregister(message.probe, lambda: done(error))

        self._look(lambda: self._table.candidates(consumer), "scan", looked)

    def _unregister(self, probe: str, done: Callable[[], None] = lambda: None) -> None:
        self._send_targets()  # what the table knows of it goes with it
        consumer = self._table.withdraw(probe)
        if consumer is None:
            done()
            return
        self._set_marks()
        with self._rings_lock:
            self._leaving.append(consumer)

        def looked(error: Exception | None) -> None:
            # One process that failed must not keep the others armed; it is looked at again by and by.
            self._part(consumer)
            done()

        self._look(lambda: self._table.concerned(consumer, self._engine.processes()), "reconcile", looked)

    def _part(self, consumer: Consumer) -> None:
        """The last of a consumer whose bytes are out."""
        with self._rings_lock:
            if consumer not in self._leaving:
                return  # everything was taken out meanwhile
            self._leaving.remove(consumer)
            self._draining.append(consumer)
        consumer.close()
        self._shipper.send(self._stats_of(consumer))
        self._stats.pop(consumer.probe, None)
        self._shipper.data()

    def _complete(self, probe: str, ring: HitRing) -> None:
        """A ring is full; its probe may have been taken out since, and registered again."""
        consumer = self._table.consumer(probe)
        if consumer is not None and consumer.ring is ring:
            self._unregister(probe, lambda: self._shipper.send(m.Completed(probe=probe)))

    def _take_all_out(self) -> None:
        """Leaves nothing of ours in any process. Looks that go on find nothing wanted; none of them is waited for."""
        for consumer in self._table.consumers:
            self._table.withdraw(consumer.probe)
            with self._rings_lock:
                self._leaving.append(consumer)
        for command in self._commands.values():
            if command.held and command.status is None:
                self._safely(_kill, command)
        self._safely(self._engine.close)
        for consumer in list(self._leaving):
            self._safely(self._part, consumer)

    def _look(
        self,
        find: Callable[[], Iterable[ProcessId]],
        cause: str,
        done: Callable[[Exception | None], None] = lambda error: None,
    ) -> None:
        """Begins a round of looks; ``done`` is called on this thread."""
        self._looks.begin(find, cause, lambda error: self._post(lambda: done(error)))

    def _look_once(self, key: object, find: Callable[[], Iterable[ProcessId]], cause: str = "reconcile") -> None:
        """Begins a round that nobody waits for, unless one of this key goes on."""
        if key not in self._looking:
            self._looking.add(key)
            self._look(find, cause, lambda error: self._looked(key, error))

    def _look_at(self, process: ProcessId, done: Callable[[], None]) -> None:
        self._look(lambda: [process], "reconcile", lambda error: done())

    def _looked(self, key: object, error: Exception | None) -> None:
        self._looking.discard(key)
        if error is not None:
            log.error("a look for %s failed; it is repeated by and by", key, exc_info=error)

    def _set_marks(self) -> None:
        """Has the mappers of probed files held, of those alone. What the table wants is published by then: who is held
        finds it, and who is not has mapped the file before, and is found by the look that follows."""
        before = self._mappers.pid
        self._safely(self._mappers.sync, self._table.descriptors(), self._table.loaders())
        self._table.unheld = self._mappers.refused
        if self._mappers.pid != before:
            self._spare(self._spared)

    def _late(self, held: Held) -> None:
        """A mapper went on before it was followed."""
        cause = f"{held.event}:fanotify-late"
        self._table.missed(held.pid, held.file, cause)
        self._reconcile_pid(held.pid, cause)

    def _mappers_lost(self) -> None:
        """The answerer has ended, or let mappers go on untold."""
        if not self._done:
            self._set_marks()
            self._reconcile_all()

    def _mapped(self, pid: int) -> None:
        """News of the perf stream. In a process whose loader reports to us it is left to that report, which comes before the
        code can run; what was mapped without the loader is looked at after a while."""
        if self._engine.is_hooked(pid):
            self._mapped_due.setdefault(pid, time.monotonic() + _LOADER_GRACE_S)
        else:
            self._reconcile_pid(pid, "mmap:perf-mmap")

    def _exec_told(self, pid: int) -> None:
        """News of the connector, on its thread. A process that is followed has told of it itself, and is as it should be."""
        if self._table.files():
            self._post_once((pid, "exec"), lambda: self._reconcile_pid(pid, "exec:proc-connector"))

    def _reconcile_pid(self, pid: int, cause: str) -> None:
        with contextlib.suppress(OSError):
            identity = ProcessId(pid, procfs.start_time(pid))
            self._look(lambda: [identity], cause)

    def _reconcile_all(self) -> None:
        self._look(self._everyone, "reconcile")

    def _everyone(self) -> set[ProcessId]:
        return self._table.candidates() | set(self._engine.processes())

    def _reconcile_every(self) -> float:
        return _RECONCILE_S if self._hooked else _RECONCILE_UNHOOKED_S

    # --- hits and numbers --------------------------------------------------------------------------------------------

    def _drain(self) -> list[tuple[HitRing, int, bytes]]:
        """On the shipper's thread."""
        with self._rings_lock:
            # A probe that was taken out and registered again: first what it had before.
            consumers = [*self._draining, *self._leaving, *self._table.consumers]
            parted = set(self._draining)
            self._draining.clear()
        batches = [
            (consumer.ring, count, batch)
            for consumer in consumers
            for count, batch in consumer.ring.drain(
                host=self._host,
                probe=consumer.probe,
                source=consumer.source,
                generation=consumer.register.generation,
                sites=consumer.register.sites,
                comms=self._engine.comms,
                last=consumer in parted,
            )
        ]
        self._shipper.again_at = min((due for c in consumers if (due := c.ring.due)), default=0.0)
        return batches

    def _want_table(self, new: NewFile) -> None:
        """On a tracer thread: code was met whose file's unwind table is not there."""
        self._shipper.send(m.FrameFile(file=new.file, path=new.path, pid=new.pid, start=new.start, end=new.end))

    def _stats_of(self, consumer: Consumer) -> m.Stats:
        ring = consumer.ring
        return m.Stats(
            probe=consumer.probe,
            hits=ring.hits,
            filtered=ring.filtered,
            limited=ring.limited,
            uncovered_ms=self._table.uncovered_ms(consumer),
            drops=dict(ring.drops),
            calls=ring.calls,
            unreturned=dict(ring.unreturned),
            overhead_ns=ring.median_overhead_ns(),
        )

    def _send_targets(self) -> None:
        for probe, targets in self._table.take_changes():
            self._shipper.send(m.Targets(probe=probe, targets=targets))
        for probe, entries in self._table.take_log():
            self._shipper.send(m.Covered(probe=probe, entries=entries))

    def _tick(self, now: float) -> None:
        if self._safeguard.ended():
            self._safely(self._start_guardian)
        if retry := self._engine.tick():
            self._look(lambda: retry, "reconcile")
        self._table.measure()
        for consumer in self._table.consumers:
            stats = self._stats_of(consumer)
            if self._stats.get(consumer.probe) != stats:
                self._stats[consumer.probe] = stats
                self._shipper.send(stats)
        if now >= self._next_reconcile:
            self._next_reconcile = now + self._reconcile_every()
            if self._table.consumers or self._engine.processes():
                self._look_once("all processes", self._everyone_living)

    def _everyone_living(self) -> set[ProcessId]:
        self._table.mark_ended()
        return self._everyone()

    def _end_lease(self) -> None:
        self._lease_running = False
        self._lease_end = float("inf")
        if self._table.consumers:
            log.warning("the agent has not been heard of for %.3g s: everything is taken out", self._lease_s)
        self._take_all_out()
        self._set_marks()
        self._hook.watch([])
        if self._agent is not None:
            # It hangs. It is told, in case it wakes up, and is treated as one that is gone: it has to connect again.
            self._shipper.send(m.LeaseEnded())
            self._shipper.settle(_SETTLE_S)
            self._drop(self._agent)
        self._end_alone()

    def _end_alone(self) -> None:
        """Ends a tracer that nobody has a use for. Commands that were launched go on; as our children they would end with
        us."""
        if not self._lease_running and self._agent is None and not self._stay:
            self._done = not any(c.status is None for c in self._commands.values())

    # --- launched commands -------------------------------------------------------------------------------------------

    def _launch(self, message: m.Launch) -> int:
        # Until it is held nobody else may follow it, who looks at processes beside us.
        with self._engine.attaching.paused():
            command = start(message, self._engine.hold, self._before_exec)
        self._commands[command.pid] = command
        self._selector.register(command.pidfd, selectors.EVENT_READ, lambda: self._command_changed(command.pid))
        return command.pid

    def _process_ended(self, identity: ProcessId, status: int | None) -> None:
        """On an engine's thread, which reaps what it follows, our own children too."""
        if status is not None:
            self._ends[identity.pid] = status
        self._post(lambda: self._command_changed(identity.pid))

    def _command_changed(self, pid: int) -> None:
        command = self._commands.get(pid)
        if command is None or command.status is not None:
            self._ends.pop(pid, None)
            return
        if pid not in self._ends:
            if any(p.pid == pid for p in self._engine.processes()):
                # Its tracer thread reaps it and calls us again. It must not be reaped from here: then that thread would
                # never learn of its end.
                with contextlib.suppress(KeyError):
                    self._selector.unregister(command.pidfd)
                return
            try:
                reaped, status = os.waitpid(pid, os.WNOHANG)
            except ChildProcessError:
                return
            if not reaped:
                with contextlib.suppress(KeyError):
                    self._selector.register(command.pidfd, selectors.EVENT_READ, lambda: self._command_changed(pid))
                return
            self._ends[pid] = status
        with contextlib.suppress(KeyError):
            self._selector.unregister(command.pidfd)
        os.close(command.pidfd)
        command.status = os.waitstatus_to_exitcode(self._ends.pop(pid))
        self._shipper.send(m.Exited(pid=pid, status=command.status))
        self._end_alone()

    def _end_commands(self) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            running = [c for c in self._commands.values() if c.status is None]
            for command in running:
                self._safely(_kill, command, number)
            deadline = time.monotonic() + _END_COMMAND_S
            while running and time.monotonic() < deadline:
                with selectors.DefaultSelector() as waiting:
                    for command in running:
                        waiting.register(command.pidfd, selectors.EVENT_READ)
                    waiting.select(max(0.0, deadline - time.monotonic()))
                while self._news:
                    self._safely(self._news.popleft())
                for command in running:
                    self._command_changed(command.pid)
                running = [c for c in running if c.status is None]


def _to_wire(error: Exception) -> dict[str, Any]:
    if isinstance(error, TraplineError):
        return error.to_wire()
    log.error("serving a request failed", exc_info=error)
    return EngineError(f"the tracer failed: {error}", hint="its log has the details").to_wire()


def _check_hello(hello: m.Hello) -> None:
    shortest, longest = _LEASES_S
    if not shortest <= hello.lease_s <= longest:  # nor is NaN
        raise ProtocolError(f"a lease of {hello.lease_s} s: it is to be {shortest} to {longest:.0f} s")


def _check_register(message: m.Register) -> None:
    """Raises EngineError where an engine, or the shipper, would stumble over a plan later."""
    for plan in message.plans:
        if not 0 <= plan.site < len(message.sites):
            raise EngineError(f"probe {message.probe} has {len(message.sites)} sites, a plan is for number {plan.site}")
    if (aggregate := message.aggregate) is not None:
        if not 1 <= aggregate.max_keys <= _MAX_KEYS:
            raise EngineError(f"probe {message.probe}: an aggregate of {aggregate.max_keys} rows")
        if aggregate.function not in FUNCTIONS or len(aggregate.parameters) != FUNCTIONS[aggregate.function]:
            raise EngineError(f"probe {message.probe}: no such aggregate: {aggregate.function}{aggregate.parameters}")
        if len(message.fetches) != aggregate.by + (aggregate.function != "count"):
            raise EngineError(f"probe {message.probe}: {aggregate.function} of nothing, or of too much")
        if any(fetch.column == "stack" for fetch in message.fetches[aggregate.by :]):
            raise EngineError(f"probe {message.probe}: {aggregate.function} of a stack")
    plain = all(fetch.register for fetch in message.fetches)
    for plan in message.plans:
        if not plain and (plan.program is None or len(plan.program.values) != len(message.fetches)):
            raise EngineError(f"probe {message.probe} has no program for {message.sites[plan.site]}")
        if plan.program is not None:
            conditions = () if plan.program.condition is None else (plan.program.condition,)
            if not fits(*plan.program.values, *conditions):
                raise EngineError(f"probe {message.probe} computes too much at {message.sites[plan.site]}")
            for value in (*plan.program.values, *conditions):
                if why := wrong(value):
                    raise EngineError(f"probe {message.probe} cannot be computed at {message.sites[plan.site]}: {why}")
    for fetch in message.fetches:
        if not 0 <= fetch.stack <= MAX_DEPTH or not 0 <= fetch.skip <= MAX_DEPTH or (fetch.stack and fetch.entry):
            raise EngineError(f"capture {fetch.name} of probe {message.probe}: {fetch.stack} frames of a stack")
        if fetch.column not in VALUE_TYPES:
            raise EngineError(f"capture {fetch.name} of probe {message.probe}: no type `{fetch.column}`")
        if not fetch.register and not plain:
            continue
        if fetch.register == LATENCY and message.returns and not fetch.string and not fetch.entry:
            continue
        if message.aggregate is not None and fetch.register in CONTEXT and not fetch.entry:
            continue
        if fetch.register not in REGISTERS:
            raise EngineError(f"capture {fetch.name} of probe {message.probe}: no register `{fetch.register}`")
        if not 1 <= fetch.max_bytes <= _MAX_FETCH_BYTES:
            raise EngineError(
                f"capture {fetch.name} of probe {message.probe}: {fetch.max_bytes} bytes, not 1 to {_MAX_FETCH_BYTES}"
            )


def _kill(command: Command, number: int = signal.SIGKILL) -> None:
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(command.pidfd, number)
