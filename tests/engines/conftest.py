from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.engines.host import Host
from trapline_agent.engines.ptrace.engine import PtraceEngine

ENGINES = {"ptrace": PtraceEngine}


@pytest.fixture(params=list(ENGINES))
def host(request: pytest.FixtureRequest) -> Iterator[Host]:
    """The contract suite runs once over every engine."""
    host = Host(ENGINES[request.param])
    try:
        yield host
    finally:
        host.close()
