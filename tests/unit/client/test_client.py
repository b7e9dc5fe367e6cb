"""Both clients against real servers on loopback: HTTP by http.server, the stream by websockets."""

from __future__ import annotations

import asyncio
import inspect
import json
import socket
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from websockets.sync.server import ServerConnection, serve

from tests.unit.agent.batches import batch
from trapline import client as client_module
from trapline.client import AsyncClient, Client, Gap
from trapline.errors import AuthError, NotFound, ProtocolError, SpecError, TraplineError, Unavailable
from trapline.model import Hit, Phase, Point, PointKind, Probe, ProbeSpec, Problem
from trapline.protocol import stream as s
from trapline.state import Access, write_access

Answer = tuple[int, Any]


def probe(phase: Phase = Phase.PENDING) -> dict[str, Any]:
    spec = ProbeSpec(text="app:f", object="app", point=Point(kind=PointKind.SYMBOL, value="f"))
    made = Probe(id="prb_a", name="f", created_at=datetime.now(UTC), spec=spec)
    made.status.phase = phase
    return made.model_dump(mode="json")


class Api:
    """An HTTP server that gives scripted answers, and remembers what it was asked."""

    def __init__(self) -> None:
        self.answers: list[Answer] = []
        self.asked: list[tuple[str, str, dict[str, str], Any]] = []
        self.tokens: list[str | None] = []
        api = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _serve(self) -> None:
                url = urlsplit(self.path)
                length = int(self.headers.get("Content-Length", 0))
                body = json.loads(self.rfile.read(length)) if length else None
                query = {k: v[0] for k, v in parse_qs(url.query).items()}
                api.asked.append((self.command, unquote(url.path), query, body))
                api.tokens.append(self.headers.get("Authorization"))
                status, answer = api.answers.pop(0)
                content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = do_DELETE = _serve

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def api() -> Iterator[Api]:
    one = Api()
    yield one
    one.close()


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRAPLINE_STATE_DIR", str(tmp_path))
    monkeypatch.delenv("TRAPLINE_URL", raising=False)
    monkeypatch.delenv("TRAPLINE_TOKEN", raising=False)
    # A proxy of the environment must not come between this machine and itself.
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")


Ask = Callable[..., Any]


@pytest.fixture(params=["sync", "async"])
def ask(request: pytest.FixtureRequest, api: Api) -> Ask:
    """Calls a method of either client by name."""

    def sync(method: str, *args: object, **kwargs: object) -> Any:
        with Client(api.url, "tlp_t") as client:
            return getattr(client, method)(*args, **kwargs)

    def run_async(method: str, *args: object, **kwargs: object) -> Any:
        async def call() -> Any:
            async with AsyncClient(api.url, "tlp_t") as client:
                return await getattr(client, method)(*args, **kwargs)

        return asyncio.run(call())

    return sync if request.param == "sync" else run_async


def test_both_clients_have_the_same_methods() -> None:
    def methods(cls: type) -> dict[str, list[str]]:
        return {
            name: list(inspect.signature(f).parameters)
            for name, f in inspect.getmembers(cls, inspect.isfunction)
            if not name.startswith("_")
        }

    assert methods(Client) == methods(AsyncClient)


def test_lists_are_read_to_their_last_page(api: Api, ask: Ask) -> None:
    api.answers = [(200, {"items": [probe()], "next_page_token": "next/2"}), (200, {"items": [probe()]})]
    assert [p.id for p in ask("probes")] == ["prb_a", "prb_a"]
    assert [a[:3] for a in api.asked] == [
        ("GET", "/api/v1/probes", {}),
        ("GET", "/api/v1/probes", {"page_token": "next/2"}),
    ]
    assert set(api.tokens) == {"Bearer tlp_t"}


def test_a_created_probe_is_sent_whole(api: Api, ask: Ask) -> None:
    api.answers = [(201, probe())]
    assert ask("create_probe", "app:f", name="n", ttl_s=None, max_hits=3, overhead=0.5, labels={"a": "b"}).name == "f"
    method, path, _, body = api.asked[0]
    assert (method, path) == ("POST", "/api/v1/probes")
    assert body == {
        "probe": "app:f",
        "name": "n",
        "ttl_s": None,
        "labels": {"a": "b"},
        "limits": {"max_hits": 3, "overhead": 0.5},
        "allow_offline": False,
    }


def test_wait_asks_until_the_hosts_have_said_how_it_went(api: Api, ask: Ask) -> None:
    api.answers = [(200, probe(Phase.PENDING)), (200, probe(Phase.RESOLVING)), (200, probe(Phase.ARMED))]
    assert ask("wait", "prb_a").status.phase is Phase.ARMED
    assert len(api.asked) == 3


def test_wait_gives_up_and_says_so(api: Api, ask: Ask) -> None:
    api.answers = [(200, probe())]
    with pytest.raises(Unavailable, match="still Pending"):
        ask("wait", "prb_a", timeout=0.0)


def test_delete_waits_until_the_probe_is_gone(api: Api, ask: Ask) -> None:
    gone = Problem(title="not found", status=404, code="not-found", detail="no probe prb_a").model_dump()
    api.answers = [(202, probe(Phase.DELETING)), (200, probe(Phase.DELETING)), (404, gone)]
    assert ask("delete_probe", "my probe/1").id == "prb_a"
    assert [a[:2] for a in api.asked] == [
        ("DELETE", "/api/v1/probes/my probe/1"),
        ("GET", "/api/v1/probes/prb_a"),
        ("GET", "/api/v1/probes/prb_a"),
    ]


def test_delete_without_waiting_asks_once(api: Api, ask: Ask) -> None:
    api.answers = [(202, probe(Phase.DELETING))]
    assert ask("delete_probe", "f", wait=False).status.phase is Phase.DELETING


def test_a_problem_becomes_the_error_it_was(api: Api, ask: Ask) -> None:
    problem = Problem(
        title="invalid probe",
        status=422,
        code="spec-invalid",
        reason="BadPoint",
        detail="no function is named here",
        hint="write OBJECT:SYMBOL",
        suggestions=["f"],
        caret="app:\n    ^",
        errors=[{"pointer": "/probe"}],
    )
    api.answers = [(422, problem.model_dump())]
    with pytest.raises(SpecError) as caught:
        ask("create_probe", "app:")
    error = caught.value
    assert (error.reason, error.pointer, error.suggestions) == ("BadPoint", "/probe", ["f"])
    assert error.caret() == "app:\n    ^"
    assert str(error) == "no function is named here; did you mean `f`?; write OBJECT:SYMBOL"


@pytest.mark.parametrize(
    ("status", "content", "error"),
    [
        (502, b"<html>bad gateway", ProtocolError),
        (401, b"", AuthError),
        (200, b"<html>hello", ProtocolError),
        (200, b"[]", ProtocolError),
        (200, b'{"items": [{"id": 3}]}', ProtocolError),
        (418, b'{"title": "teapot", "status": 418, "code": "of-a-newer-release"}', TraplineError),
    ],
)
def test_whatever_answers_there_is_an_error_that_says_so(
    api: Api, ask: Ask, status: int, content: bytes, error: type[TraplineError]
) -> None:
    api.answers = [(status, content)]
    with pytest.raises(error):
        ask("probes")


@pytest.mark.parametrize("cls", [Client, AsyncClient])
def test_nobody_there(cls: type[Client] | type[AsyncClient]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"

    def ask() -> object:
        hosts = cls(url).hosts()
        return asyncio.run(hosts) if inspect.iscoroutine(hosts) else hosts

    with pytest.raises(Unavailable, match="no service answers") as caught:
        ask()
    assert "trapline up" in caught.value.hint


def test_the_services_own_token_is_not_given_to_another(api: Api, tmp_path: Path) -> None:
    write_access(tmp_path, Access(api.url, "tlp_local"))
    api.answers = [(200, {"items": []})]
    with Client() as client:
        client.hosts()
    assert api.tokens == ["Bearer tlp_local"]
    with Client("http://127.0.0.1:1") as client:
        assert client._headers == {}


# --- the stream ------------------------------------------------------------------------------------------------------


class Stream:
    """A service's end of the stream: sends frames to whoever subscribes, then closes."""

    def __init__(self, frames: list[str | bytes]) -> None:
        self.frames = frames
        self.asked: list[s.Subscribe] = []
        self._server = serve(
            self._serve, "127.0.0.1", 0, subprotocols=[client_module.Subprotocol(s.BINARY_SUBPROTOCOL)]
        )
        self.url = f"http://127.0.0.1:{self._server.socket.getsockname()[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def _serve(self, connection: ServerConnection) -> None:
        message = s.parse_client_message(connection.recv())
        assert isinstance(message, s.Subscribe)
        self.asked.append(message)
        for frame in self.frames:
            connection.send(frame)

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()


def _collect(url: str, kind: str, count: int, **kwargs: Any) -> list[Hit | Gap]:
    if kind == "sync":
        with Client(url, "tlp_t") as client:
            stream = client.stream(**kwargs)
            return [next(stream) for _ in range(count)]

    async def read() -> list[Hit | Gap]:
        async with AsyncClient(url, "tlp_t") as client:
            stream = client.stream(**kwargs)
            return [await anext(stream) for _ in range(count)]

    return asyncio.run(read())


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_the_stream_yields_hits_and_gaps_in_order(kind: str) -> None:
    gap = s.Gap(id="hits", probe="prb_a", host="hst_a", count=5, stage="subscriber-queue")
    prefix = (7).to_bytes(8, "little")
    stream = Stream(
        [
            s.Subscribed(id="hits", number=7).model_dump_json(),
            prefix + batch(seq=0, count=2),
            gap.model_dump_json(),
            prefix + batch(seq=7, count=1),
        ]
    )
    try:
        items = _collect(stream.url, kind, 4, probes=["prb_a"])
    finally:
        stream.close()
    assert stream.asked[0].filter == s.StreamFilter(probes=["prb_a"], hosts=None)
    assert items[2] == gap
    assert [(h.seq, h.args) for h in items if isinstance(h, Hit)] == [(0, {"n": 0}), (1, {"n": 1}), (7, {"n": 7})]


@pytest.mark.parametrize("kind", ["sync", "async"])
@pytest.mark.parametrize(
    ("frame", "error"),
    [
        (s.StreamError(error=NotFound("no probe x").to_wire()).model_dump_json(), NotFound),
        (s.Bye(reason="the service stops").model_dump_json(), Unavailable),
        (b"short", ProtocolError),
        ("{}", ProtocolError),
        (None, Unavailable),
    ],
)
def test_the_end_of_a_stream_is_an_error_that_says_why(
    kind: str, frame: str | bytes | None, error: type[TraplineError]
) -> None:
    stream = Stream([] if frame is None else [frame])
    try:
        with pytest.raises(error):
            _collect(stream.url, kind, 1)
    finally:
        stream.close()
