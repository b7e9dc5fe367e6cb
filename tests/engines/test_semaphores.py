"""Semaphores of USDT probes in real processes: other mappings, other tools, children that are born meanwhile, a kill of the
tracer. The oracle is the program, which prints its counter and skips what it says that nobody looks at."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engines.host import Files, Host
from tests.support import needs
from tests.support.children import Child, fields
from tests.support.targets import Targets
from tests.support.tracers import Traced
from tests.support.uprobe import kernel_count
from trapline_agent.engines import journal as j
from trapline_agent.engines.base import Counter
from trapline_agent.engines.ptrace.memory import AddressSpace
from trapline_agent.engines.ptrace.semaphores import Semaphores
from trapline_agent.engines.restoring import Outcome, lower, restore_all
from trapline_agent.kernel import procfs
from trapline_agent.plans import SitePlan
from trapline_agent.targets.maps import executable_mappings, parse_data, read_maps

pytestmark = [needs.gcc, needs.ptrace_any, needs.x86_64]

SEVENS = 0x0707


def semaphore(child: Child) -> int:
    return int(child.ask("semaphore").partition("=")[2])


def counter_at(child: Child, plan: SitePlan) -> int:
    """Address of a plan's semaphore, by the mapping of its file offset alone."""
    assert plan.semaphore is not None
    found = (m.addr(plan.semaphore.offset) for m in parse_data(read_maps(child.pid)) if m.file == plan.file)
    return next(a for a in found if a is not None)


def write(pid: int, addr: int, content: bytes) -> None:
    with open(f"/proc/{pid}/mem", "r+b", 0) as memory:
        memory.seek(addr)
        memory.write(content)


# --- what it is written to ---------------------------------------------------------------------------------------------


def test_r19_a_library_that_is_opened_is_raised_before_its_code_runs(host: Host, targets: Targets) -> None:
    """Its data is mapped after its code; a call that is skipped returns a wrong result."""
    library = targets.build("usdt", "-DLIBRARY", "-shared", "-fPIC")
    plans = host.files.usdt(library)
    with targets.run("dl", library) as child:
        probe = host.register(plans, pid=child.pid)
        child.ask("open")
        child.ask("call 10")
        child.ask("close")
        child.ask("cycle 20 3")
        count = child.count()
        assert probe.hits == count["done"] == 70
        assert count["wrong"] == 0
        assert {t.state for t in probe.targets} <= {"armed", "gone"}
        child.ask("open")
        probe.unregister()
        child.ask("call 5")
        assert child.count()["wrong"] == 5


def test_r19_an_exec_begins_anew(host: Host, targets: Targets) -> None:
    plans = host.files.usdt(targets.build("usdt"))
    with targets.run("usdt") as child:
        probe = host.register(plans, pid=child.pid)
        for hits in (20, 40):
            child.ask("call 10")
            assert (probe.hits, semaphore(child)) == (hits, 2)
            child.send("exec")
            child.wait_for("ready")
        probe.unregister()
        assert semaphore(child) == 0


def test_r19_who_joins_writes_nothing(host: Host, targets: Targets, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for a moment is it lower than it was: calls would be missed."""
    plans = host.files.usdt(targets.build("usdt"))
    with targets.run("usdt") as child:
        probe = host.register(plans, pid=child.pid)
        with monkeypatch.context() as patch:
            patch.setattr(Semaphores, "_put", None)
            second = host.register(plans, probe="second", pid=child.pid)
            host.reconcile(child.pid)
            probe.unregister()
        assert (second.states(), semaphore(child)) == ({"armed": 2}, 2)


def test_r19_other_memory_in_the_semaphores_place_is_left_alone(
    host: Host, targets: Targets, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = host.files.usdt(targets.build("usdt"))
    with targets.run("usdt") as child:
        probe = host.register(plans, pid=child.pid)
        monkeypatch.setattr(Semaphores, "undo_strays", None)  # nothing is written there in the first place
        child.ask("replace")
        host.reconcile(child.pid)
        assert semaphore(child) == SEVENS
        probe.unregister()
        assert semaphore(child) == SEVENS
        again = host.register(plans, probe="again", pid=child.pid)
        assert {(t.state, t.reason) for t in again.targets} == {("refused", "Semaphore")}
        assert semaphore(child) == SEVENS
        assert host.altered(child.pid, [targets.build("usdt")]) == {}


def test_r19_r18_other_memory_that_comes_between_the_look_and_the_write(
    host: Host, targets: Targets, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = host.files.usdt(targets.build("usdt"))
    value = Semaphores.value
    with targets.run("usdt") as child:
        lifted = []

        def replaced_first(self: Semaphores, counter: Counter) -> int | None:
            if not lifted:
                lifted.append(child.ask("replace"))
            return value(self, counter)

        monkeypatch.setattr(Semaphores, "value", replaced_first)
        probe = host.register(plans[:1], pid=child.pid)
        assert lifted
        assert semaphore(child) == SEVENS
        host.reconcile(child.pid)
        assert probe.states() == {"refused": 1}
        assert semaphore(child) == SEVENS


def test_r19_a_page_that_cannot_be_written_is_refused(host: Host, targets: Targets) -> None:
    plans = host.files.usdt(targets.build("usdt"))
    with targets.run("usdt") as child, host.untouched(child.pid):
        child.ask("protect")
        probe = host.register(plans, pid=child.pid)
        assert {(t.state, t.reason) for t in probe.targets} == {("refused", "Semaphore")}
        assert semaphore(child) == 0
        host.engine.close()


def test_r19_it_neither_overflows_nor_underflows(
    host: Host, targets: Targets, caplog: pytest.LogCaptureFixture
) -> None:
    program = targets.build("usdt")
    plans = host.files.usdt(program)
    with targets.run("usdt") as child:
        child.ask("lift 65534")
        probe = host.register(plans, pid=child.pid)
        assert probe.states() == {"armed": 1, "refused": 1}
        assert [t.reason for t in probe.targets if t.state == "refused"] == ["Semaphore"]
        assert semaphore(child) == 65535
        probe.unregister()
        assert semaphore(child) == 65534
        child.ask("lift -65534")
        again = host.register(plans, probe="again", pid=child.pid)
        child.ask("lift -2")
        again.unregister()
        assert semaphore(child) == 0
        assert "somebody else has lowered it" in caplog.text
        assert host.altered(child.pid, [program]) == {}


# --- others ------------------------------------------------------------------------------------------------------------


@needs.uprobe
def test_r19_the_kernel_raises_it_beside_us(host: Host, targets: Targets) -> None:
    """It has a uprobe on the other place of the same probe, in all processes of the file."""
    program = targets.copy(targets.build("usdt"))
    ours, theirs = host.files.usdt(program)
    assert theirs.semaphore is not None
    with Child([program]) as child:
        probe = host.register(ours, pid=child.pid)
        assert semaphore(child) == 1
        with kernel_count(program, theirs.offset, semaphore=theirs.semaphore.offset) as count:
            assert semaphore(child) == 2
            child.ask("call 10")
            assert probe.hits == count() == 10
            child.ask("fork 5")
            assert count() == 15
            probe.unregister()
            assert semaphore(child) == 1
            child.ask("call 10")
            assert (probe.hits, count()) == (10, 25)
            again = host.register(ours, probe="again", pid=child.pid)
            assert semaphore(child) == 2
        assert semaphore(child) == 1
        child.ask("call 10")
        assert again.hits == 10
        again.unregister()
        assert semaphore(child) == 0


@needs.uprobe
def test_r19_the_kernel_raises_it_as_we_do(host: Host, targets: Targets) -> None:
    program = targets.copy(targets.build("usdt"))
    first, second = host.files.usdt(program)
    assert first.semaphore is not None
    with Child([program]) as child:
        with (
            kernel_count(program, first.offset, semaphore=first.semaphore.offset) as one,
            kernel_count(program, second.offset, semaphore=first.semaphore.offset) as two,
        ):
            child.ask("call 10")
            kernels = semaphore(child), one() + two()
        probe = host.register([first, second], pid=child.pid)
        child.ask("call 10")
        assert (semaphore(child), probe.hits) == kernels == (2, 20)


# --- children ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("meant", "children", "cycles"), [("all", 30, 10), ("parent", 300, 150)])
def test_r19_children_that_are_born_while_probes_come_and_go(
    host: Host, targets: Targets, meant: str, children: int, cycles: int
) -> None:
    """Whatever was raised in the parent as it forked, a child has it lowered in the end, once."""
    plans = host.files.usdt(targets.build("usdt"))
    with targets.run("usdt") as child:
        where = {"pid": child.pid} if meant == "parent" else {}
        child.ask("lift 3")
        child.ask(f"storm {children}")
        for cycle in range(cycles):
            host.register(plans, probe=f"p{cycle}", **where)
            host.unregister(f"p{cycle}")
        assert semaphore(child) == 3
        assert child.ask("calm") == "left=0"
        assert child.count()["failed"] == 0


def test_r19_a_child_that_cannot_be_entered_is_lowered(targets: Targets) -> None:
    """By ptrace alone: here by the tracer's own child, stopped as a newborn is."""
    (plan, _) = Files().usdt(targets.build("usdt"))
    assert plan.semaphore is not None
    with targets.run("usdt") as child:
        child.ask("lift 5")
        memory = AddressSpace(child.pid)
        addr = counter_at(child, plan)
        counter = Counter(addr, plan.file, plan.semaphore.offset)
        memory.semaphores.lift(1, counter, lambda c: True)
        assert semaphore(child) == 6
        words: dict[int, bytes] = {}

        def peek(tid: int, at: int) -> bytes:
            return os.pread(memory.fd, 8, at)

        def poke(tid: int, at: int, word: bytes) -> None:
            words[at] = word

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("trapline_agent.kernel.ptrace.peek", peek)
            patch.setattr("trapline_agent.kernel.ptrace.poke", poke)
            memory.semaphores.purge_child(child.pid, 1)
            memory.semaphores.purge_child(child.pid, 2)
        ((at, word),) = words.items()
        assert int.from_bytes(word[addr - at : addr - at + 2], "little") == 5
        before = os.pread(memory.fd, 8, at)
        assert word[: addr - at] == before[: addr - at]
        assert word[addr - at + 2 :] == before[addr - at + 2 :]
        memory.close()


# --- the death of the tracer -------------------------------------------------------------------------------------------


@pytest.fixture
def path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="trapline-test-") as directory:
        yield Path(directory) / "tracer.sock"
        print((Path(directory) / "log").read_text() if (Path(directory) / "log").exists() else "")


def test_r19_s2_the_guardian_lowers_what_the_tracer_raised(path: Path, targets: Targets) -> None:
    plans = Files().usdt(targets.build("usdt"))
    with targets.run("usdt") as child:
        child.ask("lift 1")
        with Traced(path, plans) as tracer:
            assert semaphore(child) == 3
            child.ask("hold")
            tracer.kill()
            tracer.wait()
        assert semaphore(child) == 1
        child.ask("go 3")
        assert fields(child.ask("count"))["semaphore"] == 1, "of the child that was forked"
        assert child.count()["failed"] == 0


def test_r19_s2_the_next_tracer_lowers_what_both_left(path: Path, targets: Targets) -> None:
    plans = Files().usdt(targets.build("usdt"))
    with targets.run("usdt") as child:
        child.ask("lift 1")
        with Traced(path, plans) as tracer:
            tracer.kill_both()
        assert semaphore(child) == 3
        with Traced(path, plans):
            assert semaphore(child) == 3, "lowered, and raised again"
            child.ask("call 4")
        assert child.count()["failed"] == 0


def journaled(child: Child, plan: SitePlan) -> j.Entry:
    addr = next(a for m in executable_mappings(child.pid) if m.file == plan.file and (a := m.addr(plan.offset)))
    armed = b"\xcc" + plan.code[1:]
    dev, counter = j.device(plan.file.dev), counter_at(child, plan)
    start = procfs.start_time(child.pid)
    return j.Entry(child.pid, start, 1, addr, dev, plan.file.inode, plan.offset, 1, plan.code, armed, counter, True)


def test_r19_s2_only_who_took_the_breakpoint_out_lowers(targets: Targets) -> None:
    (plan, _) = Files().usdt(targets.build("usdt"))
    with targets.run("usdt") as child:
        ours = journaled(child, plan)
        child.ask("lift 2")
        assert [o for _, o in restore_all([ours], kin_of=[])] == [Outcome.CLEAN]
        assert semaphore(child) == 2, "no breakpoint was there: it may have been lowered already"
        write(child.pid, ours.addr, b"\xcc")
        assert [o for _, o in restore_all([ours], kin_of=[])] == [Outcome.RESTORED]
        assert semaphore(child) == 1
        assert [o for _, o in restore_all([ours], kin_of=[])] == [Outcome.CLEAN]
        assert semaphore(child) == 1
        write(child.pid, ours.addr, b"\xcc")
        restore_all([ours._replace(raised=False)], kin_of=[])
        assert semaphore(child) == 1


def test_r19_s2_it_is_lowered_only_where_it_is_the_files(targets: Targets) -> None:
    (plan, _) = Files().usdt(targets.build("usdt"))
    with targets.run("usdt") as child:
        ours = journaled(child, plan)
        assert not lower(ours), "it is 0"
        child.ask("lift 2")
        for stale in (
            ours._replace(start_time=ours.start_time - 1),
            ours._replace(inode=ours.inode + 1),
            ours._replace(offset=ours.offset + 1),
            ours._replace(counter=ours.addr),
            ours._replace(counter=16),
            ours._replace(counter=2**64 - 1),
            ours._replace(pid=2**22 + 1),
        ):
            assert not lower(stale), stale
        assert semaphore(child) == 2
        assert lower(ours)
        assert semaphore(child) == 1
        child.ask("replace")
        assert not lower(ours)
        assert semaphore(child) == SEVENS
