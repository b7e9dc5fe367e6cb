"""Fixtures: a real server on a free port, with a database of its own."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.unit.service.peers import World
from trapline_service.config import Settings
from trapline_service.server import Server


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(port=0, state_dir=tmp_path / "state", request_timeout_s=5)


@pytest.fixture
async def server(settings: Settings) -> AsyncIterator[Server]:
    async with Server(settings) as server:
        yield server


@pytest.fixture
async def world(server: Server) -> AsyncIterator[World]:
    assert server.new_token
    async with World(server.url, server.new_token) as world:
        yield world
