"""Service, agent and tracer together as processes: the command line against them, and deaths in between."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support import children, needs
from tests.support.children import Child
from trapline.client import Client
from trapline.errors import NotFound, TraplineError, Unavailable
from trapline.model import Phase, Probe

TRAPLINE = [sys.executable, "-m", "trapline"]
CALLS = """
import os, sys
print("ready", flush=True)
for line in sys.stdin:
    for i in range(int(line)):
        os.getppid()
    print(line.strip(), flush=True)
"""


def _url() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"http://127.0.0.1:{server.getsockname()[1]}"


def _env(state: Path) -> dict[str, str]:
    return {"TRAPLINE_STATE_DIR": str(state), "TRAPLINE_URL": "", "TRAPLINE_TOKEN": ""}


@contextmanager
def _up(state: Path) -> Iterator[tuple[Child, Client]]:
    argv = [*TRAPLINE, "up", "--port", "0", "--no-browser", "--json"]
    with Child(argv, ready="{", env=_env(state), session=True) as up:
        access = json.loads(up.ready_line)
        with Client(access["url"], access["token"]) as client:
            yield up, client
        if up.alive():
            up.signal(signal.SIGINT)
            up.popen.communicate(timeout=children.TIMEOUT_S)
            assert up.popen.returncode == 0


def _cli(state: Path, *args: str) -> tuple[int, str, str]:
    done = children.run([*TRAPLINE, *args], env=_env(state))
    return done.returncode, done.stdout, done.stderr


@needs.ptrace_any
def test_the_life_of_a_probe_by_command_line(tmp_path: Path) -> None:
    with _up(tmp_path) as (_, client), children.python(CALLS) as target:
        # No URL, no token: the command line finds this machine's own.
        status, out, err = _cli(tmp_path, "probe", "add", f"libc.so.6:getppid @ pid={target.pid}", "--json")
        assert status == 0, err
        probe = Probe.model_validate_json(out)
        assert (probe.name, probe.status.phase, probe.status.coverage.armed) == ("getppid", Phase.ARMED, 1)
        target.ask("500")
        now = client.wait_for("getppid", lambda p: p.status.counters.hits >= 500)
        assert (now.status.counters.hits, now.status.counters.dropped) == (500, 0)
        status, out, _ = _cli(tmp_path, "hits", "getppid", "-n", "5", "--json")
        assert [json.loads(line)["seq"] for line in out.splitlines()] == [495, 496, 497, 498, 499]
        for command in (
            ["hosts"],
            ["processes"],
            ["probe", "show", "getppid"],
            ["symbols", "getppid", "--module", "libc.so.6"],
        ):
            status, out, err = _cli(tmp_path, *command)
            assert (status, err) == (0, ""), command
            assert out
        status, _, err = _cli(tmp_path, "probe", "add", "libc.so.6:getppid", "--name", "getppid")
        assert status == 2
        assert "getppid" in err
        assert _cli(tmp_path, "probe", "rm", "getppid")[0] == 0
        target.ask("100")
        with pytest.raises(NotFound):
            client.probe("getppid")


@needs.ptrace_any
def test_p11_trapline_never_probes_itself(tmp_path: Path) -> None:
    with _up(tmp_path) as (up, client), pytest.raises(TraplineError, match="never probes itself"):
        client.create_probe(f"libc.so.6:getppid @ pid={up.pid}")


@needs.ptrace_any
def test_a_service_that_dies_loses_no_hit(tmp_path: Path) -> None:
    url = _url()
    port = url.rpartition(":")[2]
    serve = [*TRAPLINE, "serve", "--port", port, "--json"]
    env = _env(tmp_path)
    with Child(serve, ready="{", env=env, session=True) as first:
        token = json.loads(first.ready_line)["token"]
        agent_env = {**env, "TRAPLINE_AGENT_TOKEN": token, "TRAPLINE_AGENT_RECONNECT_MAX_S": "0.2"}
        with (
            Child([*TRAPLINE, "agent", "--server", url], ready=None, env=agent_env, session=True) as agent,
            children.python(CALLS) as target,
            Client(url, token) as client,
        ):
            client.wait_host()
            probe = client.create_probe(f"libc.so.6:getppid @ pid={target.pid}")
            assert client.wait(probe.id).status.phase is Phase.ARMED
            target.ask("100")
            client.wait_for(probe.id, lambda p: p.status.counters.hits >= 100)
            first.signal(signal.SIGTERM)
            first.wait()
            # Nobody is there to take these: the agent keeps its probes armed, and spools.
            target.ask("1000")
            with pytest.raises(Unavailable):
                client.probes()
            with Child(serve, ready="{", env=env, session=True) as second:
                target.ask("10")
                now = client.wait_for(probe.id, lambda p: p.status.counters.hits >= 1110)
                assert (now.status.counters.hits, now.status.counters.dropped) == (1110, 0)
                hits = client.hits(probe.id, limit=2000)
                assert [hit.seq for hit in hits] == list(range(1110))
                agent.signal(signal.SIGTERM)
                assert agent.wait() == 0
                target.ask("10")
                second.signal(signal.SIGTERM)
                assert second.wait() == 0


@needs.ptrace_any
def test_an_agent_without_a_good_token_says_so_and_ends(tmp_path: Path) -> None:
    serve = [*TRAPLINE, "serve", "--port", "0", "--json"]
    with Child(serve, ready="{", env=_env(tmp_path), session=True) as service:
        url = json.loads(service.ready_line)["url"]
        env = {**_env(tmp_path / "agent"), "TRAPLINE_AGENT_TOKEN": "tlp_wrong"}
        done = children.run([*TRAPLINE, "agent", "--server", url], env=env)
        assert done.returncode == 2
        assert "refuses this agent's token" in done.stderr.splitlines()[-1]


def _tracer_of(pid: int) -> int:
    """Returns the pid of the tracer that a process started."""
    for entry in os.listdir(f"/proc/{pid}/task"):
        for child in Path(f"/proc/{pid}/task/{entry}/children").read_text().split():
            if b"trapline_agent.tracer" in Path(f"/proc/{child}/cmdline").read_bytes():
                return int(child)
    raise AssertionError(f"process {pid} has no tracer")


@needs.ptrace_any
def test_a_tracer_that_ends_is_replaced_and_its_probes_come_back(tmp_path: Path) -> None:
    with _up(tmp_path) as (up, client), children.python(CALLS) as target:
        probe = client.create_probe(f"libc.so.6:getppid @ pid={target.pid}")
        assert client.wait(probe.id).status.phase is Phase.ARMED
        target.ask("10")
        client.wait_for(probe.id, lambda p: p.status.counters.hits >= 10)
        # By SIGTERM it takes its bytes out. What SIGKILL does to targets is the engines' tests' matter.
        tracer = _tracer_of(up.pid)
        os.kill(tracer, signal.SIGTERM)
        client.wait_for(probe.id, lambda p: p.status.phase is not Phase.ARMED)
        client.wait_for(probe.id, lambda p: p.status.phase is Phase.ARMED)
        assert _tracer_of(up.pid) != tracer
        target.ask("10")
        now = client.wait_for(probe.id, lambda p: p.status.counters.hits >= 20)
        assert (now.status.counters.hits, now.status.counters.dropped) == (20, 0)
