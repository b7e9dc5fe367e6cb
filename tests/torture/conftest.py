"""Storms: the same rules as in tests/engines, many times, under load, with failures that are put in on purpose."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.engines.host import Host, host_over
from tests.support.children import ChildDied
from tests.torture.scale import Torture

_ROWS = pytest.StashKey[list[str]]()
_TORTURE = pytest.StashKey[Torture]()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every engine is tortured; what is marked ``slack`` where files have room behind their code."""
    if "host" in metafunc.fixturenames:
        only_slack = metafunc.definition.get_closest_marker("slack") is not None
        metafunc.parametrize("host", ["ptrace"] if only_slack else ["ptrace", "mapped-slots"], indirect=True)


@pytest.fixture
def host(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    with host_over(request.param, monkeypatch) as host:
        yield host


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
