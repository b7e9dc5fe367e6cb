"""A hot loop in another program, from the tracer's breaker to what people are told of it."""

from __future__ import annotations

import signal
import sys

from tests.engines.host import untouched
from tests.support import children, needs
from tests.support.children import Child
from tests.system.stack import GETPPID, Stack, caller, line_with
from trapline.model import Phase, Probe, TargetState

pytestmark = [needs.ptrace_any, needs.x86_64]

BUDGETS = {"TRAPLINE_AGENT_OVERHEAD_PROBE": "0.02", "TRAPLINE_AGENT_OVERHEAD_BURST_S": "0.2"}

"""So little that a hot loop is beyond it on a machine with much other work too, where it hardly gets to run."""


def is_over(probe: Probe) -> bool:
    return any(c.reason == "OverBudget" for c in probe.status.conditions)


def test_what_is_not_counted_is_told_and_counting_goes_on_when_it_calms_down() -> None:
    with caller() as target, untouched(target.pid), Stack(agent_env=BUDGETS) as stack:
        probe = stack.arm(f"{GETPPID} @ pid={target.pid}")
        target.ask("call 100")
        stack.exactly(probe.id, 100)
        target.ask("start")
        now = stack.client.wait_for(probe.id, is_over)
        assert now.status.phase is Phase.PARTIAL
        (condition,) = (c for c in now.status.conditions if c.reason == "OverBudget")
        assert (condition.type, condition.status) == ("Exact", "False")
        (at,) = stack.client.targets(probe.id)
        assert (at.state, at.reason) == (TargetState.THROTTLED, "OverBudget")
        stack.client.wait_for(probe.id, lambda p: p.status.counters.uncovered_ms > 1000)
        (at,) = stack.client.targets(probe.id)
        assert at.covered < 0.6
        shown = stack.cli("probe", "show", probe.id).stdout
        assert "not seen for" in shown
        assert "throttled" in shown
        target.ask("stop")
        # It calms down, and every call is counted again; what was missed stays told.
        now = stack.client.wait_for(probe.id, lambda p: p.status.phase is Phase.ARMED)
        assert now.status.conditions == []
        before, calls = now.status.counters, int(target.ask("call 0"))
        assert before.uncovered_ms > 1000
        assert 0 < before.hits < calls
        target.ask("call 200")
        now = stack.until_hits(probe.id, before.hits + 200)
        assert (now.status.counters.hits, now.status.counters.dropped) == (before.hits + 200, 0)
        assert len(stack.recorded(probe.id, before.hits + 200)) == before.hits + 200
        stack.client.delete_probe(probe.id)


def test_the_breaker_needs_neither_agent_nor_service() -> None:
    with caller() as target, untouched(target.pid), Stack(agent_env=BUDGETS, lease_s=60.0) as stack:
        probe = stack.arm(f"{GETPPID} @ pid={target.pid}")
        for child in (stack.agent, stack.service):
            child.signal(signal.SIGKILL)
            child.wait()
        target.ask("start")
        line_with(stack.tracer, "throttled")
        target.ask("stop")
        stack.start_service()
        stack.start_agent()
        now = stack.client.wait_for(probe.id, lambda p: p.status.phase is Phase.ARMED)
        stack.client.wait_for(probe.id, lambda p: p.status.counters.uncovered_ms > 0)
        stack.client.delete_probe(now.id)


def test_a_probe_without_a_budget_counts_all() -> None:
    with caller() as target, untouched(target.pid), Stack(agent_env=BUDGETS) as stack:
        probe = stack.arm(f"{GETPPID} @ pid={target.pid}", overhead="off")
        calls = int(target.ask("call 50000"))
        now = stack.until_hits(probe.id, calls)
        assert (now.status.counters.hits, now.status.counters.uncovered_ms) == (calls, 0)
        stack.client.delete_probe(probe.id)
        added = stack.cli("probe", "add", "--overhead", "5%", "--json", f"{GETPPID} @ pid={target.pid}")
        assert '"overhead":0.05' in added.stdout
        wrong = stack.cli("probe", "add", "--overhead", "much", GETPPID)
        assert wrong.returncode == 2
        assert "'much' is neither a percentage" in wrong.stderr


def test_trace_says_when_it_does_not_count_all() -> None:
    with caller() as target, untouched(target.pid):
        argv = [sys.executable, "-m", "trapline", "trace", GETPPID, "-p", str(target.pid), "-o", "/dev/null"]
        with Child([*argv, "--overhead", "1%"], ready=None, session=True) as trace:
            assert trace.popen.stderr is not None
            assert b"armed in 1 process" in trace.popen.stderr.readline()
            target.ask("start")
            while b"throttled in process" not in (line := trace.popen.stderr.readline()):
                assert line, "the trace ended"
            assert b"may add 1%; --overhead sets" in line
            target.ask("stop")
            trace.signal(signal.SIGINT)
            _, rest = trace.popen.communicate(timeout=children.TIMEOUT_S)
        assert trace.popen.returncode == 0
        assert "there were more hits than these, not seen for" in rest.decode()
