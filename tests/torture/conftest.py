"""Storms: the same rules as in tests/engines, many times, under load, with failures that are put in on purpose."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.engines.host import Host
from tests.support.children import ChildDied
from tests.torture.scale import Torture
from trapline_agent.engines.ptrace.engine import PtraceEngine

ENGINES = {"ptrace": PtraceEngine}
_ROWS = pytest.StashKey[list[str]]()
_TORTURE = pytest.StashKey[Torture]()


@pytest.fixture(params=list(ENGINES))
def host(request: pytest.FixtureRequest) -> Iterator[Host]:
    """Every engine is tortured."""
    host = Host(ENGINES[request.param])
    try:
        yield host
    finally:
        host.close()


@pytest.fixture
def torture(request: pytest.FixtureRequest) -> Iterator[Torture]:
    """The test's cycles; its row in the summary."""
    config = request.config
    reporter = config.pluginmanager.getplugin("terminalreporter")
    capture = config.pluginmanager.getplugin("capturemanager")

    def show(line: str) -> None:
        with capture.global_and_fixture_disabled():
            reporter.write_line(line)

    item = Torture(request.node.name, show)
    request.node.stash[_TORTURE] = item
    yield item
    config.stash.setdefault(_ROWS, []).append(item.row())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    if call.excinfo is not None and call.excinfo.errisinstance(ChildDied) and _TORTURE in item.stash:
        item.stash[_TORTURE].deaths += 1
    return (yield)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if rows := config.stash.get(_ROWS, []):
        terminalreporter.section("torture")
        terminalreporter.write_line(f"{'':64} {'cycles':>13} {'deaths':>6} {'slowest':>12}    took")
        for row in rows:
            terminalreporter.write_line(row)
