"""The first hit of a place without room, at which the process maps slot pages: whatever comes between (ADR 0012)."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.engines.host import Host
from tests.engines.test_slots import full
from tests.support import needs
from tests.support.children import Child
from tests.support.targets import Targets
from tests.torture.faults import Call, Faults, worth_failing
from tests.torture.scale import Torture
from tests.torture.test_faults import clean, every, killed_at_every_call_of_a_hit
from trapline_agent.plans import SitePlan

pytestmark = [needs.gcc, needs.ptrace_any, needs.x86_64, pytest.mark.slack]


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Faults:
    return Faults(monkeypatch)


def first_hit(host: Host, faults: Faults, program: Path, plan: SitePlan) -> list[Call]:
    """Returns the calls that a first hit makes."""
    with Child([program]) as child:
        host.register(plan, pid=child.pid)
        with faults.on() as calls:
            child.ask("call 1")
        assert any(call.name == "PTRACE_SYSCALL" for call in calls)
        host.unregister()
        host.engine.close()
        return worth_failing(calls, 6)


def test_an_errno_at_every_call_of_a_first_hit(host: Host, targets: Targets, faults: Faults, torture: Torture) -> None:
    """It counts, or is taken out with the reason; the program is right in any case."""
    program = full(host, targets)
    plan = host.files.plan(program, "target_slots")
    refused = 0
    for call, code, what in every(torture, first_hit(host, faults, program, plan)):
        with Child([program]) as child:
            probe = host.register(plan, pid=child.pid)
            with faults.at(call, code):
                child.ask("call 2")
            child.ask("call 3")
            (target,) = probe.targets
            if target.state == "armed":
                assert probe.hits == 5, what
            else:
                refused += 1
                assert target.reason, what
                assert target.may_have_missed, what
                assert probe.hits < 5, what
            assert child.count()["wrong"] == 0, what
            probe.unregister()
            clean(host, child, what)
    torture.note(f"refused={refused}")


def between(
    host: Host, targets: Targets, faults: Faults, torture: Torture
) -> Iterator[tuple[Child, Callable[[Callable[[], object]], None], str]]:
    """Yields a child for each call of a first hit; what is given to the function happens right before the call."""
    program = full(host, targets)
    plan = host.files.plan(program, "target_slots")
    calls = first_hit(host, faults, program, plan)
    for i in torture.cycles(len(calls), len(calls)):
        with Child([program]) as child:
            probe = host.register(plan, pid=child.pid)

            def during(act: Callable[[], object], child: Child = child, call: Call = calls[i]) -> None:
                with faults.before(call, act):
                    child.send("call 3")
                    child.wait_for("called")

            yield child, during, str(calls[i])
            count = child.count()
            assert (probe.hits, count["wrong"]) == (count["done"], 0), calls[i]
            probe.unregister()
            clean(host, child, str(calls[i]))


def test_a_signal_at_every_call_of_a_first_hit(host: Host, targets: Targets, faults: Faults, torture: Torture) -> None:
    """Its handler runs into the same breakpoint."""
    for child, during, what in between(host, targets, faults, torture):
        during(lambda pid=child.pid: os.kill(pid, signal.SIGUSR1))  # type: ignore[misc]
        assert child.count()["signals"] == 1, what


def test_a_stop_at_every_call_of_a_first_hit(host: Host, targets: Targets, faults: Faults, torture: Torture) -> None:
    """It stops as it would have, and goes on when it is told to."""
    for child, during, what in between(host, targets, faults, torture):
        came = threading.Event()

        def stop(pid: int = child.pid, came: threading.Event = came) -> None:
            os.kill(pid, signal.SIGSTOP)
            came.set()

        def go_on(pid: int = child.pid, came: threading.Event = came) -> None:
            came.wait()
            while not any(call.name == "PTRACE_LISTEN" for call in faults.calls):
                pass
            os.kill(pid, signal.SIGCONT)

        other = threading.Thread(target=go_on, daemon=True)
        other.start()
        during(stop)
        other.join()
        assert came.is_set(), what


def test_a_stop_that_is_taken_back_at_every_call_of_a_first_hit(
    host: Host, targets: Targets, faults: Faults, torture: Torture
) -> None:
    for child, during, _ in between(host, targets, faults, torture):

        def stop_and_go(pid: int = child.pid) -> None:
            os.kill(pid, signal.SIGSTOP)
            os.kill(pid, signal.SIGCONT)

        during(stop_and_go)


def test_a_target_is_killed_at_every_call_of_a_first_hit(
    host: Host, targets: Targets, faults: Faults, torture: Torture
) -> None:
    program = full(host, targets)
    plan = host.files.plan(program, "target_slots")
    calls = first_hit(host, faults, program, plan)
    with Child([program]) as other:
        probe = host.register(plan)
        killed_at_every_call_of_a_hit(host, faults, torture, calls, [program], other, probe)
        assert other.count()["wrong"] == 0
