"""The tracer's control thread: commands of the agent, the lease, hooks' news, launched commands, signals.

It never waits for the agent (``shipper`` sends) and never evaluates a hit (the engine's threads do). It may wait for the
engine, whose work is bounded.
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
from collections.abc import Callable
from pathlib import Path

from trapline.errors import EngineError, PermissionDenied, ProtocolError, TraplineError
from trapline.ids import new_id
from trapline_agent.engines.base import ProcessId
from trapline_agent.engines.ptrace.engine import PtraceEngine
from trapline_agent.engines.ring import HitRing
from trapline_agent.kernel import procfs
from trapline_agent.tracer import messages as m
from trapline_agent.tracer.hooks import MappingHook
from trapline_agent.tracer.launch import Command, start
from trapline_agent.tracer.scan import scan
from trapline_agent.tracer.shipper import Shipper
from trapline_agent.tracer.table import ASYNC, Consumer, Table

log = logging.getLogger(__name__)

_TICK_S = 1.0
_RECONCILE_S = 30.0
_RECONCILE_UNHOOKED_S = 2.0
"""How often /proc is looked through when the perf stream does not work here."""
_LOADER_GRACE_S = 0.05
"""How long a loader may take from a mapping to its report."""
_FIRST_AGENT_S = 60.0
_END_COMMAND_S = 2.0
_UCRED = struct.Struct("=iII")


class Tracer:
    """One tracer process. ``run`` on the main thread; it returns when it is to exit and nothing is armed any more."""

    def __init__(self, path: Path, *, stay: bool = False) -> None:
        """
        Args:
            path: where to listen; a stale socket there is replaced.
            stay: go on without an agent after the lease ended (nothing is armed then), instead of exiting.

        Raises:
            OSError: the socket cannot be made there, or a tracer listens there already (EADDRINUSE).
        """
        self._path = path
        self._stay = stay
        self._source = new_id("trc")
        self._host = ""
        self._news: deque[Callable[[], None]] = deque()
        self._wake_r, self._wake_w = os.pipe()
        os.set_blocking(self._wake_w, False)
        self._table = Table(self._targets_changed)
        self._engine = PtraceEngine(self._table)
        self._table.on_exit = self._process_ended
        self._capabilities = self._engine.capabilities()
        self._draining: deque[Consumer] = deque()
        self._rings_lock = threading.Lock()
        self._shipper = Shipper(self._drain)
        self._hook = MappingHook(
            is_probed=lambda file: file in self._table.files(),
            on_mapping=lambda pid: self._post(lambda: self._mapped(pid)),
            on_unknown=lambda mapped: self._shipper.send(mapped),
            on_lost=lambda: self._post(self._reconcile_all),
        )
        self._hooked = self._hook.start()
        self._commands: dict[int, Command] = {}
        self._ends: dict[int, int] = {}
        self._stats: dict[str, m.Stats] = {}
        self._connection: socket.socket | None = None
        self._received = bytearray()
        self._lease_s = 30.0
        self._lease_end = time.monotonic() + _FIRST_AGENT_S
        self._lease_running = True
        self._done = False
        self._next_tick = time.monotonic() + _TICK_S
        self._next_reconcile = time.monotonic() + _RECONCILE_S
        self._mapped_due: dict[int, float] = {}
        self._selector = selectors.DefaultSelector()
        self._server = _listen(path)
        self._selector.register(self._server, selectors.EVENT_READ, self._accept)
        self._selector.register(self._wake_r, selectors.EVENT_READ, self._woken)

    # --- the thread --------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Serves until it is told to shut down, by message or by SIGTERM, SIGINT or SIGHUP."""
        signal.set_wakeup_fd(self._wake_w, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda signum, frame: self._post(self._stop))
        log.info("tracer ready on %s (%s)", self._path, self._source)
        try:
            while not self._done:
                due = min((self._next_tick, self._lease_end, *self._mapped_due.values()))
                timeout = max(0.0, due - time.monotonic())
                for key, _ in self._selector.select(timeout):
                    key.data()
                while self._news:
                    self._safely(self._news.popleft())
                now = time.monotonic()
                for pid in [p for p, at in self._mapped_due.items() if now >= at]:
                    del self._mapped_due[pid]
                    self._safely(lambda pid=pid: self._reconcile_pid(pid, "mmap" + ASYNC))  # type: ignore[misc]
                if now >= self._next_tick:
                    self._next_tick = now + _TICK_S
                    self._safely(lambda now=now: self._tick(now))  # type: ignore[misc]
                if self._lease_running and now >= self._lease_end:
                    self._end_lease()
        finally:
            self._take_all_out()
            self._end_commands()
            self._shipper.close()
            self._hook.close()
            self._path.unlink(missing_ok=True)

    def _safely(self, work: Callable[[], None]) -> None:
        """Does what nobody waits for; a failure must not end the process that holds the traps."""
        try:
            work()
        except Exception:
            log.exception("the tracer failed; it goes on")

    def _post(self, work: Callable[[], None]) -> None:
        self._news.append(work)
        with contextlib.suppress(BlockingIOError):
            os.write(self._wake_w, b"w")

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
        self._drop_connection()
        self._connection = connection
        self._received.clear()
        self._selector.register(connection, selectors.EVENT_READ, self._receive)

    def _drop_connection(self) -> None:
        """The agent is gone, or another takes its place; what it registered stays until the lease ends."""
        if self._connection is not None:
            self._shipper.disconnect()
            self._selector.unregister(self._connection)
            with contextlib.suppress(OSError):
                self._connection.shutdown(socket.SHUT_RDWR)
            self._connection.close()
            self._connection = None

    def _receive(self) -> None:
        connection = self._connection
        if connection is None:
            return
        try:
            data = connection.recv(1 << 18)
        except OSError:
            data = b""
        if not data:
            self._drop_connection()
            return
        self._received += data
        while len(self._received) >= m.FRAME.size:
            length, kind = m.FRAME.unpack_from(self._received)
            if kind != m.CONTROL or length > m.MAX_FRAME_BYTES:
                log.error("malformed frame from the agent; it is dropped")
                self._drop_connection()
                return
            end = m.FRAME.size + length
            if len(self._received) < end:
                break
            payload = bytes(self._received[m.FRAME.size : end])
            del self._received[:end]
            try:
                message = m.parse_to_tracer(payload)
            except ProtocolError as e:
                log.error("%s", e)
                self._drop_connection()
                return
            self._serve(message)
            if self._connection is not connection:
                return

    def _serve(self, message: m.ToTracer) -> None:
        done = m.Done(id=getattr(message, "id", 0))
        try:
            match message:
                case m.Hello():
                    self._hello(message)
                case m.Register():
                    self._register(message)
                case m.Unregister(probe=probe):
                    self._unregister(probe)
                case m.Watch(names=names):
                    self._hook.watch(names)
                case m.Spare(self_pids=pids):
                    self._table.self_pids = frozenset((os.getpid(), *pids))
                    self._reconcile_all()
                case m.Loaders(plans=plans):
                    self._table.set_loaders(plans)
                case m.Launch():
                    done.pid = self._launch(message)
                case m.Release(pid=pid):
                    self._engine.release(pid)
                    self._commands[pid].held = False
                case m.Signal(pid=pid, signal=number):
                    if pid in self._commands and self._commands[pid].status is None:
                        signal.pidfd_send_signal(self._commands[pid].pidfd, number)
                case m.Shutdown():
                    self._take_all_out()
                    self._end_commands()
                    self._done = True
                case m.Renew():
                    pass
        except TraplineError as e:
            done.error = e.to_wire()
        except Exception as e:
            log.exception("serving %s failed", type(message).__name__)
            done.error = EngineError(f"the tracer failed: {e}", hint="its log has the details").to_wire()
        # Counted from the end of the work: a long registration does not eat up the lease.
        self._lease_end = time.monotonic() + self._lease_s
        self._lease_running = True
        if done.id:
            self._shipper.send(done)

    def _hello(self, hello: m.Hello) -> None:
        self._host = hello.host
        self._lease_s = hello.lease_s
        self._table.self_pids = frozenset((os.getpid(), hello.agent_pid, *hello.self_pids))
        assert self._connection is not None
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
                (self._hook.name, self._hooked, self._hook.reason),
                ("reconcile", True, ""),
            ],
            probes=[c.probe for c in self._table.consumers],
        )
        self._shipper.connect(self._connection, ready)
        self._stats.clear()

    # --- probes ------------------------------------------------------------------------------------------------------

    def _register(self, message: m.Register) -> None:
        if not self._capabilities.available:
            raise PermissionDenied(
                self._capabilities.reason, hint="run the tracer as root or with CAP_SYS_PTRACE", reason="NoPtrace"
            )

        def ring() -> HitRing:
            return HitRing(
                message.fetches,
                max_hits=message.max_hits,
                on_data=self._shipper.data,
                on_limit=lambda: self._post(lambda: self._complete(message.probe)),
            )

        # Publish, then look: a mapping that appears meanwhile is found by a hook or by the look (semantics R2).
        fresh = self._table.consumer(message.probe) is None
        self._table.publish(message, ring)
        try:
            self._reconcile_all("scan")
        except Exception:
            # Out by the way that any probe goes out, which looks at all processes again (semantics R5).
            if fresh:
                self._unregister(message.probe)
            raise
        # Before ``Done``: whoever waits for it must not take a probe that is armed for one without targets.
        self._send_targets()
        self._next_reconcile = min(self._next_reconcile, time.monotonic() + self._reconcile_every())

    def _unregister(self, probe: str) -> None:
        consumer = self._table.withdraw(probe)
        if consumer is None:
            return
        for identity in self._engine.processes():
            # To the other probes there it is one more look.
            self._engine.reconcile(identity, "reconcile")
        consumer.close()
        with self._rings_lock:
            self._draining.append(consumer)
        self._shipper.send(self._stats_of(consumer))
        self._stats.pop(probe, None)
        self._shipper.data()

    def _complete(self, probe: str) -> None:
        if self._table.consumer(probe) is not None:
            self._unregister(probe)
            self._shipper.send(m.Completed(probe=probe))

    def _take_all_out(self) -> None:
        for consumer in self._table.consumers:
            self._unregister(consumer.probe)
        for command in self._commands.values():
            if command.held and command.status is None:
                signal.pidfd_send_signal(command.pidfd, signal.SIGKILL)
        self._engine.close()

    def _mapped(self, pid: int) -> None:
        """News of the perf stream. In a process whose loader reports to us it is left to that report, which comes before the
        code can run; what was mapped without the loader is looked at after a while."""
        if self._engine.is_hooked(pid):
            self._mapped_due.setdefault(pid, time.monotonic() + _LOADER_GRACE_S)
        else:
            self._reconcile_pid(pid, "mmap" + ASYNC)

    def _reconcile_pid(self, pid: int, cause: str) -> None:
        with contextlib.suppress(OSError):
            self._engine.reconcile(ProcessId(pid, procfs.start_time(pid)), cause)

    def _reconcile_all(self, cause: str = "reconcile") -> None:
        scan(self._table, self._engine, cause)

    def _reconcile_every(self) -> float:
        return _RECONCILE_S if self._hooked else _RECONCILE_UNHOOKED_S

    # --- hits and numbers --------------------------------------------------------------------------------------------

    def _drain(self) -> list[tuple[HitRing, int, bytes]]:
        """On the shipper's thread."""
        with self._rings_lock:
            # A probe that was taken out and registered again: first what it had before.
            consumers = [*self._draining, *self._table.consumers]
            self._draining.clear()
        return [
            (consumer.ring, count, batch)
            for consumer in consumers
            for count, batch in consumer.ring.drain(
                host=self._host,
                probe=consumer.probe,
                source=consumer.source,
                generation=consumer.register.generation,
                sites=consumer.register.sites,
                comms=self._engine.comms,
            )
        ]

    def _stats_of(self, consumer: Consumer) -> m.Stats:
        ring = consumer.ring
        return m.Stats(
            probe=consumer.probe,
            hits=ring.hits,
            limited=ring.limited,
            drops=dict(ring.drops),
            overhead_ns=ring.median_overhead_ns(),
        )

    def _targets_changed(self) -> None:
        """On any thread."""
        self._post(self._send_targets)

    def _send_targets(self) -> None:
        for probe, targets in self._table.take_changes():
            self._shipper.send(m.Targets(probe=probe, targets=targets))

    def _tick(self, now: float) -> None:
        self._engine.tick()
        for consumer in self._table.consumers:
            stats = self._stats_of(consumer)
            if self._stats.get(consumer.probe) != stats:
                self._stats[consumer.probe] = stats
                self._shipper.send(stats)
        if now >= self._next_reconcile:
            self._next_reconcile = now + self._reconcile_every()
            if self._table.consumers:
                self._reconcile_all()

    def _end_lease(self) -> None:
        self._lease_running = False
        self._lease_end = float("inf")
        if self._table.consumers:
            log.warning("the agent has not been heard of for %.3g s: everything is taken out", self._lease_s)
        self._take_all_out()
        self._shipper.send(m.LeaseEnded())
        if self._connection is None and not self._stay:
            # Commands that were launched go on; as our children they would end with us.
            self._done = not any(c.status is None for c in self._commands.values())
            self._stay = False

    # --- launched commands -------------------------------------------------------------------------------------------

    def _launch(self, message: m.Launch) -> int:
        command = start(message, self._engine.hold)
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
        if not self._lease_running and self._connection is None and not self._stay:
            self._done = not any(c.status is None for c in self._commands.values())

    def _end_commands(self) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            running = [c for c in self._commands.values() if c.status is None]
            for command in running:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(command.pidfd, number)
            deadline = time.monotonic() + _END_COMMAND_S
            while running and time.monotonic() < deadline:
                with selectors.DefaultSelector() as waiting:
                    for command in running:
                        waiting.register(command.pidfd, selectors.EVENT_READ)
                    waiting.select(max(0.0, deadline - time.monotonic()))
                while self._news:
                    self._news.popleft()()
                for command in running:
                    self._command_changed(command.pid)
                running = [c for c in running if c.status is None]


def _listen(path: Path) -> socket.socket:
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    if path.exists():
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            try:
                probe.connect(str(path))
            except ConnectionRefusedError:
                path.unlink(missing_ok=True)  # its tracer is dead
            else:
                raise OSError(98, f"a tracer listens on {path} already")
    before = os.umask(0o177)
    try:
        server.bind(str(path))
    finally:
        os.umask(before)
    server.listen(4)
    return server
