from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from trapline_agent.tracer.loop import Tracer


@pytest.fixture
def tracer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Tracer]:
    monkeypatch.chdir(tmp_path)  # a Unix socket's path is short
    before = signal.getsignal(signal.SIGUSR1)
    tracer = Tracer(Path("s"), stay=True)
    handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    yield tracer
    tracer._shipper.close()
    tracer._server.close()
    signal.set_wakeup_fd(-1)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    signal.signal(signal.SIGUSR1, before)
