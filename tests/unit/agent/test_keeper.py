"""The keeper's own part: tracers that end, and ends that come at a bad moment."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.support import needs
from trapline.errors import Conflict, TraplineError, Unavailable
from trapline_agent.keeper import TracerKeeper
from trapline_agent.tracer.client import Event, TracerClient


class _Listener:
    def tracer_up(self, tracer: TracerClient) -> None:
        pass

    def tracer_lost(self, why: TraplineError) -> None:
        pass

    def handle(self, event: Event) -> None:
        pass


async def test_a_stop_ends_a_tracer_that_has_not_answered_yet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    keeper = TracerKeeper(host_id="hst_test", directory=tmp_path, log_file=tmp_path / "log")
    first = await keeper.start()
    connecting = asyncio.Event()
    connect = TracerClient.connect

    async def never_answers(socket: Path, process: subprocess.Popen[bytes] | None) -> TracerClient:
        if process is None:
            raise Unavailable("no earlier tracer")
        # It listens, so it is ready for signals; its answer does not come.
        await connect(socket, host="hst_test", process=keeper._process)
        connecting.set()
        await asyncio.get_running_loop().create_future()
        raise AssertionError

    monkeypatch.setattr(keeper, "_connect", never_answers)
    keeping = asyncio.create_task(keeper.keep(_Listener(), lambda batch: None))
    os.kill(first.ready.pid, signal.SIGKILL)  # it holds nothing
    async with asyncio.timeout(60):
        await connecting.wait()
        process = keeper._process
        assert process is not None
        assert process.pid != first.ready.pid
        await keeper.stop()
    assert process.poll() == 0
    keeping.cancel()


@needs.ptrace
async def test_an_agent_that_comes_back_goes_on_with_its_tracer(tmp_path: Path) -> None:
    first = TracerKeeper(host_id="hst_test", directory=tmp_path, log_file=tmp_path / "log")
    client = await first.start()
    with pytest.raises(Conflict, match="another agent"):
        await TracerKeeper(host_id="hst_test", directory=tmp_path).start()

    # As if it had been killed: the connection and the lock go with the process, nothing is said.
    await client.close()
    assert first._lock is not None
    os.close(first._lock)
    second = TracerKeeper(host_id="hst_test", directory=tmp_path)
    assert (await second.start()).ready.source == client.ready.source
    await second.client.shutdown()  # type: ignore[union-attr] # it was just started
    assert first._process is not None
    assert first._process.wait(10) == 0
