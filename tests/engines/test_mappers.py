"""Processes that are followed because one of their threads maps a probed file: what holds for any other holds for them."""

from __future__ import annotations

import contextlib
import os
import threading
import time

import pytest

from tests.engines.host import Host, Probe
from tests.support.children import TIMEOUT_S
from tests.support.targets import Targets
from trapline_agent.engines.ptrace.commands import Ended
from trapline_agent.engines.ptrace.engine import PtraceEngine
from trapline_agent.engines.ptrace.group import Group
from trapline_agent.engines.ring import HitRing
from trapline_agent.kernel import procfs, ptrace
from trapline_agent.plans import FileKey, SitePlan
from trapline_agent.tracer.messages import Register


class Mapper:
    """As the hook tells of one; the thread of these tests sleeps in another call, and is stopped on its way out likewise."""

    event = "mmap"

    def __init__(self, pid: int, deadline: float = float("inf")) -> None:
        self.pid = self.tid = pid
        self.file = FileKey("", 0)
        self.deadline = deadline

    def cause(self) -> str:
        return "mmap:fanotify"


def publish(host: Host, plan: SitePlan) -> Probe:
    """Has something wanted in processes, without a look at any."""
    message = Register(id=1, probe="p", generation=1, sites=["s"], plans=[plan])
    return Probe(host, host.table.publish(message, HitRing))


def follow(host: Host, pid: int, plan: SitePlan) -> Probe:
    """Has a process followed and armed for its mapper."""
    assert isinstance(host.engine, PtraceEngine)
    probe, changed = publish(host, plan), threading.Event()
    host.table._on_change = changed.set
    assert host.engine.await_mapper(Mapper(pid))
    while not probe.states()["armed"]:
        assert changed.wait(TIMEOUT_S)
        changed.clear()
    return probe


def test_a_child_that_is_being_born_as_its_parent_is_let_go_has_none_of_our_bytes(host: Host, targets: Targets) -> None:
    """Its first stop is told late: until then nobody but the kernel knows of it, and it has its parent's breakpoint."""
    plan = host.files.plan(targets.build("forks"), "target_forks")
    with targets.run("forks") as child:
        probe = follow(host, child.pid, plan)
        thread = host.engine._threads[child.pid]  # type: ignore[attr-defined]
        wait, born, late = thread._waiter.wait, threading.Event(), threading.Event()
        first_stops: list[tuple[int, int]] = []

        def delayed(tid: int = -1, *, block: bool = True) -> tuple[int, int]:
            if late.is_set() and first_stops:
                return first_stops.pop()
            change: tuple[int, int] = wait(tid, block=block)
            if change[0] > 0 and change[0] not in thread._group.threads and not late.is_set():
                first_stops.append(change)
                born.set()
                return 0, 0
            return change

        asked = threading.Event()
        expects_children = thread._lifecycle.expects_children
        thread._waiter.wait = delayed
        thread._lifecycle.expects_children = lambda: (expects_children(), asked.set())[0]
        thread.call(lambda: None)  # it waits in ``delayed`` from now on
        child.send("fork 5")
        assert born.wait(TIMEOUT_S)
        probe.unregister()
        assert asked.wait(TIMEOUT_S)
        late.set()
        with contextlib.suppress(Ended):
            thread.call(lambda: None)
        child.wait_for("ended")
        count = child.count()
        assert (count["failed"], count["done"]) == (0, 5)


@pytest.mark.parametrize("how", ["attached", "mapper that is late", "mapper that has not stopped"])
def test_nothing_is_written_before_a_process_has_settled_however_it_came_to_be_followed(
    host: Host, targets: Targets, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """One of its threads stays inside fork: the child, of which nobody would tell, must not get our bytes."""
    engine, settle = host.engine, Group.settle
    assert isinstance(engine, PtraceEngine)
    program = targets.build("hot")
    plan = host.files.plan(program, "target_hot")
    with targets.run("hot", "1") as child:
        monkeypatch.setattr(Group, "settle", lambda *args, **kwargs: False)
        if how == "attached":
            probe = host.register(plan)
            assert [t.reason for t in probe.targets] == ["BusyForking"]
            host.tick()
        else:
            probe = publish(host, plan)
            with monkeypatch.context() as patch:
                patch.setattr(ptrace, "interrupt", lambda tid: None)
                if how == "mapper that is late":
                    with pytest.raises(TimeoutError):
                        engine.await_mapper(Mapper(child.pid, time.monotonic() - 1))
                else:
                    engine.await_mapper(Mapper(child.pid))
                host.reconcile(child.pid)
        assert host.altered(child.pid, [program]) == {}
        assert [(t.state, t.reason) for t in probe.targets] == [("refused", "BusyForking")]
        monkeypatch.setattr(Group, "settle", settle)
        host.tick()
        child.ask("call 7")
        assert (probe.states(), probe.hits) == ({"armed": 1}, 7)


def test_a_mapper_that_shares_the_memory_of_a_followed_process_is_armed(host: Host, targets: Targets) -> None:
    program = targets.build("forks")
    with targets.run("forks") as child:
        child.send("clone 1000000000")
        path = f"/proc/{child.pid}/task/{child.pid}/children"
        while not (clones := procfs.read(path).split()):
            assert child.alive()
        host.register(host.files.plan(program, "main"), probe="other", pid=child.pid)
        follow(host, int(clones[0]), host.files.plan(program, "target_forks"))


def test_a_child_that_has_ended_before_its_birth_is_told_is_nobody_s_child(host: Host, targets: Targets) -> None:
    """Its number will be another process', with another parent."""
    plan = host.files.plan(targets.build("forks"), "target_forks")
    with targets.run("forks") as child:
        host.register(plan)
        thread = host.engine._threads[child.pid]  # type: ignore[attr-defined]
        wait = thread._waiter.wait
        births: list[tuple[int, int]] = []
        ended: list[int] = []

        def delayed(tid: int = -1, *, block: bool = True) -> tuple[int, int]:
            if ended and births:
                return births.pop()
            change: tuple[int, int] = wait(tid, block=block)
            if change[0] == child.pid and change[1] >> 16 == ptrace.PTRACE_EVENT_FORK and not ended:
                births.append(change)
                return 0, 0
            if change[0] > 0 and os.WIFEXITED(change[1]):
                ended.append(change[0])
            return change

        thread._waiter.wait = delayed
        thread.call(lambda: None)  # it waits in ``delayed`` from now on
        child.send("fork 5")
        child.wait_for("ended")
        assert ended
        assert thread._lifecycle._expected == {}
