"""Fixtures: the built dashboard, a real service, an agent that speaks the real protocol, and a real Chromium."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import pytest_asyncio
from playwright.async_api import Browser, ConsoleMessage, Page, Request, async_playwright, expect

import hatch_build
from tests.support import needs
from tests.unit.service.peers import World
from tests.web.host import Host, linked
from trapline_service.config import Settings
from trapline_service.server import Server

WAIT_MS = 15_000
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="session")
def built() -> None:
    """The dashboard as it is in the working tree."""
    hatch_build.build(Path(hatch_build.__file__).parent)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncIterator[Browser]:
    expect.set_options(timeout=WAIT_MS)
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=needs.chromium_program(), args=FLAGS)
        yield browser
        await browser.close()


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(port=0, state_dir=tmp_path / "state", request_timeout_s=5)


@pytest_asyncio.fixture(loop_scope="module")
async def server(built: None, settings: Settings) -> AsyncIterator[Server]:
    async with Server(settings) as server:
        yield server


@pytest_asyncio.fixture(loop_scope="module")
async def world(server: Server) -> AsyncIterator[World]:
    assert server.new_token
    async with World(server.url, server.new_token) as world:
        yield world


@pytest_asyncio.fixture(loop_scope="module")
async def host(world: World) -> AsyncIterator[Host]:
    """A host with a few processes, whose agent answers as if they mapped a small library."""
    async with linked(world) as host:
        yield host


@pytest_asyncio.fixture(loop_scope="module")
async def page(browser: Browser, world: World) -> AsyncIterator[Page]:
    """A tab that has loaded nothing yet. Whatever it does, it may not fail in its own code, nor ask anyone else."""
    faults: list[str] = []

    def console(message: ConsoleMessage) -> None:
        # What the network says is the test's matter: a wrong token, a service that is away.
        if message.type == "error" and not any(
            s in message.text for s in ("Failed to load resource", "WebSocket connection")
        ):
            faults.append(message.text)

    def request(asked: Request) -> None:
        if urlsplit(asked.url).netloc != urlsplit(world.url).netloc:
            faults.append(f"asks {asked.url}")

    context = await browser.new_context(viewport={"width": 1280, "height": 800})
    context.set_default_timeout(WAIT_MS)
    page = await context.new_page()
    page.on("console", console)
    page.on("request", request)
    page.on("pageerror", lambda e: faults.append(str(e)))
    yield page
    await context.close()
    assert faults == []


@pytest_asyncio.fixture(loop_scope="module")
async def home(page: Page, world: World, host: Host) -> Page:
    """The dashboard, signed in and live, with one host."""
    await page.goto(f"{world.url}/#token={world.token}")
    await expect(page.get_by_test_id("link-state")).to_have_text("Live")
    await expect(page.get_by_test_id("fact-hosts")).to_contain_text("1")
    return page
