"""kill -9 of the tracer, of its guardian, and of both (semantics S2): what is left in the programs, and who takes it out."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engines.host import Files, altered_bytes
from tests.support import needs
from tests.support.children import Child
from tests.support.targets import Targets
from tests.support.tracers import Traced, memory_of, restored_after
from tests.torture.scale import Torture
from trapline.errors import TraplineError
from trapline_agent.engines import journal as j
from trapline_agent.engines.restoring import Outcome, claims, restore, restore_all, restore_by_name
from trapline_agent.kernel import procfs
from trapline_agent.plans import SitePlan
from trapline_agent.targets.maps import executable_mappings
from trapline_agent.tracer.client import TracerClient

pytestmark = [needs.gcc, needs.ptrace_any, needs.x86_64]

BACK_S = 0.1
"""An idle target's bytes are back so soon after the kill, as long as there is a processor: typically in 0.0004 s."""
INT3 = b"\xcc"


@pytest.fixture
def path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="trapline-test-") as directory:
        yield Path(directory) / "tracer.sock"
        print((Path(directory) / "log").read_text() if (Path(directory) / "log").exists() else "")


def breakpoints(child: Child, program: Path) -> list[int]:
    """Returns the file offsets where a target has int3 and its file has not. (Slots stay: a thread may be inside.)"""
    return [place[1] for place, (_, now) in altered_bytes(child.pid, [program]).items() if now == INT3[0]]


def address(child: Child, plan: SitePlan) -> int:
    return next(a for m in executable_mappings(child.pid) if m.file == plan.file and (a := m.addr(plan.offset)))


def entry(child: Child, plan: SitePlan, **changes: object) -> j.Entry:
    """Returns what a journal would say of a breakpoint there."""
    code = plan.code[: j.CONTEXT]
    found = j.Entry(
        child.pid,
        procfs.start_time(child.pid),
        1,
        address(child, plan),
        j.device(plan.file.dev),
        plan.file.inode,
        plan.offset,
        1,
        code,
        INT3 + code[1:],
    )
    return found._replace(**changes)  # type: ignore[arg-type] # by name


def write(child: Child, addr: int, content: bytes) -> None:
    with open(f"/proc/{child.pid}/mem", "r+b", 0) as memory:
        memory.seek(addr)
        memory.write(content)


def read(child: Child, addr: int, length: int = 1) -> bytes:
    with open(f"/proc/{child.pid}/mem", "rb", 0) as memory:
        memory.seek(addr)
        return memory.read(length)


# --- whole processes -----------------------------------------------------------------------------------------------


def test_s2_an_idle_program_is_whole_at_once(path: Path, targets: Targets, torture: Torture) -> None:
    plan = Files().plan(targets.build("hot"), "target_hot")
    times = []
    with targets.run("hot", "1") as child:
        for _ in torture.cycles(10, 200):
            with Traced(path, plan) as tracer, memory_of(child, plan) as (memory, addr):
                child.ask("call 3")
                assert os.pread(memory, 1, addr) == INT3
                killed = tracer.kill()
                times.append(restored_after(memory, addr, killed) / 1e9)
                child.ask("call 3")
                tracer.wait()
        count = child.count()
        assert count["wrong"] == count["begun"] - count["done"] == 0
    best = sorted(times)[len(times) // 2]
    torture.note(f"bytes back after {best * 1e6:.0f} us")
    assert best < BACK_S * max(1.0, os.getloadavg()[0]), times


def test_s2_programs_that_hit_now_and_then_live_on(path: Path, targets: Targets, torture: Torture) -> None:
    """At ten hits a second; a thread that hits in the fraction of a millisecond dies, which is counted and told."""
    plan = Files().plan(targets.build("paced"), "target_paced")
    dice = random.Random(2)
    children: list[Child] = []
    kills = 0
    try:
        for _ in torture.cycles(10, 1000):
            children += [targets.start("paced", "10") for _ in range(2 - len(children))]
            with Traced(path, plan) as tracer:
                for _ in range(dice.randrange(50)):
                    for child in children:
                        child.count()
                tracer.kill()
                tracer.wait()
            before = [child.count()["done"] if child.alive() else 0 for child in children]
            for child, done in zip(children, before, strict=True):
                while child.alive() and (now := _count(child)) is not None and now <= done:
                    pass  # until it has called once more
            kills += len(children)
            for child in [c for c in children if not c.alive()]:
                assert child.wait() == -signal.SIGTRAP
                torture.deaths += 1
                child.kill()
                children.remove(child)
            for child in children:
                assert breakpoints(child, targets.build("paced")) == []
    finally:
        for child in children:
            child.kill()
    torture.note(f"{torture.deaths} of {kills} programs died")
    # 10 hits/s and a window of less than a millisecond: one in a hundred. On a busy machine the window is longer.
    assert torture.deaths <= 1 + kills * 0.01 * max(1.0, os.getloadavg()[0])


def _count(child: Child) -> int | None:
    from tests.support.children import ChildDied

    try:
        return child.count()["done"]
    except ChildDied:
        return None


def test_s2_a_guardian_that_is_killed_is_replaced(path: Path, targets: Targets, torture: Torture) -> None:
    plan = Files().plan(targets.build("hot"), "target_hot")
    with targets.run("hot", "1") as child, Traced(path, plan) as tracer, memory_of(child, plan) as (memory, addr):
        for _ in torture.cycles(3, 50):
            before = tracer.guardian
            os.kill(before, signal.SIGKILL)
            tracer.guardian = tracer.ready_guardian(other_than=before)
            child.ask("call 5")
            assert os.pread(memory, 1, addr) == INT3, "nothing is taken out for that"
        restored_after(memory, addr, tracer.kill())
        tracer.wait()
        child.ask("call 5")
        assert child.count()["wrong"] == 0


def test_s2_the_next_tracer_takes_out_what_both_left(path: Path, targets: Targets, torture: Torture) -> None:
    program, other = targets.build("hot"), targets.build("paced")
    plan, another = (Files().plan(p, s) for p, s in ((program, "target_hot"), (other, "target_paced")))
    with targets.run("hot", "1") as child, targets.run("paced", "0") as bystander:
        for _ in torture.cycles(3, 50):
            with Traced(path, plan) as tracer:
                child.ask("call 5")
                tracer.kill_both()
            assert breakpoints(child, program) == [plan.offset], "nobody was there to take it out"
            with Traced(path, another) as tracer:  # it is armed in somebody else when this returns
                assert breakpoints(child, program) == []
                child.ask("call 5")
                assert breakpoints(bystander, other) == [another.offset]
                restored_after(*_look(tracer, bystander, another))
                tracer.wait()
        assert child.count()["wrong"] == 0


def _look(tracer: Traced, child: Child, plan: SitePlan) -> tuple[int, int, int]:
    fd = os.open(f"/proc/{child.pid}/mem", os.O_RDONLY)
    return fd, address(child, plan), tracer.kill()


def test_s2_an_end_in_good_order_leaves_no_guardian_and_no_journal(path: Path, targets: Targets) -> None:
    plan = Files().plan(targets.build("hot"), "target_hot")
    with targets.run("hot", "1") as child, Traced(path, plan) as tracer:
        child.ask("call 5")
        guardian = os.pidfd_open(tracer.guardian)
        tracer.child.signal(signal.SIGTERM)
        assert tracer.child.wait() == 0
        with pytest.raises(ProcessLookupError):
            signal.pidfd_send_signal(guardian, 0)
        os.close(guardian)
        assert not path.with_suffix(".journal").exists()
        assert altered_bytes(child.pid, [targets.build("hot")]) == {}


def test_s2_what_ends_the_tracers_process_group_leaves_the_guardian(path: Path, targets: Targets) -> None:
    plan = Files().plan(targets.build("hot"), "target_hot")
    with targets.run("hot", "1") as child, Traced(path, plan) as tracer, memory_of(child, plan) as (memory, addr):
        killed = time.monotonic_ns()
        os.killpg(tracer.child.pid, signal.SIGKILL)
        restored_after(memory, addr, killed)
        tracer.wait()
        child.ask("call 5")


def test_s2_children_that_were_forked_are_taken_care_of(path: Path, targets: Targets) -> None:
    program = targets.build("forks")
    plan = Files().plan(program, "target_forks")
    with targets.run("forks") as child, Traced(path, plan) as tracer:
        pid = int(child.ask("hold 7").split()[-1])
        tracer.kill()
        tracer.wait()
        assert child.ask("go")
        assert child.count()["failed"] == 0, f"the held child {pid} died"
        assert breakpoints(child, program) == []


def test_r19_s2_semaphores_when_the_tracer_is_killed_at_any_moment(
    path: Path, targets: Targets, torture: Torture
) -> None:
    """A counter is never lower than what others made it: one that is would have switched off their probe."""
    plans = Files().usdt(targets.build("usdt"))
    dice = random.Random(19)
    left = 0

    async def come_and_go(tracer: Traced, until_s: float) -> None:
        client = await TracerClient.connect(path, host="h", process=tracer.child.popen)
        asyncio.get_running_loop().call_later(until_s, tracer.kill)
        with contextlib.suppress(TraplineError, ConnectionError):
            while True:
                await client.unregister("p")
                await client.register("p", generation=1, sites=["s0"], plans=plans)
        await client.close()

    with targets.run("usdt") as child:
        child.ask("lift 1")
        for _ in torture.cycles(6, 500):
            with Traced(path, plans) as tracer:
                asyncio.run(come_and_go(tracer, dice.uniform(0.01, 0.1)))
                tracer.wait()
            now = int(child.ask("semaphore").partition("=")[2])
            assert 1 + left <= now <= 1 + left + len(plans)
            left = now - 1
            child.ask("call 3")
            assert breakpoints(child, targets.build("usdt")) == []
        assert child.count()["failed"] == 0
    torture.note(f"{left} semaphores left raised in {torture.done} kills")
    assert left <= 1 + torture.done // 10


# --- what is written back, and what is not ---------------------------------------------------------------------------


@pytest.fixture
def hot(targets: Targets) -> Iterator[tuple[Child, SitePlan]]:
    with targets.run("hot", "1") as child:
        yield child, Files().plan(targets.build("hot"), "target_hot")


def test_s2_restores_what_is_ours(hot: tuple[Child, SitePlan]) -> None:
    child, plan = hot
    ours = entry(child, plan)
    with open(f"/proc/{child.pid}/mem", "r+b", 0) as memory:
        for by_name in (False, True):
            write(child, ours.addr, INT3)
            outcome = restore_by_name(ours, {}) if by_name else restore(ours, memory.fileno(), {})
            assert outcome is Outcome.RESTORED
            assert read(child, ours.addr, 15) == plan.code
            outcome = restore_by_name(ours, {}) if by_name else restore(ours, memory.fileno(), {})
            assert outcome is Outcome.CLEAN


def test_s2_two_breakpoints_beside_one_another(hot: tuple[Child, SitePlan]) -> None:
    child, plan = hot
    first = entry(child, plan)
    code = plan.code[3:] + b"\x90" * 3
    second = first._replace(addr=first.addr + 3, offset=first.offset + 3, original=code, armed=INT3 + code[1:])
    with open(f"/proc/{child.pid}/mem", "r+b", 0) as memory:
        write(child, first.addr, INT3)
        write(child, second.addr, INT3)
        assert restore(first, memory.fileno(), {}) is Outcome.UNSURE
        assert restore(first, memory.fileno(), claims([first, second])) is Outcome.RESTORED
        assert read(child, first.addr, 4) == plan.code[:3] + INT3
        write(child, second.addr, plan.code[3:4])


def test_s2_leaves_alone_what_is_not_ours(hot: tuple[Child, SitePlan]) -> None:
    """Another process of that number, another file at that address, other bytes: all may be after a while."""
    child, plan = hot
    ours = entry(child, plan)
    write(child, ours.addr, INT3)
    for stale, expected in (
        (ours._replace(start_time=ours.start_time - 1), Outcome.GONE),
        (ours._replace(inode=ours.inode + 1), Outcome.OTHER),
        (ours._replace(dev=(0, 1)), Outcome.OTHER),
        (ours._replace(offset=ours.offset + 1), Outcome.OTHER),
        (ours._replace(armed=b"\xf1" + ours.armed[1:]), Outcome.CLEAN),
        (ours._replace(pid=2**22 + 1), Outcome.GONE),
    ):
        assert restore_by_name(stale, {}) is expected, stale
        assert read(child, ours.addr) == INT3
    with open(f"/proc/{child.pid}/mem", "r+b", 0) as memory:
        changed = ours._replace(original=ours.original[:-1] + b"?", armed=ours.armed[:-1] + b"?")
        assert restore(changed, memory.fileno(), {}) is Outcome.UNSURE
        short = ours._replace(original=ours.original[:4], armed=ours.armed[:4])
        assert restore(short, memory.fileno(), {}) is Outcome.UNSURE
        assert read(child, ours.addr) == INT3
        assert restore(ours._replace(addr=16), memory.fileno(), {}) is Outcome.CLEAN
    write(child, ours.addr, plan.code[:1])


def test_s2_an_exec_in_between(targets: Targets) -> None:
    """It keeps the process' number and start time, and has other memory: neither way writes into that."""
    flags = ("-no-pie", "-fno-pie")
    program = targets.build("hot", *flags)
    other = targets.copy(program)
    plan = Files().plan(program, "target_hot")
    with Child(["/bin/sh", "-c", f"exec {program} 1"]) as first:
        ours = entry(first, plan)
    with Child(["/bin/sh", "-c", f'echo ready; read x; exec "{other}" 1']) as child:
        same = ours._replace(pid=child.pid, start_time=procfs.start_time(child.pid))
        before = os.open(f"/proc/{child.pid}/mem", os.O_RDWR)
        child.send("go")
        child.wait_for("ready")
        write(child, ours.addr, INT3)  # somebody else's, at the very address, in the very code
        assert restore(same, before, {}) is Outcome.GONE
        assert restore_by_name(same, {}) is Outcome.OTHER
        assert read(child, ours.addr) == INT3
        os.close(before)
        write(child, ours.addr, plan.code[:1])


def test_s2_a_child_that_nobody_was_told_of(targets: Targets) -> None:
    program = targets.build("forks")
    plan = Files().plan(program, "target_forks")
    with targets.run("forks") as child:
        ours = entry(child, plan)
        write(child, ours.addr, INT3)
        child.ask("hold 3")
        found = restore_all([ours], kin_of=[ours])
        assert [outcome for _, outcome in found] == [Outcome.RESTORED] * 2
        assert found[1][0].pid != child.pid
        assert child.ask("go")
        assert child.count()["failed"] == 0
