"""Taking everything out, while something hangs (semantics R6, S1)."""

from __future__ import annotations

import threading
import time

import pytest

from tests.engines.host import Host
from tests.support.children import TIMEOUT_S
from tests.support.targets import Targets
from trapline_agent.engines.ptrace.engine import PtraceEngine


def test_r6_a_process_that_hangs_keeps_no_other_from_being_let_go(
    host: Host, targets: Targets, caplog: pytest.LogCaptureFixture
) -> None:
    plan = host.files.plan(targets.build("hot"), "target_hot")
    engine = host.engine
    assert isinstance(engine, PtraceEngine)
    with targets.run("hot", "1") as hung, targets.run("hot", "1") as fine:
        host.register(plan)
        entered, go = threading.Event(), threading.Event()

        def hang() -> None:
            entered.set()
            go.wait(TIMEOUT_S)

        stuck = threading.Thread(target=lambda: engine._threads[hung.pid].call(hang))
        stuck.start()
        assert entered.wait(TIMEOUT_S)
        host.table.withdraw("p")
        started = time.monotonic()
        with host.untouched(fine.pid):
            engine.close(patience_s=0.5)
        assert time.monotonic() - started < TIMEOUT_S
        assert f"processes [{hung.pid}] could not be let go" in caplog.text
        go.set()
        stuck.join()
        with host.untouched(hung.pid):
            engine.close()
        for child in (hung, fine):
            child.ask("call 5")


def test_r6_two_looks_at_processes_that_share_memory_follow_them_together(host: Host, targets: Targets) -> None:
    """As many looks at once as there are children of every kind, all of which map the file."""
    plan = host.files.plan(targets.build("forks"), "target_forks")
    children = [targets.start("forks") for _ in range(8)]
    try:
        for child in children:
            child.ask("storm")
        for cycle in range(10):
            host.register(plan, probe=f"p{cycle}")
            host.unregister(f"p{cycle}")
        for child in children:
            child.ask("calm")
            assert child.count()["failed"] == 0, "a child died"
        host.engine.close()
        for child in children:
            assert host.altered(child.pid) == {}
    finally:
        for child in children:
            child.kill()
