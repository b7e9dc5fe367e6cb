"""An errno at every call in turn: what was asked for takes effect whole, or not at all and the status says so (R5).

Whatever failed, the program runs on, right; afterwards all comes out, and the probe can be set anew.
"""

from __future__ import annotations

import errno
import os
import random
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.engines.host import Host, Probe, altered_bytes, mapped_files
from tests.support import needs
from tests.support.children import Child
from tests.support.targets import Targets
from tests.torture.faults import Call, Faults, worth_failing
from tests.torture.scale import Torture, size
from trapline_agent.kernel import procfs
from trapline_agent.plans import FetchPlan

pytestmark = [needs.gcc, needs.ptrace_any, needs.x86_64]

_STRING = [FetchPlan(name="s", register="rsi", string=True)]


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Faults:
    return Faults(monkeypatch)


def every(torture: Torture, calls: list, each: int = 3) -> Iterator[tuple[Call, int, str]]:  # type: ignore[type-arg]
    """Yields (call, errno, what) for each call that is to fail; all of them in a long run."""
    chosen = worth_failing(calls, size(each, 12))
    rounds = [(c, e, f"{c}: {os.strerror(e)}") for c in chosen for e in c.errnos()]
    assert rounds
    for i in torture.cycles(len(rounds), len(rounds)):
        yield rounds[i]


def clean(host: Host, child: Child, what: str) -> None:
    """Asserts that nothing of ours is left in a process: no byte, and nobody traces it."""
    host.engine.close()
    assert altered_bytes(child.pid, mapped_files(child.pid)) == {}, what
    for tid in procfs.tasks(child.pid):
        assert procfs.tracer(tid) == 0, what


def whole_or_nothing(probe: Probe, child: Child, calls: int, what: str) -> None:
    """Asserts that a register took effect, and counts, or did not, and says why."""
    before = probe.hits
    child.ask(f"call {calls}")
    if probe.states()["armed"]:
        assert probe.hits - before == calls, what
    else:
        assert probe.hits == before, (what, probe.targets)
        assert probe.targets, f"the status says nothing: {what}"
        assert all(t.reason for t in probe.targets), what
    assert child.count()["wrong"] == 0, what


def test_r5_an_errno_at_every_call_of_a_register(
    host: Host, targets: Targets, faults: Faults, torture: Torture
) -> None:
    program = targets.build("hot")
    plan = host.files.plan(program, "target_hot")
    with targets.run("hot", "2") as child:
        with faults.on() as calls:
            host.register(plan, pid=child.pid, fetches=_STRING)
        host.unregister()
        clean(host, child, "")
        for call, code, what in every(torture, calls):
            with faults.at(call, code):
                probe = host.register(plan, probe=what, pid=child.pid, fetches=_STRING)
            whole_or_nothing(probe, child, 5, what)
            probe.unregister()
            clean(host, child, what)
        probe = host.register(plan, pid=child.pid)
        child.ask("call 5")
        assert probe.hits == 5


def test_an_errno_at_every_call_of_an_unregister(
    host: Host, targets: Targets, faults: Faults, torture: Torture
) -> None:
    program = targets.build("hot")
    plan = host.files.plan(program, "target_hot")
    with targets.run("hot", "2") as child:
        host.register(plan, pid=child.pid)
        child.ask("call 5")
        with faults.on() as calls:
            host.unregister()
            host.engine.close()
        for call, code, what in every(torture, calls):
            probe = host.register(plan, probe=what, pid=child.pid)
            child.ask("call 5")
            with faults.at(call, code):
                probe.unregister()
                child.ask("call 5")
                host.engine.close()
            assert probe.hits == 5, what
            child.ask("call 5")
            assert child.count()["wrong"] == 0, what
            clean(host, child, what)


def test_r19_r5_an_errno_at_every_call_where_semaphores_are_raised_and_lowered(
    host: Host, targets: Targets, faults: Faults, torture: Torture
) -> None:
    """Armed is raised, and calls are counted; in the end it is what others made it."""
    plans = host.files.usdt(targets.build("usdt"))

    def semaphore(child: Child) -> int:
        return int(child.ask("semaphore").partition("=")[2])

    with targets.run("usdt") as child:
        child.ask("lift 2")
        with faults.on() as arming:
            host.register(plans, pid=child.pid)
        with faults.on() as leaving:
            host.unregister()
            host.engine.close()
        for when, calls in (("register", arming), ("unregister", leaving)):
            for call, code, what in every(torture, calls):
                what = f"{when}: {what}"
                with faults.at(call, code if when == "register" else 0):
                    probe = host.register(plans, probe=what, pid=child.pid)
                armed = probe.states()["armed"]
                assert semaphore(child) == 2 + armed, what
                child.ask("call 5")
                assert probe.hits == 5 * armed, what
                with faults.at(call, code if when == "unregister" else 0):
                    probe.unregister()
                    host.engine.close()
                assert semaphore(child) == 2, what
                clean(host, child, what)


def test_an_errno_at_every_call_of_a_hit(host: Host, targets: Targets, faults: Faults, torture: Torture) -> None:
    program = targets.build("hot")
    plan = host.files.plan(program, "target_hot")
    with targets.run("hot", "1") as child:
        probe = host.register(plan, fetches=_STRING, pid=child.pid)
        with faults.on() as calls:
            child.ask("call 2")
        for call, code, what in every(torture, calls):
            before = probe.hits
            with faults.at(call, code):
                child.ask("call 2")
            child.ask("call 3")
            assert probe.hits - before == 5, what
            assert child.count()["wrong"] == 0, what


def test_an_errno_at_every_call_of_a_return(host: Host, targets: Targets, faults: Faults, torture: Torture) -> None:
    """The first from its place, where the return point is armed, and the second. A call is a hit, or it is explained."""
    program = targets.build("returns")
    plan = host.files.plan(program, "target_ret")
    with targets.run("returns") as child:
        host.register(plan, returns=True, pid=child.pid)
        with faults.on() as calls:
            child.ask("call 2")
        host.unregister()
        for call, code, what in every(torture, calls):
            probe = host.register(plan, fetches=[], returns=True, pid=child.pid)
            with faults.at(call, code):
                child.ask("call 2")
            child.ask("call 3")
            assert probe.calls == 5, what
            assert probe.hits >= 3, what
            assert probe.hits + sum(probe.unreturned.values()) == 5, what
            probe.unregister()
            assert child.count()["wrong"] == 0, what
        clean(host, child, "return")


@pytest.mark.parametrize("kind", ["fork", "vfork", "spawn", "clone", "thread"])
def test_an_errno_at_every_call_of_a_birth(
    host: Host, targets: Targets, faults: Faults, torture: Torture, kind: str
) -> None:
    program = targets.build("forks")
    plan = host.files.plan(program, "target_forks")
    with targets.run("forks") as child:
        probe = host.register(plan)
        with faults.on() as calls:
            child.ask(f"{kind} 3")
        for call, code, what in every(torture, calls):
            with faults.at(call, code):
                child.ask(f"{kind} 3")
            assert child.count()["failed"] == 0, what
            before = probe.hits
            child.ask(f"{kind} 3")
            assert probe.hits - before == 3, what
        probe.unregister()
        clean(host, child, kind)


@pytest.mark.parametrize("command", ["exec", "exec-thread"])
def test_an_errno_at_every_call_of_an_exec(
    host: Host, targets: Targets, faults: Faults, torture: Torture, command: str
) -> None:
    program = targets.build("execs")
    plan = host.files.plan(program, "target_execs")
    with targets.run("execs") as child:

        def again() -> None:
            child.send(command)
            child.wait_for("ready")

        probe = host.register(plan, pid=child.pid)
        with faults.on() as calls:
            again()
        for call, code, what in every(torture, calls):
            with faults.at(call, code):
                again()
            child.ask("call 3")
            assert child.count()["wrong"] == 0, what
            again()
            before = probe.hits
            child.ask("call 3")
            assert probe.hits - before == 3, what
        probe.unregister()
        clean(host, child, command)


def test_an_errno_at_every_call_of_a_dlopen(host: Host, targets: Targets, faults: Faults, torture: Torture) -> None:
    library = targets.library()
    with targets.run("dl", library) as child:
        probe = host.register(host.files.plan(library, "dlfn"), pid=child.pid)
        with faults.on() as calls:
            child.ask("cycle 1 3")
        for call, code, what in every(torture, calls):
            with faults.at(call, code):
                child.ask("cycle 1 3")
            assert child.count()["wrong"] == 0, what
            before = probe.hits
            child.ask("cycle 1 3")
            assert probe.hits - before == 3, what
        probe.unregister()
        clean(host, child, "dlopen")


def no_descriptors(call: Call) -> int:
    return errno.EMFILE if call.kind == "open" else 0


@pytest.mark.slack  # a page cannot be mapped without a descriptor: see test_slots
@pytest.mark.parametrize("kind", ["fork", "vfork", "spawn", "clone", "thread"])
def test_no_descriptors_are_left_for_a_birth(host: Host, targets: Targets, faults: Faults, kind: str) -> None:
    program = targets.build("forks")
    with targets.run("forks") as child:
        probe = host.register(host.files.plan(program, "target_forks"))
        with faults.on(no_descriptors):
            for _ in range(5):
                child.ask(f"{kind} 3")
        assert faults.failed
        assert child.count()["failed"] == 0
        before = probe.hits
        child.ask(f"{kind} 3")
        assert probe.hits - before == 3
        probe.unregister()
        clean(host, child, kind)


@pytest.mark.parametrize("command", ["exec", "exec-thread"])
def test_no_descriptors_are_left_for_an_exec(host: Host, targets: Targets, faults: Faults, command: str) -> None:
    program = targets.build("execs")
    with targets.run("execs") as child:
        probe = host.register(host.files.plan(program, "target_execs"), pid=child.pid)
        with faults.on(no_descriptors):
            child.send(command)
            child.wait_for("ready")
            child.ask("call 3")
        assert faults.failed
        host.reconcile(child.pid)
        before = probe.hits
        child.ask("call 3")
        assert probe.hits - before == 3
        assert child.count()["wrong"] == 0
        probe.unregister()
        clean(host, child, command)


@pytest.mark.slack
def test_no_descriptors_are_left_for_a_dlopen(host: Host, targets: Targets, faults: Faults) -> None:
    library = targets.library()
    with targets.run("dl", library) as child:
        probe = host.register(host.files.plan(library, "dlfn"), pid=child.pid)
        with faults.on(no_descriptors):
            child.ask("open")
            child.ask("call 3")
        assert faults.failed
        host.tick()
        assert [(t.state, t.cause, t.may_have_missed) for t in probe.targets] == [("armed", "reconcile", True)]
        child.ask("call 3")
        assert probe.hits == 3
        probe.unregister()
        clean(host, child, "dlopen")


def test_r7_a_breakpoint_that_cannot_be_taken_out_yet(host: Host, targets: Targets, faults: Faults) -> None:
    program = targets.build("hot")
    with targets.run("hot", "2") as child:
        probe = host.register(host.files.plan(program, "target_hot"), pid=child.pid)
        child.ask("call 3")
        with faults.on(lambda call: errno.ENOMEM if call.kind == "pwrite" else 0):
            probe.unregister()
            assert faults.failed
            child.ask("call 3")
        assert altered_bytes(child.pid, [program])
        child.ask("call 3")
        assert (probe.hits, child.count()["wrong"]) == (3, 0)
        host.tick()
        assert 0xCC not in {now for _, now in altered_bytes(child.pid, [program]).values()}
        clean(host, child, "")


def test_r4_a_target_is_killed_at_every_call_of_a_register(
    host: Host, targets: Targets, faults: Faults, torture: Torture
) -> None:
    """It is no error, and to others nothing happens."""
    program = targets.build("hot")
    plan = host.files.plan(program, "target_hot")
    with targets.run("hot", "2") as other:
        with Child([program, "2"]) as victim, faults.on() as calls:
            host.register(plan, probe="first")
            host.unregister("first")
            host.engine.close()
        chosen = worth_failing(calls, size(3, 12))
        for i in torture.cycles(len(chosen), len(chosen)):
            victim = Child([program, "2"])
            what = str(chosen[i])
            try:
                with faults.before(chosen[i], killing(victim)):
                    probe = host.register(plan, probe=what)
                    before = probe.hits
                    other.ask("call 5")
                    assert probe.hits - before == 5, what
                    assert {t.pid for t in probe.targets if t.state == "armed"} - {victim.pid} == {other.pid}, what
                    probe.unregister()
                    host.engine.close()
            finally:
                victim.kill()
            assert host.engine.processes() == [], what
        assert other.count()["wrong"] == 0
        clean(host, other, "")


def test_r4_a_target_is_killed_at_every_call_of_a_hit(
    host: Host, targets: Targets, faults: Faults, torture: Torture
) -> None:
    program = targets.build("hot")
    plan = host.files.plan(program, "target_hot")
    with targets.run("hot", "1") as other:
        probe = host.register(plan, fetches=_STRING)
        with faults.on() as calls:
            other.ask("call 2")
        chosen = worth_failing(calls, 12)
        killed_at_every_call_of_a_hit(host, faults, torture, chosen, [program, "1"], other, probe)


def killed_at_every_call_of_a_hit(
    host: Host,
    faults: Faults,
    torture: Torture,
    calls: Sequence[Call],
    argv: Sequence[str | Path],
    other: Child,
    probe: Probe,
) -> None:
    """Kills a victim before each of these calls, which its hit makes; another process with the probe is counted still."""
    for i in torture.cycles(len(calls), len(calls)):
        victim = Child(argv)
        try:
            host.reconcile(victim.pid)
            with faults.before(calls[i], killing(victim)):
                victim.send("call 2")
                victim.lines.next()
            while any(p.pid == victim.pid for p in host.engine.processes()) and faults.made(calls[i]):
                pass  # its end is served after the hit that it was killed in
            before = probe.hits
            other.ask("call 5")
            assert probe.hits - before == 5, calls[i]
        finally:
            victim.kill()


def killing(child: Child) -> Callable[[], None]:
    """Returns what kills a child from a tracer thread. (Popen's kill would wait for it first, and take a stop.)"""
    return lambda: os.kill(child.pid, signal.SIGKILL)


def test_an_errno_at_every_call_of_a_hit_where_sigtrap_is_blocked(
    host: Host, targets: Targets, faults: Faults, torture: Torture
) -> None:
    """More is done at such a hit: the kernel opened the signal, and it is put back."""
    plan = host.files.plan(targets.build("sigstate"), "target_sigstate")
    with targets.run("sigstate", "blocked") as child:
        state = child.ask("state")
        probe = host.register(plan, pid=child.pid)
        with faults.on() as calls:
            child.ask("call 2")
        for call, code, what in every(torture, calls):
            before = probe.hits
            with faults.at(call, code):
                child.ask("call 2")
            child.ask("call 3")
            assert probe.hits - before == 5, what
            assert child.ask("state") == state, what
        assert child.count()["wrong"] == 0


STORMS = {
    "hot": ("target_hot", ("4",), "start", "stop"),
    "forks": ("target_forks", (), "storm", "calm"),
    "signals": ("target_push", ("3",), "start", "stop"),
}


@pytest.mark.parametrize("name", STORMS)
def test_errnos_at_random_in_a_storm(host: Host, targets: Targets, faults: Faults, torture: Torture, name: str) -> None:
    """One call of a hundred fails, while programs run and probes come and go: counts may be short, nobody is harmed."""
    symbol, arguments, start, stop = STORMS[name]
    program = targets.build(name)
    plan = host.files.plan(program, symbol)
    dice = random.Random(1)

    def fails(call: Call) -> int:
        return dice.choice(call.errnos()) if call.errnos() and call.kind != "kcmp" and dice.random() < 0.01 else 0

    with targets.run(name, *arguments) as child:
        with faults.on(fails):
            child.ask(start)
            for cycle in torture.cycles(20, 1000):
                probe = host.register(plan, probe=f"p{cycle}")
                child.ask("count")
                probe.unregister()
            child.ask(stop, timeout=60)
        assert len(faults.failed) > 10
        torture.note(f"failed={len(faults.failed)}")
        count = child.count()
        assert (count.get("wrong", 0), count.get("failed", 0), count.get("outside", 0)) == (0, 0, 0)
        host.tick()
        probe = host.register(plan, probe="last", pid=child.pid)
        before = probe.hits
        if name != "signals":
            child.ask("call 5")
            assert probe.hits - before == 5
        probe.unregister()
        clean(host, child, name)
