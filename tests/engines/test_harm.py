"""What a review of the engines found could harm a target, or hang: each once, so that it does not come back."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence

import pytest

from tests.engines.host import Host, altered_bytes
from tests.support import needs
from tests.support.children import Child
from tests.support.targets import Targets
from trapline_agent.kernel import procfs, ptrace

pytestmark = [needs.gcc, needs.ptrace_any, needs.x86_64]


def test_a_child_that_was_let_go_and_lives_on_does_not_hold_up_the_end(host: Host, targets: Targets) -> None:
    program = targets.build("forks")
    with targets.run("forks") as child:
        for cycle in range(10):
            host.register(host.files.plan(program, "target_forks"), probe=f"p{cycle}", pid=child.pid)
            child.ask("hold 2")
            host.unregister(f"p{cycle}")
            host.engine.close()
            child.ask("go")
        assert child.count()["failed"] == 0
        assert altered_bytes(child.pid, [program]) == {}


def test_a_process_that_is_to_join_and_was_born_to_us_meanwhile(host: Host, targets: Targets) -> None:
    """A look saw it share its parent's memory; when the tracer thread comes to it, it is followed, and has its own."""
    program = targets.build("forks")
    with targets.run("forks") as child:
        probe = host.register(host.files.plan(program, "target_forks"), tree=child.pid)
        other = int(child.ask("hold 5").split()[-1])
        while other not in (t.pid for t in probe.targets if t.state == "armed"):
            pass  # it stands still at its birth
        thread = host.engine._threads[other]
        thread.call(lambda: thread.commands.join_process(other, child.pid))
        probe.unregister()
        assert 0xCC not in {now for _, now in altered_bytes(other, [program]).values()}
        child.ask("go")
        assert child.count()["failed"] == 0


def test_kernel_threads_share_no_memory_with_one_that_ends(
    host: Host, targets: Targets, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who has none has the same as they: kcmp(2) says so when a leader ends between two calls."""
    real, asked = ptrace.sharers, []

    def sharers(asker: int, others: Sequence[int]) -> tuple[list[int], list[int]]:
        sharing, unknown = real(asker, others)
        without = [pid for pid in others if not procfs.has_memory(pid)]
        asked.append(bool(without))
        return (sharing + without if asked.count(True) == 1 else sharing), unknown

    monkeypatch.setattr(ptrace, "sharers", sharers)
    # This process stands for a kernel thread: in a PID namespace there are none.
    monkeypatch.setattr(procfs, "has_memory", lambda pid: pid != os.getpid())
    with targets.run("hot", "1") as child:
        probe = host.register(host.files.plan(targets.build("hot"), "target_hot"), pid=child.pid)
        child.ask("call 5")
        assert asked.count(True) > 1
        assert probe.hits == 5


def test_bytes_come_out_of_a_process_that_hides_itself(host: Host, targets: Targets) -> None:
    program = targets.build("odd")
    with targets.run("odd") as child, targets.run("odd") as other:
        probe = host.register(host.files.plan(program, "target_odd"))
        for c in (child, other):
            c.ask("call 3")
        child.ask("undumpable")
        probe.unregister()
        host.engine.close()
        for c in (child, other):
            c.ask("call 3")
            assert c.count()["wrong"] == 0
        assert probe.hits == 6


def test_a_process_whose_leader_has_ended(host: Host, targets: Targets) -> None:
    program = targets.build("odd")
    with targets.run("odd", "no-leader") as child:
        probe = host.register(host.files.plan(program, "target_odd"), pid=child.pid)
        assert probe.states() == {"armed": 1}
        child.ask("call 20")
        assert probe.hits == 20
        probe.unregister()
        host.engine.close()
        child.ask("call 5")
        assert (probe.hits, child.count()["calls"]) == (20, 25)


def test_a_handler_that_jumps_away_from_a_faulting_instruction(host: Host, targets: Targets) -> None:
    program = targets.build("odd")
    with targets.run("odd") as child:
        probe = host.register(host.files.plan(program, "target_fault"), pid=child.pid)
        child.ask("fault 50")
        count = child.count()
        assert (probe.hits, count["faults"], count["wrong"]) == (50, 50, 0)


def test_r18_text_that_moved_to_other_memory_takes_no_byte_along(host: Host, targets: Targets) -> None:
    program = targets.build("odd")
    with targets.run("odd") as child:
        probe = host.register(host.files.plan(program, "target_moved"), pid=child.pid)
        child.ask("moved 4")
        child.ask("move")
        probe.unregister()
        host.engine.close()
        child.ask("moved 4")
        assert (probe.hits, child.count()["wrong"]) == (4, 0)


def test_p10_every_thread_gets_its_turn(host: Host, targets: Targets) -> None:
    program = targets.build("hot")
    with targets.run("hot", "8") as child:
        probe = host.register(host.files.plan(program, "target_hot"), pid=child.pid)
        child.ask("start")
        while probe.hits < 20_000:
            pass
        child.ask("stop")
        share: Counter[int] = Counter()
        for batch in probe.batches():
            share.update(batch.columns["tid"].tolist())
        assert len(share) == 8
        assert min(share.values()) > max(share.values()) / 20
        probe.unregister()


@needs.gdb
def test_a_refused_process_costs_no_descriptors(host: Host, targets: Targets) -> None:
    program = targets.build("hot")
    says = ["-ex", "python print('attached', flush=True)"]
    with (
        targets.run("hot", "1") as child,
        Child(["gdb", "-nx", "-q", "-p", str(child.pid), *says], ready="attached") as gdb,
    ):
        host.register(host.files.plan(program, "target_hot"), pid=child.pid)
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(20):
            host.reconcile(child.pid)
        # Other threads of ours may just be reading in /proc; what leaked was one for each time.
        assert len(os.listdir("/proc/self/fd")) < before + 10
        gdb.send("detach")
        gdb.send("quit")
        assert gdb.wait() == 0


def test_execs_of_many_threads_while_they_are_seized(host: Host, targets: Targets) -> None:
    """A seize waits for an exec that waits for threads which only their tracer can reap: see reaper.py."""
    program = targets.build("execs")
    plan = host.files.plan(program, "target_execs")
    with targets.run("execs") as child:
        child.send("storm-thread 200")
        for registered in range(40):
            host.register(plan, probe=f"p{registered}", pid=child.pid)
            host.unregister(f"p{registered}")
        child.wait_for("ready")
        count = child.count()
        assert (count["images"], count["wrong"]) == (201, 0)
