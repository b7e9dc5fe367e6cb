"""What cannot be done is said, over HTTP as a problem and by the command line as one line and status 2; and it changes
nothing: no byte of the target, no count of the probe that is there already."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import websockets.sync.client
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.typing import Subprotocol

from tests.engines.host import untouched
from tests.support import children, needs
from tests.support.children import TIMEOUT_S, Child
from tests.system.stack import AS_NOBODY, GETPPID, HOST, TRAPLINE, Stack, Subscription, breakpoints, caller, libc_of
from trapline.model import Phase, Probe, Problem
from trapline.protocol import messages as m
from trapline.protocol import stream as s

pytestmark = [needs.ptrace_any, needs.x86_64]


@dataclass
class Bystander:
    """A target with a probe that counts all along: what goes wrong beside it must not touch it."""

    stack: Stack
    target: Child
    probe: Probe
    armed: list[str]
    """Where its breakpoints are: in its libc, and in its loader, which tells of libraries that are opened later."""

    def check(self) -> None:
        """Asserts that its own breakpoint is there and no other, that it counts, and that the service has its probe only."""
        assert breakpoints(self.target.pid) == self.armed
        self.stack.exactly(self.probe.id, int(self.target.ask("call 20")))
        assert [probe.id for probe in self.stack.client.probes()] == [self.probe.id]


@pytest.fixture(scope="module")
def bystander(stack: Stack) -> Iterator[Bystander]:
    with caller() as target, untouched(target.pid):
        probe = stack.arm(f"{GETPPID} @ pid={target.pid}", name="bystander")
        bystander = Bystander(stack, target, probe, breakpoints(target.pid))
        assert str(libc_of(target.pid)) in bystander.armed
        bystander.check()
        yield bystander
        stack.client.delete_probe(probe.id)


def problem_of(response: httpx.Response) -> Problem:
    assert response.headers["content-type"] == "application/problem+json"
    problem = Problem.model_validate_json(response.content)
    assert problem.status == response.status_code
    assert problem.detail
    assert problem.type == f"urn:trapline:error:{problem.code}"
    return problem


def refused(stack: Stack, probe: str, **body: Any) -> Problem:
    """Posts a probe that cannot be; returns the problem, which the command line must tell too."""
    problem = problem_of(stack.http.post("/probes", json={"probe": probe, **body}))
    options = [f"--{key}={value}" for key, value in body.items()]
    done = stack.cli("probe", "add", probe, *options)
    assert (done.returncode, done.stdout) == (2, "")
    first, *rest = done.stderr.splitlines()
    assert first.startswith(f"trapline: {problem.detail}"), done.stderr
    assert problem.hint in first
    assert all(f"`{name}`" in first for name in problem.suggestions[:3])
    assert rest == [f"  {line}" for line in problem.caret.splitlines()]
    return problem


@pytest.mark.parametrize(
    ("probe", "status", "code", "reason", "says"),
    [
        ("libc.so.6:getppidd @ pid={pid}", 422, "not-found", "|Stripped", "`getppidd`"),  # libc6-dbg may be there
        ("no-such-library.so:f @ pid={pid}", 422, "not-found", "NotMapped", "no-such-library.so"),
        ("libc.so.6:getppid @ pid={nobody}", 422, "not-found", "", "no process {nobody}"),
        ("libc.so.6:getppid+1 @ pid={pid}", 422, "unsupported", "MidInstruction", "in the middle of the instruction"),
        ("libc.so.6:getppid+0x100000 @ pid={pid}", 422, "unsupported", "BeyondFunction", "beyond the end"),
        ("libc.so.6:0x10 @ pid={pid}", 422, "unsupported", "NotExecutable", "not in its code"),
        ("libc.so.6:memcpy @ pid={pid}", 422, "unsupported", "IndirectFunction", "indirect function"),
        ("libc.so.6:getppid @ pid=1x", 422, "spec-invalid", "", "1x"),
        ("libc.so.6 getppid", 422, "spec-invalid", "", ""),
        ("libc.so.6:getppid @ pid={pid}, host=elsewhere", 503, "unavailable", "NoHostOnline", "elsewhere"),
        ("libc.so.6:getppid @ pid={service}", 422, "unsupported", "Self", "never probes itself"),
        ("libc.so.6:getppid @ pid={agent}", 422, "unsupported", "Self", "never probes itself"),
        ("libc.so.6:getppid @ pid={tracer}", 422, "unsupported", "Self", "never probes itself"),
    ],
)
def test_a_probe_that_cannot_be(
    bystander: Bystander, probe: str, status: int, code: str, reason: str, says: str
) -> None:
    stack = bystander.stack
    names = {
        "pid": bystander.target.pid,
        "nobody": int(Path("/proc/sys/kernel/pid_max").read_text()),  # pids are below it, proc(5)
        "service": stack.service.pid,
        "agent": stack.agent.pid,
        "tracer": stack.tracer.pid,
    }
    problem = refused(stack, probe.format(**names))
    assert (problem.status, problem.code) == (status, code), problem
    assert problem.reason in reason.split("|")
    assert says.format(**names) in problem.detail
    # Trapline itself is the one thing for which there is nothing to do.
    assert problem.suggestions or problem.hint or problem.caret or problem.reason == "Self", "what to do next"
    bystander.check()


def test_a_near_miss_is_suggested(bystander: Bystander) -> None:
    assert refused(bystander.stack, f"libc.so.6:getppidd @ pid={bystander.target.pid}").suggestions[0] == "getppid"


@needs.gcc
@needs.binutils
def test_a_stripped_program(bystander: Bystander, tmp_path: Path) -> None:
    source = tmp_path / "quiet.c"
    source.write_text(
        "#include <unistd.h>\nstatic __attribute__((noinline)) int twice(int n) { return 2 * n; }\n"
        'int main(int c, char **v) { (void)v; write(1, "ready\\n", 6); return read(0, &c, 1) + twice(c) > 99; }\n'
    )
    program = tmp_path / "quiet"
    subprocess.run(["gcc", "-O1", "-s", str(source), "-o", str(program)], check=True)
    with Child([program]) as target, untouched(target.pid):
        problem = refused(bystander.stack, f"{program}:twice @ pid={target.pid}")
        assert (problem.status, problem.code, problem.reason) == (422, "not-found", "Stripped")
        assert "debug symbols" in problem.hint
        bystander.check()
    shutil.copy("/bin/cat", tmp_path)
    with Child([tmp_path / "cat"], ready=None) as target, untouched(target.pid):
        assert refused(bystander.stack, f"{tmp_path}/cat:main @ pid={target.pid}").reason == "Stripped"


@needs.gdb
def test_a_process_that_gdb_traces(bystander: Bystander) -> None:
    stack = bystander.stack
    with caller() as target:
        gdb = ["gdb", "--nx", "-q", "-p", str(target.pid), "-ex", "echo attached\\n"]
        with Child(gdb, ready="attached") as debugger, untouched_code(target.pid):
            problem = refused(stack, f"{GETPPID} @ pid={target.pid}")
            assert (problem.status, problem.code, problem.reason) == (422, "unsupported", "TracedByOther"), problem
            assert "gdb" in problem.detail
            bystander.check()
            debugger.send("detach")
            debugger.send("quit")
            debugger.wait()
        # What was refused then is possible now.
        with untouched(target.pid):
            probe = stack.arm(f"{GETPPID} @ pid={target.pid}")
            target.ask("call 30")
            stack.exactly(probe.id, 30)
            stack.client.delete_probe(probe.id)


@contextmanager
def untouched_code(pid: int) -> Iterator[None]:
    assert breakpoints(pid) == []
    yield
    assert breakpoints(pid) == []


@needs.unprivileged
def test_a_process_that_the_tracer_may_not_trace(bystander: Bystander) -> None:
    """Agent and tracer of an ordinary user: root's processes are refused, the user's own are traced."""
    with Stack(user=AS_NOBODY) as stack, caller() as roots, caller(prefix=AS_NOBODY) as own:
        with untouched(roots.pid):
            problem = refused(stack, f"{GETPPID} @ pid={roots.pid}")
            assert (problem.status, problem.code, problem.reason) == (422, "permission-denied", "PermissionDenied"), (
                problem
            )
            assert "CAP_SYS_PTRACE" in f"{problem.detail} {problem.hint}"
            assert stack.client.probes() == []
            roots.ask("call 10")
        with untouched(own.pid):
            probe = stack.arm(f"{GETPPID} @ pid={own.pid}")
            own.ask("call 100")
            stack.exactly(probe.id, 100)
            stack.client.delete_probe(probe.id)
    bystander.check()


def test_a_name_that_is_taken(bystander: Bystander) -> None:
    stack = bystander.stack
    problem = refused(stack, f"libc.so.6:getpid @ pid={bystander.target.pid}", name="bystander")
    assert (problem.status, problem.code) == (409, "conflict")
    assert problem.errors[0]["pointer"] == "/name"
    bystander.check()


def test_a_wrong_token(bystander: Bystander) -> None:
    stack = bystander.stack
    for headers in ({}, {"Authorization": "Bearer tlp_" + "x" * 43}, {"Authorization": "Basic eDp5"}):
        for method, path in (
            ("GET", "/probes"),
            ("POST", "/probes"),
            ("DELETE", "/probes/bystander"),
            ("GET", "/hits"),
        ):
            response = httpx.request(method, f"{stack.url}/api/v1{path}", headers=headers, trust_env=False)
            problem = problem_of(response)
            assert (problem.status, problem.code) == (401, "unauthorized")
            assert response.headers["www-authenticate"].startswith("Bearer")
            assert problem.hint
    for path in ("/stream", "/agents/link"):
        with pytest.raises(InvalidStatus) as refusal, _socket(stack, path, token="tlp_" + "x" * 43):
            pass
        assert refusal.value.response.status_code == 401
    done = stack.cli("probe", "rm", "bystander", token="tlp_" + "x" * 43)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    bystander.check()


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"{", 422, "request-invalid"),
        (b"[]", 422, "request-invalid"),
        (b'{"probe": 7}', 422, "request-invalid"),
        (b'{"probe": ""}', 422, "request-invalid"),
        (b'{"probe": "libc.so.6:getppid", "colour": "red"}', 422, "request-invalid"),
        (b'{"probe": "libc.so.6:getppid", "ttl_s": -1}', 422, "request-invalid"),
        (b'{"probe": "\xff"}', 400, "request-invalid"),
        (b"\0" * 4096, 422, "request-invalid"),
        (b'{"probe": "' + b"x" * 2_000_000 + b'"}', 413, "content-too-large"),
    ],
    ids=lambda value: repr(value)[:40] if isinstance(value, bytes) else None,
)
def test_a_malformed_body(bystander: Bystander, body: bytes, status: int, code: str) -> None:
    response = bystander.stack.http.post("/probes", content=body, headers={"Content-Type": "application/json"})
    problem = Problem.model_validate_json(response.content)
    assert response.headers["content-type"] == "application/problem+json"
    assert (problem.status, problem.code) == (status, code)
    bystander.check()


def _socket(stack: Stack, path: str, token: str = "", protocol: str = "") -> Any:
    return websockets.sync.client.connect(
        f"ws://127.0.0.1:{stack.port}/api/v1{path}",
        additional_headers={"Authorization": f"Bearer {token or stack.token}"},
        subprotocols=[Subprotocol(protocol)] if protocol else None,
        proxy=None,
        compression=None,
    )


BAD_FRAMES: list[str | bytes] = [
    "",
    "{",
    "[]",
    "null",
    '{"type":"no-such"}',
    "\U0001f980" * 100,
    b"\0\1\2",
    b"TLH1" + b"\xff" * 64,
]


def test_malformed_frames_on_the_stream(bystander: Bystander) -> None:
    """Each is answered, and the subscription beside it goes on."""
    stack = bystander.stack
    with Subscription(stack, ["bystander"]) as stream:
        for frame in [
            *BAD_FRAMES,
            '{"type":"subscribe","id":"","topic":"hits"}',
            '{"type":"subscribe","id":"t","topic":"hits"}',
        ]:
            stream.socket.send(frame)
            answer = s.parse_server_message(stream.socket.recv(TIMEOUT_S))
            assert isinstance(answer, s.StreamError), frame
            assert answer.error["code"] in ("protocol-error", "conflict")
            assert answer.error["detail"]
        bystander.check()
        assert {hit.pid for hit in stream.take(20)} == {bystander.target.pid}


@pytest.mark.parametrize("frame", BAD_FRAMES, ids=lambda frame: repr(frame[:8]))
@pytest.mark.parametrize("after_hello", [False, True])
def test_malformed_frames_on_an_agent_s_link(bystander: Bystander, frame: str | bytes, after_hello: bool) -> None:
    """The link says why and is closed with 4400; the real agent's link is another one, and stays."""
    stack = bystander.stack
    with _socket(stack, "/agents/link") as link:
        if after_hello:
            facts = stack.client.host(stack.host).facts.model_copy(update={"name": "intruder"})
            link.send(m.encode(m.Hello(instance_id="hst_intruder", link_id="lnk_1", pid=1, facts=facts)))
            assert json.loads(link.recv(TIMEOUT_S))["type"] == "welcome"
        link.send(frame)
        said: list[dict[str, Any]] = []
        with pytest.raises(ConnectionClosed) as closed:
            said.extend(json.loads(answer) for answer in link)
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 4400
        assert (said[-1]["type"], said[-1]["error"]["code"]) == ("error", "protocol-error")
    assert stack.client.host(stack.host).online
    if after_hello:
        assert not stack.client.host("hst_intruder").online
    bystander.check()


def test_a_host_that_is_offline() -> None:
    """A probe for a host whose agent is away is refused, or with `allow_offline` waits for it."""
    with Stack() as stack, caller() as target, untouched(target.pid):
        stack.agent.signal(signal.SIGTERM)
        assert stack.agent.wait() == 0
        _until(lambda: not stack.client.host(stack.host).online, stack)
        problem = refused(stack, f"{GETPPID} @ pid={target.pid}")
        assert (problem.status, problem.code) == (503, "unavailable")
        assert stack.client.probes() == []
        for path in (f"/hosts/{stack.host}/modules", "/probes:resolve"):
            response = stack.http.post(path, json={"probe": GETPPID}) if ":" in path else stack.http.get(path)
            assert problem_of(response).code == "unavailable"
        waiting = stack.client.create_probe(f"{GETPPID} @ pid={target.pid}, host={HOST}", allow_offline=True)
        assert waiting.status.phase is Phase.PENDING
        assert breakpoints(target.pid) == []
        stack.start_agent()
        stack.armed(waiting.id, target.pid)
        target.ask("call 40")
        stack.exactly(waiting.id, 40)
        stack.client.delete_probe(waiting.id)


def _until(true: Callable[[], bool], stack: Stack) -> None:
    """Waits until something is so, by the stream's news of hosts."""
    with _socket(stack, "/stream", protocol=s.JSON_SUBPROTOCOL) as news:
        news.send(m.encode(s.Subscribe(id="h", topic="hosts")))
        while not true():
            news.recv(TIMEOUT_S)


def test_nothing_answers_there() -> None:
    env = {"TRAPLINE_URL": "http://127.0.0.1:1", "TRAPLINE_TOKEN": "tlp_" + "x" * 43, "TRAPLINE_STATE_DIR": os.devnull}
    done = children.run([*TRAPLINE, "probe", "list"], env=env)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "127.0.0.1:1" in done.stderr
