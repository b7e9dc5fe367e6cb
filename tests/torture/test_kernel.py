"""The same program, once under the kernel's uprobes and once under ours: both count what the program itself counted.

One after the other, never both on one instruction (R17).
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.engines.host import Host, altered_bytes
from tests.support import needs
from tests.support.children import Child
from tests.support.targets import Targets
from tests.support.uprobe import kernel_count
from tests.torture.scale import Torture, size

pytestmark = [needs.gcc, needs.uprobe, needs.ptrace_any, needs.x86_64]


def hot(child: Child) -> None:
    child.ask(f"call {size(2000, 200_000)}")
    for _ in range(3):
        child.ask("start")
        child.ask("spawn 2")
        child.ask("stop")


def forks(child: Child) -> None:
    for kind in ("fork", "vfork", "spawn", "clone", "thread", "call"):
        child.ask(f"{kind} 50")
    child.ask("storm")
    while child.count()["children"] < size(100, 2000):
        pass
    child.ask("calm")


def execs(child: Child) -> None:
    for storm in ("storm", "storm-thread"):
        child.send(f"{storm} {size(30, 1000)}")
        child.wait_for("ready", timeout=120)


@pytest.mark.parametrize("work", [hot, forks, execs])
def test_counts_are_the_kernel_s(host: Host, targets: Targets, torture: Torture, work: Callable[[Child], None]) -> None:
    name = work.__name__
    program = targets.build(name)
    plan = host.files.plan(program, f"target_{name}")
    for cycle in torture.cycles(2, 20):
        with kernel_count(program, plan.offset) as kernel, targets.run(name) as child:
            work(child)
            assert kernel() == child.count()["done"] > 0
        with targets.run(name) as child:
            probe = host.register(plan, probe=f"p{cycle}")
            work(child)
            assert probe.hits == child.count()["done"] > 0
            probe.unregister()


def test_r17_an_instruction_that_the_kernel_probes_is_refused(host: Host, targets: Targets) -> None:
    program = targets.build("hot")
    plan = host.files.plan(program, "target_hot")
    with targets.run("hot", "1") as child:
        with kernel_count(program, plan.offset) as kernel:
            probe = host.register(plan, pid=child.pid)
            assert [(t.state, t.reason) for t in probe.targets] == [("refused", "BreakpointPresent")]
            child.ask("call 50")
            assert (kernel(), probe.hits) == (50, 0)
        host.reconcile(child.pid)
        assert probe.states() == {"armed": 1}
        child.ask("call 50")
        assert probe.hits == 50
        probe.unregister()
        host.engine.close()
        assert altered_bytes(child.pid, [program]) == {}
        assert child.count()["wrong"] == 0
