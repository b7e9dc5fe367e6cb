"""Deaths of Trapline's parts, one at a time: no target is harmed, no hit goes missing without being counted."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.engines.host import untouched
from tests.support import needs
from tests.support.children import Child
from tests.system.stack import (
    GETPPID,
    Stack,
    Subscription,
    breakpoints,
    caller,
    libc_of,
    line_with,
    wait_exit,
)
from trapline.errors import Unavailable
from trapline.model import Phase, Probe
from trapline_agent.kernel import procfs

pytestmark = [needs.ptrace_any, needs.x86_64]


@contextmanager
def armed(**options: object) -> Iterator[tuple[Stack, Child, Probe]]:
    """A stack with a probe on a target, which must be as it was when all is over."""
    with caller() as target, untouched(target.pid), Stack(**options) as stack:  # type: ignore[arg-type]
        probe = stack.arm(f"{GETPPID} @ pid={target.pid}")
        yield stack, target, probe


def is_armed(target: Child) -> bool:
    return str(libc_of(target.pid)) in breakpoints(target.pid, libc_of(target.pid))


def balanced(stack: Stack, probe: Probe, calls: int) -> Probe:
    """Asserts that as many hits were counted as calls were made, and that each is recorded or counted as dropped."""
    now = stack.until_hits(probe.id, calls)
    counters = now.status.counters
    assert counters.hits == calls, now.status
    recorded = stack.recorded(probe.id, calls - counters.dropped)
    assert len(recorded) + counters.dropped == calls, now.status
    assert sum(now.status.dropped_by_reason.values()) == counters.dropped
    return now


def kill(child: Child) -> None:
    child.signal(signal.SIGKILL)
    child.wait()


def test_the_agent_is_killed_and_the_lease_ends() -> None:
    with caller() as busy, untouched(busy.pid), armed(lease_s=3.0) as (stack, target, probe):
        beside = stack.arm(f"{GETPPID} @ pid={busy.pid}")
        target.ask("call 100")
        stack.exactly(probe.id, 100)
        kill(stack.agent)
        # The tracer keeps everything in order for the lease ...
        busy.ask("start")
        assert target.ask("call 200") == "300"
        assert is_armed(target)
        # ... and takes it out then, from a target that runs too.
        line_with(stack.tracer, "has not been heard of")
        for child in (target, busy):
            wait_untraced(child)
            assert breakpoints(child.pid) == []
        assert target.ask("call 70") == "370"
        # The next agent gets what the tracer had counted, and arms anew. What ran unprobed is nobody's hit.
        stack.start_agent()
        stack.armed(probe.id, target.pid)
        target.ask("call 50")
        assert balanced(stack, probe, 350).status.counters.dropped == 0
        busy.ask("stop")
        for p in (probe, beside):
            stack.client.delete_probe(p.id)


def wait_untraced(target: Child) -> None:
    """Waits until nobody traces a process any more; it answers all the while."""
    while any(procfs.tracer(tid) for tid in procfs.tasks(target.pid)):
        target.ask("call 0")


def test_the_agent_is_killed_and_another_goes_on() -> None:
    with armed() as (stack, target, probe):
        target.ask("start")
        stack.until_hits(probe.id, 2000)
        kill(stack.agent)
        assert is_armed(target)
        stack.start_agent()
        stack.client.wait_for(probe.id, lambda p: p.status.phase is Phase.ARMED)
        seen = stack.client.probe(probe.id).status.counters.hits
        stack.until_hits(probe.id, seen + 2000)
        calls = int(target.ask("stop"))
        balanced(stack, probe, calls)
        # The same tracer never let go of it, so there is no more than one target.
        assert [(t.pid, t.state) for t in stack.client.targets(probe.id)] == [(target.pid, "armed")]
        stack.client.delete_probe(probe.id)


def test_an_agent_s_own_tracer_outlives_it_by_the_lease() -> None:
    with armed(lease_s=4.0, own_tracer=True) as (stack, target, probe):
        tracer = procfs.tracer(target.pid)
        target.ask("call 100")
        stack.exactly(probe.id, 100)
        kill(stack.agent)
        assert target.ask("call 100") == "200"
        assert is_armed(target)
        # An agent that comes in time finds it, and what it counted.
        stack.start_agent()
        stack.armed(probe.id, target.pid)
        assert procfs.tracer(target.pid) == tracer
        target.ask("call 100")
        stack.exactly(probe.id, 300)
        kill(stack.agent)
        assert is_armed(target)
        wait_exit(procfs_process(tracer))
        assert breakpoints(target.pid) == []
        assert target.ask("call 10") == "310"
        stack.start_agent()
        stack.armed(probe.id, target.pid)
        target.ask("call 10")
        assert balanced(stack, probe, 310).status.counters.dropped == 0
        stack.client.delete_probe(probe.id)


def procfs_process(tid: int) -> int:
    """Returns the process that a thread belongs to; TracerPid names a thread."""
    status = Path(f"/proc/{tid}/status").read_text()
    return int(status.partition("\nTgid:")[2].split()[0])


def test_the_service_is_killed_and_comes_back() -> None:
    with armed() as (stack, target, probe):
        others = [stack.arm(f"libc.so.6:{symbol} @ pid={target.pid}") for symbol in ("getpgid", "getsid")]
        target.ask("start")
        stack.until_hits(probe.id, 2000)
        kill(stack.service)
        with pytest.raises(Unavailable):
            stack.client.probes()
        assert is_armed(target)
        calls = int(target.ask("stop"))
        # Nobody is there to take these; the agent keeps them.
        calls = int(target.ask("call 5000"))
        stack.start_service()
        stack.client.wait_host()
        assert {p.id for p in stack.client.probes()} == {probe.id, *(p.id for p in others)}
        now = stack.client.wait_for(probe.id, lambda p: p.status.phase is Phase.ARMED)
        balanced(stack, probe, calls)
        target.ask("call 100")
        now = balanced(stack, probe, calls + 100)
        # At most what it had acknowledged and not yet written.
        assert now.status.counters.dropped < calls - 5000
        for p in (probe, *others):
            stack.client.delete_probe(p.id)


def test_what_does_not_fit_while_the_service_is_away_is_counted() -> None:
    with armed(agent_env={"TRAPLINE_AGENT_OUTBOX_BYTES": str(64 * 1024)}) as (stack, target, probe):
        target.ask("call 100")
        stack.exactly(probe.id, 100)
        kill(stack.service)
        calls = int(target.ask("call 10000"))
        stack.start_service()
        calls = int(target.ask("call 100"))
        now = balanced(stack, probe, calls)
        assert 0 < now.status.counters.dropped < 10_000
        assert set(now.status.dropped_by_reason) == {"agent-outbox"}
        stack.client.delete_probe(probe.id)


def test_the_tracer_is_told_to_end() -> None:
    with armed() as (stack, target, probe):
        target.ask("start")
        stack.until_hits(probe.id, 2000)
        with untouched(target.pid):
            stack.tracer.signal(signal.SIGTERM)
            assert stack.tracer.wait() == 0
        hits = int(target.ask("stop"))
        stack.client.wait_for(probe.id, lambda p: p.status.phase is not Phase.ARMED)
        stack.start_tracer()
        stack.armed(probe.id, target.pid)
        before = stack.client.probe(probe.id).status.counters.hits
        assert before <= hits
        target.ask("call 100")
        now = stack.until_hits(probe.id, before + 100).status.counters
        assert (now.hits, now.dropped) == (before + 100, 0)
        stack.client.delete_probe(probe.id)


def test_a_target_is_killed_while_it_hits(stack: Stack) -> None:
    with caller() as victim, caller() as other, untouched(other.pid):
        probe = stack.arm(f"{GETPPID} @ pid={victim.pid}")
        beside = stack.arm(f"{GETPPID} @ pid={other.pid}")
        with Subscription(stack, [probe.id]) as stream:
            victim.ask("start")
            stream.take(1000)
            kill(victim)
            now = stack.client.wait_for(probe.id, lambda p: p.status.phase is not Phase.ARMED)
            assert now.status.phase is Phase.NO_TARGETS
            assert [t.state for t in stack.client.targets(probe.id)] == ["gone"]
            stream.take(now.status.counters.hits)
            assert not stream.gaps
        other.ask("call 300")
        stack.exactly(beside.id, 300)
        for p in (probe, beside):
            stack.client.delete_probe(p.id)
        victim.popen.returncode = 0  # it was this test that killed it


def test_trapline_is_never_its_own_target(tmp_path: Path) -> None:
    """A probe on malloc, for whoever maps this libc: a target, and all of Trapline."""
    # A copy of the machine's own libc, so that no program but these is concerned.
    with caller() as any_program:
        libc = Path(shutil.copy2(libc_of(any_program.pid).resolve(), tmp_path / "libc.so.6"))
    own = {"LD_LIBRARY_PATH": str(tmp_path)}
    with Stack(env=own) as stack, caller(env=own) as target, untouched(target.pid):
        trapline = [stack.service.pid, stack.agent.pid, stack.tracer.pid]
        for pid in (*trapline, target.pid):
            assert libc_of(pid) == libc
        probe = stack.arm(f"{libc}:malloc")
        listed = {p.pid: p for p in stack.client.processes(stack.host)}
        for pid in trapline:
            assert breakpoints(pid) == []
            assert (listed[pid].eligible, listed[pid].reason) == (False, "Self")
        assert str(libc) in breakpoints(target.pid)
        with Subscription(stack, [probe.id]) as stream:
            target.ask("open " + " ".join(f"/proc/self/fd/{n}" for n in range(200)))
            stream.take(200)  # carrying these through all of Trapline takes many a malloc, none of which is a hit
            target.ask("call 1")
        for pid in trapline:
            assert breakpoints(pid) == []
        assert {t.pid for t in stack.client.targets(probe.id)} == {target.pid}
        assert {hit.pid for hit in stack.client.hits(probe.id, limit=10_000)} == {target.pid}
        stack.client.delete_probe(probe.id)
