"""A real tracer process, over its socket: its end, hung and malformed agents, stray connections, odd plans."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import resource
import signal
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgspec
import pytest

from tests.engines.host import Files, untouched
from tests.support import needs
from tests.support.children import TIMEOUT_S, Child, run
from tests.support.targets import Targets
from trapline.errors import Conflict, EngineError
from trapline.protocol.hits import decode
from trapline_agent.kernel import procfs
from trapline_agent.plans import FetchPlan, Op, Program, Register, SitePlan, Value
from trapline_agent.tracer import messages as m
from trapline_agent.tracer.client import Event, TracerClient

pytestmark = [needs.gcc, needs.ptrace_any, needs.x86_64]

TRACER = [sys.executable, "-m", "trapline_agent.tracer", "--socket"]


@pytest.fixture
def path() -> Iterator[Path]:
    # A Unix socket's path holds 107 bytes, which pytest's directories may exceed.
    with tempfile.TemporaryDirectory(prefix="trapline-test-") as directory:
        yield Path(directory) / "tracer.sock"


@contextlib.contextmanager
def tracer(path: Path, *args: str) -> Iterator[Child]:
    """A tracer; on leaving it is asked to end, if it has not, and must do so in good order."""
    with (path.parent / "log").open("ab") as log:
        child = Child([*TRACER, str(path), *args], ready=None, stderr=log.fileno(), session=True)
    try:
        yield child
        child.signal(signal.SIGTERM)
        assert child.wait() == 0
    finally:
        child.kill()
        print((path.parent / "log").read_text())


@contextlib.asynccontextmanager
async def connected(path: Path, process: Child, lease_s: float = 30.0) -> AsyncIterator[TracerClient]:
    client = await TracerClient.connect(path, host="h", process=process.popen, lease_s=lease_s)
    try:
        yield client
    finally:
        await client.close()


def raw(path: Path, *messages: m.Message) -> socket.socket:
    """Returns a connection on which these were said."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(TIMEOUT_S)
    connection.connect(str(path))
    connection.sendall(b"".join(m.frame(message) for message in messages))
    return connection


def is_closed(connection: socket.socket) -> bool:
    """Reads to the end of a connection; raises TimeoutError where it does not end."""
    try:
        while connection.recv(1 << 16):
            pass
    except ConnectionResetError:
        pass  # it had not read what we said
    return True


async def events(client: TracerClient) -> list[Event | bytes]:
    """Returns what comes until the connection ends."""
    async with asyncio.timeout(TIMEOUT_S):
        return [event async for event in client.events()]


def hits_in(found: list[Event | bytes]) -> int:
    return sum(decode(item).header.count for item in found if isinstance(item, bytes))


@pytest.fixture
def hot(targets: Targets) -> SitePlan:
    return Files().plan(targets.build("hot"), "target_hot")


async def test_the_last_hits_and_done_arrive_at_a_shutdown(path: Path, targets: Targets, hot: SitePlan) -> None:
    with targets.run("hot", "1") as child:
        for calls in range(1, 21):
            with tracer(path) as process, untouched(child.pid):
                async with connected(path, process) as client:
                    await client.register("p", generation=1, sites=["s"], plans=[hot])
                    child.ask(f"call {calls}")
                    await client._call(m.Shutdown(id=1000))
                    found = await events(client)
                assert hits_in(found) == calls
                assert [e.hits for e in found if isinstance(e, m.Stats)][-1:] == [calls]
                assert process.wait() == 0


async def test_a_done_follows_the_hits_it_is_about(path: Path, targets: Targets, hot: SitePlan) -> None:
    with targets.run("hot", "1") as child, tracer(path) as process:
        async with connected(path, process) as client:
            for _ in range(20):
                await client.register("p", generation=1, sites=["s"], plans=[hot])
                child.ask("call 7")
                await client.unregister("p")
                # What came before ``Done`` is there without waiting.
                arrived: list[Event | bytes] = []
                while not client._events.empty():
                    item = client._events.get_nowait()
                    assert item is not None
                    arrived.append(item)
                assert hits_in(arrived) == 7
                assert [e.hits for e in arrived if isinstance(e, m.Stats)][-1:] == [7]


def silent_agent(path: Path, hot: SitePlan, lease_s: float) -> socket.socket:
    """Returns a connection that has registered a probe and will not read any more."""
    connection = raw(
        path,
        m.Hello(agent_pid=os.getpid(), host="h", lease_s=lease_s),
        m.Register(id=1, probe="p", generation=1, sites=["s"], plans=[hot]),
    )
    received = b""
    while m.frame(m.Done(id=1)) not in received:
        received += connection.recv(1 << 16)
    return connection


@pytest.mark.parametrize("lease_s", [30.0, 0.5])
async def test_an_agent_that_does_not_read_holds_up_nothing(
    path: Path, targets: Targets, hot: SitePlan, lease_s: float
) -> None:
    with targets.run("hot", "1") as child, untouched(child.pid), tracer(path, "--stay") as process:
        async with connected(path, process):
            pass  # it listens
        with silent_agent(path, hot, lease_s) as connection:
            # More than a Unix socket holds (net.core.wmem_max): the rest waits in the tracer.
            child.ask("call 30000")
            if lease_s < 1:
                assert is_closed(connection)
            else:
                process.signal(signal.SIGTERM)
                assert process.wait() == 0


async def test_a_lease_that_ends_is_told_and_the_agent_comes_again(path: Path, targets: Targets, hot: SitePlan) -> None:
    with targets.run("hot", "1") as child, tracer(path, "--stay") as process:
        async with connected(path, process):
            pass
        with silent_agent(path, hot, 0.1) as connection:
            received = b""
            while data := connection.recv(1 << 16):
                received += data
            assert received.endswith(m.frame(m.LeaseEnded()))
        with untouched(child.pid):
            pass
        async with connected(path, process) as client:
            assert client.ready.probes == []


async def test_only_a_hello_takes_the_agent_s_place(path: Path, hot: SitePlan) -> None:
    hello = m.Hello(agent_pid=os.getpid(), host="other")
    with tracer(path) as process:
        async with connected(path, process) as client:
            raw(path).close()
            second = run([*TRACER, str(path)])
            assert second.returncode == 2
            assert "listens on" in second.stderr
            for refused in (m.Renew(), *(m.Hello(agent_pid=1, host="", lease_s=s) for s in (0.0, float("nan"), 1e9))):
                with raw(path, refused) as connection:
                    assert is_closed(connection)
            waiting = raw(path)
            await client.register("p", generation=1, sites=["s"], plans=[hot])
            waiting.sendall(m.frame(hello))
            assert waiting.recv(1)
            await events(client)  # they end
            waiting.close()


NESTED = b"\x91" * 100_000
"""Arrays in an array."""


@pytest.mark.parametrize(
    "payload",
    [
        NESTED,
        b"\x81\xa1t" + NESTED,
        b"\x82\xa1t\xa5renew\xa1x" + NESTED,
        b"\x82\xa1t\xa4done\xa5error\x81\xa1x" + NESTED,
        b"\xc1",
        b"",
    ],
)
async def test_what_cannot_be_parsed_drops_the_connection_alone(path: Path, payload: bytes) -> None:
    frame = m.FRAME.pack(len(payload), m.CONTROL) + payload
    with tracer(path, "--stay") as process:
        async with connected(path, process) as client:
            with raw(path) as stranger:
                stranger.sendall(frame)
                assert is_closed(stranger)
            client._writer.write(frame)
            await events(client)
        async with connected(path, process) as client:
            assert client.ready.probes == []


async def test_plans_that_cannot_be_meant_are_refused_whole(path: Path, hot: SitePlan) -> None:
    fetches = [FetchPlan("s", "rsi", string=True)]
    deep: Value = Register("rdi")
    for _ in range(300):
        deep = Op("neg", (deep,))

    def with_value(value: Value) -> SitePlan:
        return msgspec.structs.replace(hot, program=Program((value,)))

    with tracer(path) as process:
        async with connected(path, process) as client:
            for odd in (
                {"sites": []},
                {"fetches": [FetchPlan("x", "r99")]},
                {"fetches": [FetchPlan("x", "rdi", string=True, max_bytes=0)]},
                {"fetches": [FetchPlan("x", "rdi", string=True, max_bytes=4097)]},
                {"fetches": [FetchPlan("x")]},
                {"fetches": [FetchPlan("x", type="u63")], "plans": [with_value(Register("rdi"))]},
                {"fetches": [FetchPlan("x"), FetchPlan("y")], "plans": [with_value(Register("rdi"))]},
                {"fetches": [FetchPlan("x")], "plans": [with_value(Register("r99"))]},
                {"fetches": [FetchPlan("x")], "plans": [with_value(Op("exec", (Register("rdi"),)))]},
                {"fetches": [FetchPlan("x")], "plans": [with_value(deep)]},
            ):
                with pytest.raises(EngineError) as e:
                    await client.register("p", **{"generation": 1, "sites": ["s"], "plans": [hot], **odd})  # type: ignore[arg-type]
                assert "the tracer failed" not in str(e.value)
            await client.register("p", generation=1, sites=["s"], plans=[hot], fetches=fetches, max_hits=5)
            await client.register("p", generation=2, sites=["s"], plans=[hot], fetches=fetches, max_hits=5)
            for other in ({"fetches": []}, {"max_hits": 6}, {"where": {"comm": "x"}}):
                with pytest.raises(Conflict):
                    await client.register(
                        "p",
                        **{"generation": 3, "sites": ["s"], "plans": [hot], "fetches": fetches, "max_hits": 5, **other},  # type: ignore[arg-type]
                    )
        async with connected(path, process) as client:
            assert client.ready.probes == ["p"]


async def test_a_launched_command_has_what_the_tracer_began_with(path: Path) -> None:
    out = path.parent / "out"
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    score = procfs.read("/proc/self/oom_score_adj").decode().strip()
    with tracer(path) as process:
        async with connected(path, process) as client:
            with pytest.raises(EngineError, match="no command"):
                await client.launch([])
            shell = f"ulimit -Sn > {out}; cat /proc/self/oom_score_adj >> {out}"
            pid = await client.launch(["/bin/sh", "-c", shell])
            await client.release(pid)
            async with asyncio.timeout(TIMEOUT_S):
                async for event in client.events():
                    if isinstance(event, m.Exited):
                        break
            limits = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
            assert limits[0] == limits[1]
            lower = "import os; os.write(os.open('/proc/self/oom_score_adj', os.O_WRONLY), b'-900')"
            permitted = run([sys.executable, "-c", lower]).returncode == 0
            wanted = min(int(score), -900) if permitted else int(score)
            assert int(procfs.read(f"/proc/{process.pid}/oom_score_adj")) == wanted
            assert procfs.read(str(out)).decode().split() == [str(soft), score]


def test_what_is_no_socket_is_not_replaced(path: Path) -> None:
    path.write_text("precious")
    result = run([*TRACER, str(path)])
    assert result.returncode == 2
    assert "is no socket" in result.stderr
    assert path.read_text() == "precious"


@needs.strace
async def test_s5_not_one_call_on_a_process_without_probes(path: Path, targets: Targets, tmp_path: Path) -> None:
    """The oracle is strace on the tracer: every thread that it ever traces, and every memory that it opens, is its target's.

    Around it processes fork, exec and open libraries; all that is known of them is what is read in /proc.
    """
    calls = tmp_path / "calls"
    library = targets.library()
    with targets.run("hot", "2") as child, targets.run("forks") as forks, targets.run("dl", library) as opener:
        with tracer(path) as process:
            async with connected(path, process) as client:
                argv = ["strace", "-f", "-qq", "-o", str(calls), "-p", str(process.pid), "-e"]
                with Child([*argv, "trace=ptrace,process_vm_readv,process_vm_writev,openat"], ready=None) as watch:
                    while procfs.tracer(process.pid) != watch.pid:
                        pass
                    plans = [Files().plan(targets.build(n), f"target_{n}", i) for i, n in enumerate(("hot", "forks"))]
                    plans.append(Files().plan(library, "dlfn", 2))
                    await client.register("p", generation=1, sites=["a", "b", "c"], plans=plans, where={"comm": "hot"})
                    child.ask("call 20")
                    for kind in ("fork", "vfork", "spawn", "thread"):
                        forks.ask(f"{kind} 10")
                    for _ in range(5):
                        opener.ask("open")
                        opener.ask("call 5")
                        opener.ask("close")
                    await client.unregister("p")
                    watch.signal(signal.SIGINT)
                    assert watch.wait() == -signal.SIGINT
                    watch.popen.returncode = 0  # as it was told to
        meant = set(procfs.tasks(child.pid))
        traced = {int(t) for t in re.findall(r"ptrace\(PTRACE_\w+, (\d+)", calls.read_text())}
        opened = {int(p) for p in re.findall(r'"/proc/(\d+)/(?:task/\d+/)?mem"', calls.read_text())}
        assert (traced, opened) == (meant, {child.pid})
        assert "process_vm" not in calls.read_text()
