"""A whole Trapline on this machine: service, tracer and agent as the processes that users run, and a client of them.

Each has a state directory of its own and a log; ports are free ones on loopback. All die with the test.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import websockets.sync.client
from websockets.typing import Subprotocol

from tests.engines.host import altered_bytes, mapped_files
from tests.support import children
from tests.support.children import TIMEOUT_S, Child
from trapline.client import Client, HitBatch
from trapline.model import Hit, Phase, Probe, Target, TargetState
from trapline.protocol import stream as s
from trapline.protocol.hits import decode
from trapline.protocol.messages import encode

TRAPLINE = [sys.executable, "-m", "trapline"]
HOST = "system-test"
NOBODY = 65534
AS_NOBODY = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--pdeathsig=KILL", "--"]

CALLS = """
import ctypes, os, sys, threading
getppid, total, running = ctypes.PyDLL(None).getppid, 0, False
def run():
    global total
    while running:
        getppid()
        total += 1
thread = None
print("ready", flush=True)
for line in sys.stdin:
    verb, *args = line.split()
    if verb == "call":
        for _ in range(int(args[0])):
            os.getppid()
            total += 1
    elif verb == "start":
        running, thread = True, threading.Thread(target=run)
        thread.start()
    elif verb == "stop":
        running = False
        thread.join()
    elif verb == "open":
        for path in args:
            try:
                open(os.fsencode(path)).close()
            except OSError:
                pass
    print(total, flush=True)
"""
"""A program that calls getppid so many times, or until it is told to stop, and says how often it did so in all."""
GETPPID = "libc.so.6:getppid"


@contextlib.contextmanager
def caller(code: str = CALLS, *, env: Mapping[str, str] | None = None, prefix: Sequence[str] = ()) -> Iterator[Child]:
    """Runs the system's python3 with ``code``; that it ends by a signal fails the test."""
    with Child([*prefix, "/usr/bin/python3", "-c", code], env=env) as child:
        yield child


def wait_exit(pid: int, timeout: float = TIMEOUT_S) -> None:
    """Waits until a process that is not our child has ended. Raises TimeoutError."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        wait_readable(fd, timeout, f"process {pid} still runs")
    finally:
        os.close(fd)


def wait_readable(fd: int, timeout: float, otherwise: str) -> None:
    import select

    poll = select.poll()
    poll.register(fd, select.POLLIN)
    if not poll.poll(timeout * 1000):
        raise TimeoutError(otherwise)


def line_with(child: Child, text: str, timeout: float = TIMEOUT_S) -> str:
    """Returns the next line of a child's output that has ``text`` in it."""
    deadline = time.monotonic() + timeout
    while (line := child.lines.next(max(0.0, deadline - time.monotonic()))) is not None:
        if text in line:
            return line
    raise children.ChildDied(child.obituary())


def libc_of(pid: int) -> Path:
    """Returns the libc that a process maps."""
    return next(path for path in mapped_files(pid) if path.name == "libc.so.6")


def breakpoints(pid: int, *paths: Path) -> list[str]:
    """Returns the files in which a process' code has int3 where the file has not, one entry for each.

    Nothing else may differ but the zeros behind a file's code, where displaced instructions are.
    """
    altered = altered_bytes(pid, paths or mapped_files(pid))
    sites = {place: memory for place, (file, memory) in altered.items() if file}
    assert set(sites.values()) <= {0xCC}, altered
    return sorted(path for path, _ in sites)


class Subscription:
    """A socket on ``/stream`` with one subscription to hits, JSON or binary."""

    def __init__(
        self, stack: Stack, probes: Sequence[str] | None = None, *, binary: bool = False, receive_bytes: int = 0
    ) -> None:
        """Returns when the service has said ``subscribed``: what is hit from then on comes.

        Args:
            stack: whose service.
            probes: ids or names; None: all.
            binary: the binary subprotocol.
            receive_bytes: the socket's receive buffer, for one that is to be slow; 0: the kernel's choice.
        """
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        if receive_bytes:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        sock.connect(("127.0.0.1", stack.port))
        self._binary = binary
        self._ending = contextlib.ExitStack()
        opening = websockets.sync.client.connect(
            f"ws://127.0.0.1:{stack.port}/api/v1/stream",
            sock=sock,
            additional_headers={"Authorization": f"Bearer {stack.token}"},
            subprotocols=[Subprotocol(s.BINARY_SUBPROTOCOL if binary else s.JSON_SUBPROTOCOL)],
            compression=None,
            max_size=None,
            max_queue=(1, 0) if receive_bytes else 16,
            proxy=None,
        )
        self.socket = self._ending.enter_context(opening)
        self.hits: list[Hit] = []
        self.gaps: list[s.Gap] = []
        wanted = s.StreamFilter(probes=None if probes is None else list(probes))
        self.socket.send(encode(s.Subscribe(id="t", topic="hits", filter=wanted)))
        first = s.parse_server_message(self.socket.recv(TIMEOUT_S))
        assert isinstance(first, s.Subscribed), first

    @property
    def missing(self) -> int:
        """Hits that gaps told of."""
        return sum(gap.count for gap in self.gaps)

    def take(self, count: int) -> list[Hit]:
        """Reads until so many hits came or were told to be missing; returns those that came."""
        while len(self.hits) + self.missing < count:
            frame = self.socket.recv(TIMEOUT_S)
            if isinstance(frame, bytes):
                assert self._binary
                batch: HitBatch = decode(memory := memoryview(frame)[s.BINARY_PREFIX_BYTES :])
                assert struct.unpack_from("<II", frame)[1] == 0
                assert len(memory) % 8 == 0
                self.hits += batch.hits()
                continue
            message = s.parse_server_message(frame)
            if isinstance(message, s.HitItems):
                assert not self._binary
                self.hits += message.items
            else:
                assert isinstance(message, s.Gap), message
                self.gaps.append(message)
        return self.hits

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self._ending.close()


class Stack:
    """Service, tracer and agent; ``with Stack() as stack`` has them running and linked.

    Attributes:
        service, tracer, agent: the running processes.
        client: a client of the service, with its admin token.
        http: the same without the client's manners: responses as they come.
        token: the admin token.
        port: the service's port, the same after a restart.
    """

    def __init__(
        self,
        *,
        lease_s: float = 30.0,
        service_env: Mapping[str, str] | None = None,
        agent_env: Mapping[str, str] | None = None,
        env: Mapping[str, str] | None = None,
        user: Sequence[str] = (),
        own_tracer: bool = False,
    ) -> None:
        """
        Args:
            lease_s: the tracer's lease.
            service_env: settings of the service, ``TRAPLINE_*``.
            agent_env: settings of the agent, ``TRAPLINE_AGENT_*``.
            env: environment of all three.
            user: a command that runs tracer and agent as somebody else.
            own_tracer: the agent starts its tracer itself; by default it joins one that stands alone.
        """
        # A Unix socket's path holds 107 bytes, which pytest's directories may exceed.
        self.directory = Path(tempfile.mkdtemp(prefix="trapline-test-"))
        self._agent_directory = self.directory / "agent"
        self._agent_directory.mkdir()
        if user:
            self.directory.chmod(0o755)
            os.chown(self._agent_directory, NOBODY, NOBODY)
        self._env = {"TRAPLINE_URL": "", "TRAPLINE_TOKEN": "", "TRAPLINE_LOG_LEVEL": "WARNING", **(env or {})}
        self._service_env = dict(service_env or {})
        self._agent_env = {
            "TRAPLINE_AGENT_LEASE_S": str(lease_s),
            "TRAPLINE_AGENT_RECONNECT_MAX_S": "0.2",
            "TRAPLINE_AGENT_HOST_NAME": HOST,
            "HOME": str(self._agent_directory),
            # Exact counts of hot loops, however slow the machine; test_budgets.py has its own.
            **{f"TRAPLINE_AGENT_OVERHEAD_{scope}": "0" for scope in ("PROBE", "PROCESS", "HOST")},
            **(agent_env or {}),
        }
        self._user = list(user)
        self._own_tracer = own_tracer
        self._ending = contextlib.ExitStack()
        self.socket = self._agent_directory / "tracer.sock"
        self.port = 0
        self.token = ""
        self.tracer: Child
        self.agent: Child
        self.service: Child

    # --- the three processes ---

    def start_service(self) -> None:
        """Starts the service; returns when it answers."""
        self.service = self._start(
            "service",
            [*TRAPLINE, "serve", "--port", str(self.port), "--json"],
            {"TRAPLINE_STATE_DIR": str(self.directory / "service"), **self._service_env},
            ready="{",
        )
        access = json.loads(self.service.ready_line)
        self.port, self.token = int(access["url"].rpartition(":")[2]), access["token"]

    def start_tracer(self) -> None:
        """Starts a tracer; returns when it listens."""
        argv = [*self._user, sys.executable, "-m", "trapline_agent.tracer", "--stay", "--verbose"]
        self.tracer = self._start("tracer", [*argv, "--socket", str(self.socket)], {})
        line_with(self.tracer, "tracer ready on")

    def start_agent(self) -> None:
        """Starts an agent; it links when it can."""
        self.agent = self._start(
            "agent",
            [*self._user, *TRAPLINE, "agent", "--server", self.url]
            + ([] if self._own_tracer else ["--tracer-socket", str(self.socket)]),
            {
                "TRAPLINE_STATE_DIR": str(self._agent_directory),
                "TRAPLINE_AGENT_TOKEN": self.token,
                **self._agent_env,
            },
        )

    def _start(self, name: str, argv: Sequence[str], env: Mapping[str, str], ready: str | None = None) -> Child:
        # The tracer says on standard error what the tests wait for; the others' is for whoever reads a failure.
        log = (self.directory / f"{name}.log").open("ab")
        self._ending.callback(log.close)
        child = Child(
            argv,
            ready=ready,
            env={**self._env, **env},
            stderr=subprocess.STDOUT if name == "tracer" else log.fileno(),
            session=True,
        )
        self._ending.callback(child.kill)
        return child

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        try:
            self.start_service()
            if not self._own_tracer:
                self.start_tracer()
            self.start_agent()
            self.client = self._ending.enter_context(Client(self.url, self.token))
            self.http = self._ending.enter_context(
                httpx.Client(
                    base_url=f"{self.url}/api/v1",
                    headers={"Authorization": f"Bearer {self.token}"},
                    trust_env=False,
                    timeout=TIMEOUT_S,
                )
            )
            self.host = self.client.wait_host(HOST).id
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        try:
            # In the order in which nothing is lost and everything is taken out.
            for child in (self.agent, *(() if self._own_tracer else (self.tracer,)), self.service):
                if child.alive():
                    child.signal(signal.SIGTERM)
                    status = child.wait()
                    assert status == 0 or kind is not None, f"{child.argv} ended with {status}"
        finally:
            self._close()

    def _close(self) -> None:
        self._ending.close()
        for log in sorted(self.directory.glob("*.log")):
            if text := log.read_text():
                print(f"--- {log.name}\n{text[-4000:]}")
        if hasattr(self, "tracer"):
            print("--- tracer", *self.tracer.lines.seen[-40:], sep="\n")
        shutil.rmtree(self.directory)

    # --- what the tests do with them ---

    def arm(self, text: str, **options: Any) -> Probe:
        """Creates a probe and waits until it is armed everywhere it can be."""
        probe = self.client.create_probe(text, **options)
        probe = self.client.wait(probe.id)
        assert probe.status.phase is Phase.ARMED, (probe.status, self.client.targets(probe.id))
        return probe

    def until_hits(self, probe: str, count: int) -> Probe:
        """Waits until so many hits were counted; returns the probe then."""
        return self.client.wait_for(probe, lambda p: p.status.counters.hits >= count)

    def exactly(self, probe: str, count: int) -> Probe:
        """Asserts that a probe has so many hits, all recorded, none twice; returns it. Nothing may be hitting it."""
        now = self.until_hits(probe, count)
        assert (now.status.counters.hits, now.status.counters.dropped) == (count, 0), now.status
        recorded = self.recorded(probe, count)
        assert sorted(hit.seq for hit in recorded) == list(range(count))
        return now

    def recorded(self, probe: str, count: int) -> list[Hit]:
        """Returns the record of a probe, which is written a moment after the hits were counted: once it has ``count``."""
        # Each look makes the recorder write what it has.
        deadline = time.monotonic() + TIMEOUT_S
        while len(found := self.client.hits(probe, limit=count + 1000)) < count:
            assert time.monotonic() < deadline, f"{len(found)} of {count} hits are recorded"
        return found

    def armed(self, probe: str, pid: int, timeout: float = TIMEOUT_S) -> Target:
        """Waits until a probe is armed in a process; returns that target."""

        found: list[Target] = []

        def is_armed(now: Probe) -> bool:
            # While the host is offline its targets are listed as they were.
            if now.status.phase in (Phase.ARMED, Phase.PARTIAL):
                targets = self.client.targets(probe)
                found.extend(t for t in targets if t.pid == pid and t.state is TargetState.ARMED)
            return bool(found)

        self.client.wait_for(probe, is_armed, timeout=timeout)
        return found[0]

    def cli(self, *args: str, token: str | None = None) -> subprocess.CompletedProcess[str]:
        """Runs the command line against this service."""
        env = {
            "TRAPLINE_URL": self.url,
            "TRAPLINE_TOKEN": token or self.token,
            "TRAPLINE_STATE_DIR": str(self.directory),
        }
        return children.run([*TRAPLINE, *args], env={**self._env, **env})
