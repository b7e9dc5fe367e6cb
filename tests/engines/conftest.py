from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.engines.host import ENGINES, Host, host_over
from tests.support import needs
from tests.support.targets import Targets
from tests.support.world import SimulatedTargets
from trapline_agent.engines.fake import FakeEngine

_REAL = [needs.gcc, needs.ptrace_any, needs.x86_64]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The contract suite runs once over every engine; what is marked ``traps`` over those that say that they do. What could
    harm a program is tried with either kind of slots."""
    if "host" in metafunc.fixturenames:
        only_traps = metafunc.definition.get_closest_marker("traps") is not None
        names = [n for n, engine in ENGINES.items() if engine.traps or not only_traps]
        if metafunc.module.__name__.rpartition(".")[2] != "test_contract":
            names = ["ptrace", "mapped-slots"] if metafunc.module.__name__.endswith(".test_harm") else ["ptrace"]
        engines = [pytest.param(n, marks=() if n == "fake" else _REAL) for n in names]
        metafunc.parametrize("host", engines, indirect=True)


@pytest.fixture
def host(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    with host_over(request.param, monkeypatch) as host:
        yield host


@pytest.fixture
def targets(request: pytest.FixtureRequest, targets: Targets) -> Targets | SimulatedTargets:
    """The programs; for an engine of simulated processes, their likenesses."""
    if "host" in request.fixturenames:
        engine = request.getfixturevalue("host").engine
        if isinstance(engine, FakeEngine):
            return SimulatedTargets(engine.world)
    return targets
