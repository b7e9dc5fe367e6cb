"""What fails in one place does not keep the rest from being done."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from pathlib import Path

import pytest

from tests.support import needs
from tests.support.children import TIMEOUT_S, Child, python
from trapline_agent.engines.base import Capabilities, ProcessId, SiteReport
from trapline_agent.engines.ring import HitRing
from trapline_agent.kernel import procfs
from trapline_agent.plans import FileKey, SitePlan
from trapline_agent.tracer import messages as m
from trapline_agent.tracer.hooks import MappingHook
from trapline_agent.tracer.launch import Command
from trapline_agent.tracer.looks import Looks
from trapline_agent.tracer.loop import Tracer
from trapline_agent.tracer.shipper import Shipper
from trapline_agent.tracer.table import Table

PLAN = SitePlan(site=0, file=FileKey("fd:01", 7), path="/x", offset=16, code=b"\x55")


def register(probe: str = "p") -> m.Register:
    return m.Register(id=1, probe=probe, generation=1, sites=["s"], plans=[PLAN])


class Engine:
    """Follows three processes, the first of which fails whatever is done to it."""

    floats = None

    def __init__(self) -> None:
        self.looked_at: list[int] = []
        self.closed = False

    def capabilities(self) -> Capabilities:
        return Capabilities("fails", True)

    def processes(self) -> list[ProcessId]:
        return [ProcessId(pid, 1) for pid in (1, 2, 3)]

    def reconcile(self, process: ProcessId, cause: str) -> None:
        self.looked_at.append(process.pid)
        if process.pid == 1:
            raise OSError(5, "odd")

    def close(self) -> None:
        self.closed = True
        raise RuntimeError("odd")


def test_a_look_at_all_goes_on_behind_one_that_fails(caplog: pytest.LogCaptureFixture) -> None:
    engine = Engine()
    Looks(engine).run(engine.processes, "scan")
    assert sorted(engine.looked_at) == [1, 2, 3]
    assert "process 1 could not be looked at" in caplog.text


@needs.ptrace
def test_all_is_taken_out_whatever_fails(tracer: Tracer, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine()
    monkeypatch.setattr(tracer, "_engine", engine)
    for probe in ("p", "q"):
        tracer._table.publish(register(probe), HitRing)
    ended, held = (Child(["/bin/cat"], ready=None) for _ in range(2))
    commands = [Command(child.pid, os.pidfd_open(child.pid)) for child in (ended, held)]
    try:
        ended.kill()
        tracer._commands = {c.pid: c for c in commands}
        tracer._take_all_out()
        assert held.wait() == -signal.SIGKILL
    finally:
        held.kill()
        for command in commands:
            os.close(command.pidfd)
    assert tracer._draining
    assert tracer._table.consumers == ()
    assert engine.closed


@needs.ptrace
def test_the_loop_goes_on_and_ends_in_good_order(tracer: Tracer, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("odd")

    done: list[str] = []
    monkeypatch.setattr(tracer, "_take_all_out", fail)
    monkeypatch.setattr(tracer, "_end_commands", lambda: done.append("commands"))
    tracer._post(fail)
    tracer._post(tracer._stop)
    tracer.run()
    assert done == ["commands"]
    assert not tracer._shipper._thread.is_alive()
    assert not Path("s").exists()


@needs.ptrace
def test_news_without_end_starve_nobody(tracer: Tracer) -> None:
    rounds = 0

    def again() -> None:
        nonlocal rounds
        rounds += 1
        tracer._post(again)

    tracer._lease_end = 0.0
    tracer._stay = False
    tracer._post(again)
    tracer.run()  # ends, since the lease does
    assert rounds == 1


def test_a_shipper_that_fails_says_so(caplog: pytest.LogCaptureFixture) -> None:
    failed = threading.Event()

    def drain() -> list[tuple[HitRing, int, bytes]]:
        raise RuntimeError("odd")

    shipper = Shipper(drain, failed.set)
    ours, theirs = socket.socketpair()
    with ours, theirs, caplog.at_level(logging.ERROR):
        shipper.connect(ours, m.Renew())
        assert failed.wait(TIMEOUT_S)
        shipper.close()
    assert "the tracer ends" in caplog.text


@needs.perf
def test_a_watch_that_fails_says_so() -> None:
    failed = threading.Event()

    def odd(file: FileKey) -> bool:
        raise RuntimeError("odd")

    hook = MappingHook(
        is_probed=odd,
        on_mapping=lambda pid: None,
        on_unknown=lambda mapped: None,
        on_lost=lambda: None,
        on_failure=failed.set,
    )
    assert hook.start()
    with python("print('ready', flush=True)"):
        assert failed.wait(TIMEOUT_S)
    hook.close()


def test_news_of_mappings_is_bounded_and_a_reply_is_not() -> None:
    sent: list[int] = []
    blocked, go = threading.Event(), threading.Event()

    def drain() -> list[tuple[HitRing, int, bytes]]:
        blocked.set()
        go.wait(TIMEOUT_S)
        return []

    shipper = Shipper(drain)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        shipper.connect(ours, m.Renew())
        assert blocked.wait(TIMEOUT_S)
        for _ in range(10_100):
            shipper.send(m.Mapped(pid=1, path="/x", file=PLAN.file))
        shipper.send(m.Done(id=7))
        sent.append(len(shipper._control))
        shipper.disconnect()
        go.set()
        shipper.close()
    assert sent == [10_001]


def test_a_target_that_refused_is_gone_when_its_process_is() -> None:
    table = Table()
    table.publish(register(), HitRing)
    with python("input()", ready=None) as child:
        identity = ProcessId(child.pid, procfs.start_time(child.pid))
        table.report(identity, [SiteReport(4096, PLAN, "refused", "TracedByOther", "it is")], "scan")
        table.mark_ended()
        ((_, targets),) = table.take_changes()
        assert [t.state for t in targets] == ["refused"]
        child.send("")
        child.wait()
    table.mark_ended()
    ((_, targets),) = table.take_changes()
    assert [t.state for t in targets] == ["gone"]
