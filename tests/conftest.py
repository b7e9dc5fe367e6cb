"""Fixtures of all tests. What a test needs of the machine is said with ``tests.support.needs``."""

from __future__ import annotations

import pytest

from tests.support import needs
from tests.support.targets import Targets


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "needs(name): what the test needs of the machine; see tests/support/needs.py")
    config.addinivalue_line("markers", "slack: about slots in a file's own unused bytes")
    config.addinivalue_line("markers", "traps: about the mechanics of traps; for engines that have them")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    needs.enforce(item)


@pytest.fixture(scope="session")
def targets(tmp_path_factory: pytest.TempPathFactory) -> Targets:
    """Builds and starts the programs of tests/targets. The test also says ``@needs.gcc``."""
    return Targets(tmp_path_factory.mktemp("targets"))
