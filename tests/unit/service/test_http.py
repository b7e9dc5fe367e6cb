"""What every answer has in common: who may ask, how it fails, what the schema says, and the dashboard's files."""

from __future__ import annotations

import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from pydantic import TypeAdapter, ValidationError

from tests.unit.service.peers import World
from trapline.errors import Conflict, TraplineError, Unavailable
from trapline.model import Problem
from trapline.protocol.stream import ServerMessage
from trapline_service import dashboard
from trapline_service.api.errors import STATUS
from trapline_service.auth import new_token
from trapline_service.config import Settings
from trapline_service.server import Server

PROTECTED = ["/me", "/hosts", "/hosts/x", "/hosts/x/processes", "/hosts/x/modules", "/symbols", "/probes", "/hits"]


@pytest.mark.parametrize("path", PROTECTED)
async def test_nothing_is_said_without_a_token(world: World, path: str) -> None:
    async with httpx.AsyncClient(base_url=f"{world.url}/api/v1", trust_env=False) as stranger:
        for headers in ({}, {"Authorization": f"Bearer {new_token()}"}):
            response = await stranger.get(path, headers=headers)
            assert response.status_code == 401
            assert response.headers["www-authenticate"].startswith("Bearer")
            assert response.headers["content-type"] == "application/problem+json"
            problem = Problem.model_validate(response.json())
            assert (problem.code, problem.status) == ("unauthorized", 401)
            assert "Authorization" in problem.hint


async def test_me(world: World) -> None:
    assert await world.get("/me") == {"name": "admin", "role": "admin"}


async def test_the_token_is_not_in_the_database(server: Server, settings: Settings) -> None:
    assert server.new_token
    for file in settings.state_dir.iterdir():
        assert server.new_token.encode() not in file.read_bytes()


async def test_a_given_token_replaces_the_stored_one(settings: Settings) -> None:
    async with Server(settings) as first:
        lost = first.new_token
    given = new_token()
    changed = Settings(port=0, state_dir=settings.state_dir, admin_token=given)  # type: ignore[arg-type]
    async with Server(changed) as second:
        assert second.new_token is None
        async with World(second.url, given) as world:
            assert (await world.get("/me"))["role"] == "admin"
            assert (await world.http.get("/me", headers={"Authorization": f"Bearer {lost}"})).status_code == 401


def test_a_weak_token_is_refused() -> None:
    with pytest.raises(ValidationError, match="at least 40"):
        Settings(admin_token="secret")  # type: ignore[arg-type]
    assert Settings(admin_token="").admin_token is None  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/probes/nothing", 404, "not-found"),
        ("DELETE", "/probes/nothing", 404, "not-found"),
        ("GET", "/probes/nothing/targets", 404, "not-found"),
        ("GET", "/hosts/nothing", 404, "not-found"),
        ("GET", "/symbols?host=nothing", 404, "not-found"),
        ("GET", "/weather", 404, "not-found"),
        ("PUT", "/probes", 405, "method-not-allowed"),
        ("GET", "/hits?limit=0", 422, "request-invalid"),
        ("GET", "/hosts?page_token=%FF", 422, "page-token-invalid"),
    ],
)
async def test_every_error_is_a_problem(world: World, method: str, path: str, status: int, code: str) -> None:
    response = await world.http.request(method, path)
    assert response.headers["content-type"] == "application/problem+json"
    problem = Problem.model_validate(response.json())
    assert (response.status_code, problem.status, problem.code) == (status, status, code)
    assert problem.detail
    assert problem.hint


async def test_broken_json_is_a_problem(world: World) -> None:
    response = await world.http.post("/probes", content=b'{"probe": ', headers={"content-type": "application/json"})
    assert (response.status_code, response.json()["code"]) == (422, "request-invalid")


async def test_a_body_is_bounded(world: World) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(40):
            yield b" " * 65536

    for content in (b" " * (2 << 20), chunks()):
        response = await world.http.post("/probes", content=content)
        assert (response.status_code, response.json()["code"]) == (413, "content-too-large")
        assert "1048576" in response.json()["detail"]


async def test_a_bug_is_a_problem_too(server: Server, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def bug() -> None:
        raise RuntimeError("secret detail")

    monkeypatch.setattr(server.service.fleet, "hosts", bug)
    response = await world.http.get("/hosts")
    assert (response.status_code, response.json()["code"]) == (500, "internal")
    assert "secret detail" not in response.text


def test_every_code_has_a_status() -> None:
    ours = {code for code, cls in TraplineError.registry.items() if cls.__module__.startswith("trapline")}
    assert ours - set(STATUS) == set()


async def test_health_needs_no_token(world: World) -> None:
    async with world.agent(), httpx.AsyncClient(base_url=world.url, trust_env=False) as anybody:
        assert (await anybody.get("/healthz")).json()["status"] == "ok"
        ready = (await anybody.get("/readyz")).json()
        assert (ready["status"], ready["hosts_online"], ready["unrecorded_hits"]) == ("ok", 1, 0)
        assert (await anybody.get("/openapi.json")).json()["openapi"].startswith("3.1")
        docs = await anybody.get("/docs")
        assert "POST /api/v1/probes" in docs.text
        assert "<script" not in docs.text


async def test_a_store_that_is_away_is_not_ready(server: Server, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    async def away() -> None:
        raise Unavailable("the database does not answer")

    monkeypatch.setattr(server.service.store, "ping", away)
    response = await world.http.get(f"{world.url}/readyz")
    assert (response.status_code, response.json()["code"]) == (503, "unavailable")


@pytest.fixture(scope="module")
def schema() -> Any:
    out = subprocess.run(
        [sys.executable, "-m", "trapline_service.openapi"], capture_output=True, check=True, timeout=60
    )
    return json.loads(out.stdout)


def test_the_schema_is_complete(schema: Any) -> None:
    ids = []
    for path, item in schema["paths"].items():
        for operation in item.values():
            ids.append(operation["operationId"])
            assert operation["tags"]
            assert operation["summary"]
            good = [c for s, r in operation["responses"].items() if s < "300" for c in r["content"].values()]
            assert all(c["schema"] for c in good)
            if path.startswith("/api/"):
                assert operation["security"] == [{"token": []}]
                assert list(operation["responses"]["401"]["content"]) == ["application/problem+json"]
    assert len(ids) == len(set(ids))
    assert schema["components"]["securitySchemes"]["token"]["scheme"] == "bearer"
    text = json.dumps(schema)
    for name in ("Problem", "Probe", "Hit", "Gap", "Subscribe", "HostResolution"):
        assert name in schema["components"]["schemas"]
    used = {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}
    assert used <= set(schema["components"]["schemas"])


def test_the_schema_declares_the_messages_of_the_sockets(schema: Any) -> None:
    server = schema["webhooks"]["stream-server"]["post"]["responses"]["200"]["content"]["application/json"]["schema"]
    declared = set(server["discriminator"]["mapping"])
    real = set(TypeAdapter(ServerMessage).json_schema()["discriminator"]["mapping"])
    assert declared == real
    client = schema["webhooks"]["stream-client"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert set(client["discriminator"]["mapping"]) == {"subscribe", "unsubscribe", "pause", "resume"}
    # What is sent always has all its fields, so a generated client need not test for them.
    assert "dropped_by_reason" in schema["components"]["schemas"]["ProbeStatus"]["required"]


@pytest.fixture
async def pages(tmp_path: Path) -> Any:
    static = tmp_path / "static"
    (static / "assets").mkdir(parents=True)
    (static / "index.html").write_text("<title>Trapline</title>")
    (static / "assets" / "app-1a2b.js").write_text("run()")
    (tmp_path / "secret.txt").write_text("no")
    app = FastAPI()
    app.add_middleware(dashboard.SecurityHeaders)
    dashboard.install(app, static)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        yield client


async def test_the_dashboards_files(pages: httpx.AsyncClient) -> None:
    for path in ("/", "/probes/prb_1", "/hosts"):
        page = await pages.get(path)
        assert (page.status_code, page.text) == (200, "<title>Trapline</title>")
        assert page.headers["cache-control"] == "no-cache"
        assert "default-src 'self'" in page.headers["content-security-policy"]
        assert page.headers["x-content-type-options"] == "nosniff"
        assert page.headers["referrer-policy"] == "no-referrer"
    script = await pages.get("/assets/app-1a2b.js")
    assert script.text == "run()"
    assert "immutable" in script.headers["cache-control"]
    assert script.headers["content-type"].startswith("text/javascript")


@pytest.mark.parametrize(
    "path", ["/assets/gone.js", "/favicon.ico", "/api/v1/none", "/..%2fsecret.txt", "/assets/..%2f..%2fsecret.txt"]
)
async def test_what_is_no_file_is_not_found(pages: httpx.AsyncClient, path: str) -> None:
    assert (await pages.get(path)).status_code == 404


async def test_a_dashboard_that_was_not_built_says_how(tmp_path: Path) -> None:
    app = FastAPI()
    dashboard.install(app, tmp_path / "static")
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        page = await client.get("/")
        assert page.status_code == 503
        assert "make web" in page.text


async def test_an_address_that_is_taken(settings: Settings) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        other = settings.model_copy(update={"port": taken.getsockname()[1]})
        with pytest.raises(Unavailable, match=r"cannot listen on 127\.0\.0\.1 port"):
            await Server(other).start()
    assert not settings.state_dir.joinpath("trapline.db-wal").exists()


async def test_a_database_of_another_release(settings: Settings) -> None:
    async with Server(settings):
        pass
    database = sqlite3.connect(settings.state_dir / "trapline.db")
    with database:
        database.execute("update schema_version set version = 99")
    database.close()
    with pytest.raises(Conflict, match="schema version 99"):
        await Server(settings).start()


async def test_a_state_directory_that_cannot_be_made(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Unavailable, match="cannot be opened") as refused:
        await Server(settings.model_copy(update={"state_dir": tmp_path / "file" / "x"})).start()
    assert "TRAPLINE_STATE_DIR" in refused.value.hint


async def test_starting_twice_keeps_the_token(settings: Settings) -> None:
    async with Server(settings) as first:
        token = first.new_token
        assert token
        async with World(first.url, token) as world:
            assert (await world.get("/me"))["name"] == "admin"
    async with Server(settings) as second:
        assert second.new_token is None
        async with World(second.url, token) as world:
            assert (await world.get("/me"))["name"] == "admin"


RUN = """
import ctypes, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: dies with the test
from pathlib import Path
from trapline_service.config import Settings
from trapline_service.server import run
run(Settings(port=0, state_dir=Path(sys.argv[1])), on_ready=lambda s: print(s.url, s.new_token, flush=True))
print("stopped", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_run_ends_in_good_order_on_a_signal(tmp_path: Path, number: signal.Signals) -> None:
    with subprocess.Popen([sys.executable, "-c", RUN, str(tmp_path)], stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout is not None
            url, token = child.stdout.readline().split()
            response = httpx.get(f"{url}/api/v1/me", headers={"Authorization": f"Bearer {token}"}, trust_env=False)
            assert response.status_code == 200
            assert "server" not in response.headers
            os.kill(child.pid, number)
            assert child.stdout.read() == "stopped\n"
            assert child.wait(20) == 0
        finally:
            child.kill()
