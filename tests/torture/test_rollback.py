"""A register that fails half-way, for whatever reason, is rolled back everywhere by the way that any probe goes out (R5)."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from pathlib import Path

import pytest

from tests.engines.host import Files, altered_bytes, mapped_files
from tests.engines.test_tracer import connected
from tests.support import needs
from tests.support.children import Child
from tests.support.targets import Targets
from tests.torture.scale import Torture, size
from trapline.errors import EngineError
from trapline.protocol.hits import decode
from trapline_agent.kernel import procfs

pytestmark = [needs.gcc, needs.ptrace_any, needs.x86_64]

TRACER = """
import os
from trapline_agent.engines.ptrace.engine import PtraceEngine
from trapline_agent.tracer.__main__ import main

real, looks, fails = PtraceEngine.reconcile, 0, int(os.environ["FAILS"])

def reconcile(self, process, cause):
    global looks
    looks += cause == "scan"
    if cause == "scan" and looks == fails:
        raise RuntimeError("put in by the test")
    real(self, process, cause)

PtraceEngine.reconcile = reconcile
main()
"""
"""A tracer that fails at the process of a number, once."""
PROCESSES = 3


async def test_r5_a_register_that_fails_at_the_kth_process_leaves_no_byte_anywhere(
    targets: Targets, torture: Torture
) -> None:
    program = targets.build("forks")
    plan = Files().plan(program, "target_forks")
    for _ in torture.cycles(1, 50):
        for fails in range(1, PROCESSES + 1):
            with contextlib.ExitStack() as running:
                children = [running.enter_context(targets.run("forks")) for _ in range(PROCESSES)]
                directory = running.enter_context(tempfile.TemporaryDirectory(prefix="trapline-test-"))
                path = Path(directory) / "tracer.sock"
                argv = [sys.executable, "-c", TRACER, "--socket", path]
                process = running.enter_context(Child(argv, ready=None, env={"FAILS": str(fails)}, session=True))
                children[0].ask("storm")  # it forks before, while and after it is rolled back
                async with connected(path, process) as client:
                    with pytest.raises(EngineError, match="put in by the test"):
                        await client.register("p", generation=1, sites=["s"], plans=[plan])
                    for child in children:
                        assert_clean(child, program)
                    for _ in range(size(3, 20)):
                        for child in children:
                            child.ask("call 1")
                    children[0].ask("calm")
                    for child in children:
                        assert child.count()["failed"] == 0, "a child died"
                        held = int(child.ask("hold 1").split()[-1])
                        assert altered_bytes(held, [program]) == {}
                        assert procfs.tracer(held) == 0
                        child.ask("go")
                    await client.register("again", generation=1, sites=["s"], plans=[plan])
                    for child in children:
                        child.ask("call 5")
                    await client.unregister("again")
                    arrived = [client._events.get_nowait() for _ in range(client._events.qsize())]
                    batches = [decode(event).header for event in arrived if isinstance(event, bytes)]
                    assert sum(b.count for b in batches if b.probe == "again") == 5 * PROCESSES
                for child in children:
                    assert child.count()["failed"] == 0


def assert_clean(child: Child, program: Path) -> None:
    """Asserts that no breakpoint is in a process now, and waits until nothing at all is and nobody traces it."""
    assert 0xCC not in {now for _, now in altered_bytes(child.pid, [program]).values()}
    while any(procfs.tracer(tid) for tid in procfs.tasks(child.pid)):
        child.ask("call 1")
    assert altered_bytes(child.pid, mapped_files(child.pid)) == {}
