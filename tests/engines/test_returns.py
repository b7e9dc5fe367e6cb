"""Return probes: each call that returns is a hit, each that does not is counted with its reason, and nothing of the target's
stack is written (semantics H6, H7). The oracle is the target's own counters; beside them, the kernel's uretprobe.
"""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from tests.engines.host import Host, Probe, altered_bytes
from tests.support import needs
from tests.support.children import Child
from tests.support.targets import Targets
from trapline_agent.engines.frames import ABANDONED, DISARMED, ENDED, EXECED, TOO_MANY
from trapline_agent.plans import LATENCY, FetchPlan

pytestmark = [needs.gcc, needs.ptrace_any, needs.x86_64]

RETVAL = FetchPlan(name="retval", register="rax")
TIME = FetchPlan(name="latency", register=LATENCY)
ARG0 = FetchPlan(name="arg0", register="rdi", entry=True)


def probe_on(host: Host, program: Path, *symbols: str, **where: object) -> Probe:
    plans = [host.files.plan(program, symbol, site=i) for i, symbol in enumerate(symbols)]
    return host.register(plans, fetches=[RETVAL, TIME, ARG0], returns=True, **where)


def values(probe: Probe, column: str) -> list[int]:
    return [int(v) for batch in probe.batches() for v in batch.columns[column]]


def settled(probe: Probe) -> None:
    """Each call is a hit or is explained."""
    assert probe.calls == probe.hits + sum(probe.unreturned.values())
    assert probe.in_flight == 0


def test_h6_counts_returns_and_values_and_leaves_no_trace(host: Host, targets: Targets) -> None:
    program = targets.build("returns")
    with targets.run("returns") as child:
        with host.untouched(child.pid):
            probe = probe_on(host, program, "target_ret", pid=child.pid)
            assert probe.states() == {"armed": 1}
            child.ask("call 1000")
            assert (probe.calls, probe.hits, probe.unreturned) == (1000, 1000, {})
            (batch,) = probe.batches()
            assert batch.columns["retval"].tolist() == [i * 7 + 1 for i in range(1000)]
            assert batch.columns["arg0"].tolist() == list(range(1000))
            assert (np.diff(batch.columns["ts"].astype(np.int64)) > 0).all()
            probe.unregister()
            host.engine.close()
        child.ask("call 10")
        assert probe.calls == 1000
        assert child.count()["wrong"] == 0


def test_h6_recursion_a_thousand_deep(host: Host, targets: Targets) -> None:
    program = targets.build("returns")
    with targets.run("returns") as child:
        probe = probe_on(host, program, "target_rec", pid=child.pid)
        child.ask("recurse 1000")
        child.ask("recurse 5000")
        assert (probe.calls, probe.hits, probe.unreturned) == (6000, 6000, {})
        retvals = values(probe, "retval")
        assert retvals == [n * (n + 1) // 2 for deep in (1000, 5000) for n in range(deep)]
        assert child.count() == {"calls": 6000, "returns": 6000, "left": 0, "wrong": 0}


def test_h6_longjmp_is_counted_and_never_a_wrong_match(host: Host, targets: Targets) -> None:
    program = targets.build("returns")
    with targets.run("returns") as child:
        probe = probe_on(host, program, "target_jumper", "target_frame", "target_ret", pid=child.pid)
        child.ask("jump 100")
        child.ask("call 50")
        count = child.count()
        assert (count["left"], count["returns"], count["wrong"]) == (200, 50, 0)
        assert (probe.calls, probe.hits) == (250, 50)
        # The last ones may be in flight, as far as anybody can tell.
        assert probe.unreturned == {ABANDONED: 200 - probe.in_flight}
        assert probe.in_flight <= 2
        probe.unregister()
        assert sum(probe.unreturned.values()) == 200
        settled(probe)


def test_h6_abandoned_calls_are_swept(host: Host, targets: Targets, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is left at another depth, so that no later call has its key."""
    monkeypatch.setattr("trapline_agent.engines.ptrace.memory.SWEEP_FROM", 64)
    monkeypatch.setattr("trapline_agent.engines.ptrace.returns.SWEEP_FROM", 64)
    program = targets.build("returns")
    with targets.run("returns") as child:
        probe = probe_on(host, program, "target_deep", "target_rec", pid=child.pid)
        for depth in range(200):
            child.ask(f"deep {depth}")
        child.ask("recurse 300")
        count = child.count()
        assert count["wrong"] == 0
        assert probe.hits == count["returns"] == 300
        assert probe.calls - probe.hits == count["left"] == 200
        assert probe.unreturned[ABANDONED] + probe.in_flight == 200
        assert probe.in_flight <= 64


def test_h6_more_calls_than_are_kept(host: Host, targets: Targets, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trapline_agent.engines.ptrace.returns.SWEEP_FROM", 64)
    monkeypatch.setattr("trapline_agent.engines.ptrace.returns.MAX_FRAMES", 128)
    monkeypatch.setattr("trapline_agent.engines.ptrace.memory.SWEEP_FROM", 64)
    program = targets.build("returns")
    with targets.run("returns") as child:
        probe = probe_on(host, program, "target_rec", pid=child.pid)
        child.ask("recurse 100")
        assert (probe.calls, probe.hits) == (100, 100)
        child.ask("recurse 1000")
        assert (probe.calls, probe.hits, probe.unreturned) == (1100, 228, {TOO_MANY: 872})
        assert child.count()["wrong"] == 0


@needs.gxx
def test_h6_a_throw_that_is_caught_where_the_call_was(host: Host, targets: Targets) -> None:
    """The catch clause goes on where the call would have returned to."""
    program = targets.build_cxx("throws")
    with Child([program]) as child:
        probe = probe_on(host, program, "target_throw", pid=child.pid)
        child.ask("swallow 100")
        assert child.count()["caught"] == 100
        assert (probe.calls, probe.hits) == (100, 0)
        assert probe.unreturned[ABANDONED] >= 99


@needs.gxx
def test_h6_cxx_throw_through_the_frame(host: Host, targets: Targets) -> None:
    program = targets.build_cxx("throws")
    with Child([program]) as child:
        probe = probe_on(host, program, "target_throw", "target_between", "target_cleanup", pid=child.pid)
        child.ask("throw 200")
        child.ask("call 100")
        count = child.count()
        assert count["wrong"] == 0
        assert count["caught"] == count["cleaned"] == 200
        assert probe.hits == count["returns"] == 100 + 200  # destructors return
        assert probe.calls - probe.hits == count["left"] == 400
        assert probe.unreturned.keys() <= {ABANDONED}


def test_h6_tail_calls_return_at_once(host: Host, targets: Targets) -> None:
    program = targets.build("returns")
    with targets.run("returns") as child:
        probe = probe_on(host, program, "target_tail", "target_ret", pid=child.pid)
        child.ask("tail 100")
        assert (probe.calls, probe.hits, probe.unreturned) == (200, 200, {})
        (batch,) = probe.batches()
        assert batch.columns["site"].tolist() == [1, 0] * 100, "the innermost first"
        assert batch.columns["retval"].tolist() == [(i + 1) * 7 + 1 for i in range(100) for _ in range(2)]
        assert batch.columns["arg0"].tolist() == [a for i in range(100) for a in (i + 1, i)]
        assert child.count()["wrong"] == 0


def test_h6_tail_recursion_is_exact_or_explained(host: Host, targets: Targets) -> None:
    """Two functions that jump to one another look like ones that are left by longjmp: none of them returns twice."""
    program = targets.build("returns")
    with targets.run("returns") as child:
        probe = probe_on(host, program, "target_even", "target_odd", pid=child.pid)
        child.ask("mutual 101")
        assert child.count()["wrong"] == 0
        assert probe.calls == 101
        assert probe.hits >= 1
        settled(probe)


def test_h6_longjmp_back_into_the_caller(host: Host, targets: Targets) -> None:
    """It goes on where the call would have returned to, by a jump, and at last calls another function from there."""
    program = targets.build("returns")
    with targets.run("returns") as child:
        probe = probe_on(host, program, "target_jumper", pid=child.pid)
        child.ask("loop 100")
        assert (probe.calls, probe.hits, probe.unreturned) == (100, 0, {ABANDONED: 100})
        assert child.count()["wrong"] == 0


def test_h6_signal_handlers(host: Host, targets: Targets) -> None:
    program = targets.build("returns")
    with targets.run("returns") as child:
        probe = probe_on(host, program, "target_raise", "target_ret", "on_signal", pid=child.pid)
        child.ask("signal 100")
        count = child.count()
        assert (probe.calls, probe.hits, probe.unreturned) == (500, 500, {})
        assert count["returns"] == 300
        assert count["wrong"] == 0


def test_h6_coroutines(host: Host, targets: Targets) -> None:
    program = targets.build("returns")
    with targets.run("returns") as child:
        probe = probe_on(host, program, "target_co", pid=child.pid)
        child.ask("coro 50")
        assert (probe.calls, probe.hits, probe.unreturned) == (50, 50, {})
        assert values(probe, "retval") == list(range(1, 51))
        child.ask("migrate")
        assert (probe.calls, probe.hits, probe.unreturned) == (51, 51, {})
        assert child.count()["wrong"] == 0


def test_h6_threads_and_many_callers(host: Host, targets: Targets) -> None:
    program = targets.build("returns")
    with targets.run("returns") as child:
        probe = probe_on(host, program, "target_rec", "target_ret", pid=child.pid)
        child.ask("threads 64 20", timeout=60)
        count = child.count()
        assert probe.calls == probe.hits == count["calls"] == 64 * 20 * 8
        child.ask("callers 20")
        count = child.count()
        assert count["wrong"] == 0
        assert probe.calls == count["calls"]
        no_room = probe.unreturned.get("NoRoom", 0)
        assert probe.hits + no_room == count["returns"]
        assert probe.unreturned.keys() <= {"NoRoom"}
        settled(probe)


def test_h6_fork_in_the_middle(host: Host, targets: Targets) -> None:
    program = targets.build("returns")
    with targets.run("returns") as child:
        probe = probe_on(host, program, "target_fork", "target_ret")
        for _ in range(20):
            child.ask("fork 7")
        count = child.count()
        assert count["returns"] == 40, "in the parent and in the child"
        assert (probe.calls, probe.hits, probe.unreturned) == (40, 40, {})
        (batch,) = probe.batches()
        by_child = [v for v, pid in zip(batch.columns["retval"], batch.columns["pid"], strict=True) if pid != child.pid]
        assert [int(v) for v in by_child] == [2**64 - 1] * 20
        child.ask("vfork 3")
        assert child.count()["wrong"] == 0
    with targets.run("returns") as child:
        only = probe_on(host, program, "target_fork", probe="only", pid=child.pid)
        child.ask("fork 7")
        assert (only.calls, only.hits, only.unreturned) == (1, 1, {}), "the child is outside of the selector"


def test_h6_exec_in_the_middle(host: Host, targets: Targets) -> None:
    program = targets.build("returns")
    with targets.run("returns") as child:
        probe = probe_on(host, program, "target_exec", "target_ret", pid=child.pid)
        child.ask("hold")
        assert child.ask("exec").startswith("ready")
        assert probe.unreturned == {EXECED: 1}
        child.ask("call 10")
        assert (probe.calls, probe.hits) == (11, 10)
        assert child.count()["wrong"] == 0


def test_h7_threads_and_processes_that_end_inside(host: Host, targets: Targets) -> None:
    program = targets.build("returns")
    with targets.run("returns") as child:
        probe = probe_on(host, program, "target_leave", "target_exit", "target_ret", pid=child.pid)
        child.ask("leave 50")
        assert (probe.calls, probe.hits) == (50, 0)
        child.ask("call 10")
        child.send("exit 0")
        assert child.wait() == 0
        wait_until_gone(host, child.pid)
        assert (probe.calls, probe.hits) == (61, 10)
        # A thread may get the stack of one whose end was not told of yet.
        assert sum(probe.unreturned.values()) == 51
        assert probe.unreturned.keys() <= {ENDED, ABANDONED}
        assert probe.unreturned[ENDED] >= 1


def wait_until_gone(host: Host, pid: int) -> None:
    """The engine is told of the end after the parent is."""
    host.looks.run(lambda: host.table.candidates(), "reconcile")
    deadline = 1000
    while any(p.pid == pid for p in host.engine.processes()):
        os.sched_yield()
        deadline -= 1
        if not deadline:
            signal.sigtimedwait([], 0.01)
            deadline = 1000


def test_h7_unregister_with_calls_in_flight(host: Host, targets: Targets) -> None:
    program = targets.build("returns")
    with targets.run("returns") as child:
        with host.untouched(child.pid):
            probe = probe_on(host, program, "target_hold", "target_ret", pid=child.pid)
            other = probe_on(host, program, "target_hold", probe="other", pid=child.pid)
            child.ask("hold")
            child.ask("call 3")
            assert (probe.calls, probe.hits, probe.in_flight) == (4, 3, 1)
            probe.unregister()
            assert (probe.calls, probe.hits, probe.unreturned) == (4, 3, {DISARMED: 1})
            child.ask("go")
            assert (other.calls, other.hits, other.unreturned) == (1, 1, {}), "the other one saw it return"
            other.unregister()
            host.engine.close()
        assert child.count() == {"calls": 4, "returns": 4, "left": 0, "wrong": 0}


def test_h7_no_byte_is_left_though_calls_are_in_flight(host: Host, targets: Targets) -> None:
    program = targets.build("returns")
    with targets.run("returns") as child:
        probe = probe_on(host, program, "target_hold", pid=child.pid)
        child.ask("hold")
        assert len(altered_bytes(child.pid, [program])) >= 2
        probe.unregister()
        host.engine.close()
        assert altered_bytes(child.pid, [program]) == {}
        child.ask("go")
        assert child.count()["wrong"] == 0


def test_h7_latency_is_the_time_of_the_call(host: Host, targets: Targets) -> None:
    program = targets.build("returns")
    with targets.run("returns") as child:
        probe = probe_on(host, program, "target_sleep", pid=child.pid)
        slept = []
        for ns in (1_000_000, 20_000_000, 300_000_000):
            began = time.monotonic_ns()
            answer = re.search(r"slept (\d+)", child.ask(f"sleep {ns}"))
            assert answer is not None
            slept.append((int(answer[1]), time.monotonic_ns() - began))
        latencies = values(probe, "latency")
        assert len(latencies) == 3
        for (inside, outside), seen in zip(slept, latencies, strict=True):
            assert inside <= seen <= outside


def test_h6_the_stack_is_as_it_was(host: Host, targets: Targets) -> None:
    program = targets.build("returns")
    with targets.run("returns") as child:
        child.ask("stack 1")
        probe = probe_on(host, program, "target_stack", pid=child.pid)
        child.ask("stack 100")
        assert probe.hits == 100
        assert child.count()["wrong"] == 0


def test_strings_of_entry_and_return(host: Host, targets: Targets) -> None:
    program = targets.build("returns")
    fetches = [
        FetchPlan(name="before", register="rdi", string=True, entry=True),
        FetchPlan(name="after", register="rdi", string=True, entry=True, late=True),
        FetchPlan(name="result", register="rax"),
        FetchPlan(name="text", register="rsi", string=True, entry=True, max_bytes=3),
    ]
    with targets.run("returns") as child:
        probe = host.register(host.files.plan(program, "target_fill"), fetches=fetches, returns=True, pid=child.pid)
        child.ask("fill hello")
    (hit,) = next(iter(probe.batches())).hits()
    assert hit.args == {"before": "before", "after": "hello", "result": 5, "text": "hel"}
    assert hit.status == {"text": "truncated"}


def test_an_entry_probe_where_calls_return_to(host: Host, targets: Targets) -> None:
    """One breakpoint serves both, and stays as long as one of them wants it."""
    program = targets.build("returns")
    with targets.run("returns") as child:
        probe = probe_on(host, program, "target_ret", pid=child.pid)
        child.ask("tail 1")
        child.ask("call 1")
        points = [offset for _, offset in altered_bytes(child.pid, [program]) if offset]
        entry = host.files.plan(program, "target_ret").offset
        main = host.files.plan(program, "main")
        returning = [
            o for o in points if o != entry and altered_bytes(child.pid, [program])[str(program), o][1] == 0xCC
        ]
        assert returning
        plans = [host.files.plan(program, "main", offset=o - main.offset) for o in returning]
        both = host.register(plans, probe="both", pid=child.pid)
        assert both.states() == {"armed": len(plans)}
        child.ask("call 10")
        assert probe.hits == 12
        assert both.hits == 10
        both.unregister()
        child.ask("call 10")
        assert (probe.hits, both.hits) == (22, 10)
        both = host.register(plans, probe="both", pid=child.pid)
        probe.unregister()
        child.ask("call 10")
        assert (probe.hits, both.hits) == (22, 10)
        both.unregister()
        host.engine.close()
        assert altered_bytes(child.pid, [program]) == {}


def test_code_that_was_made_at_run_time_is_said(host: Host, targets: Targets) -> None:
    program = targets.build("returns")
    with targets.run("returns") as child:
        probe = probe_on(host, program, "target_ret", pid=child.pid)
        child.ask("generated 5")
        assert (probe.calls, probe.hits, probe.unreturned) == (5, 0, {"GeneratedCode": 5})
        child.ask("call 5")
        assert probe.hits == 5
        assert child.count()["wrong"] == 0


def test_r13_return_probes_come_and_go_under_load(host: Host, targets: Targets) -> None:
    """calls inside [registered, unregister called] <= hits + calls that were in flight <= calls in the outer window."""
    program = targets.build("hot")
    plan = host.files.plan(program, "target_hot")
    with targets.run("hot", "4") as child:
        child.ask("start")
        for cycle in range(20):
            before = child.count()
            probe = host.register(plan, probe=f"p{cycle}", returns=True, pid=child.pid)
            first = child.count()
            last = child.count()
            probe.unregister()
            after = child.count()
            assert last["done"] - first["begun"] <= probe.calls <= after["begun"] - before["done"]
            assert probe.unreturned.keys() <= {DISARMED}
            settled(probe)
        child.ask("stop")
        count = child.count()
        assert (count["wrong"], count["done"]) == (0, count["begun"])
        host.engine.close()
        assert altered_bytes(child.pid, [program]) == {}


@needs.uprobe
def test_h6_as_many_as_the_kernel_counts(host: Host, targets: Targets) -> None:
    """On a consecutive run, where the kernel's uretprobe can follow: less than 64 deep, without longjmp."""
    from tests.support.uprobe import kernel_count

    program = targets.build("returns")
    commands = ("call 300", "recurse 40", "tail 20", "signal 10")
    with targets.run("returns") as child:
        probe = probe_on(host, program, "target_ret", pid=child.pid)
        for command in commands:
            child.ask(command)
        probe.unregister()
        host.engine.close()
        offset = host.files.plan(program, "target_ret").offset
        with kernel_count(program, offset, returns=True) as counted:
            for command in commands:
                child.ask(command)
            assert counted() == probe.hits
        assert child.count()["wrong"] == 0


@needs.go
def test_h6_go_stack_growth_and_goroutines_that_change_threads(host: Host, targets: Targets) -> None:
    program = targets.build_go("gotarget")
    with Child([program]) as child:
        plans = [go_plan(host, program, f"main.{name}", i) for i, name in enumerate(("deep", "yielding", "recovered"))]
        assert plans[0].go
        probe = host.register(plans, fetches=[RETVAL, TIME], returns=True, pid=child.pid)
        for command in ("deep 1000", "yield 200", "recover 50"):
            child.ask(command, timeout=60)
        count = child.count()
        assert count["wrong"] == 0
        assert probe.hits == count["returns"]
        assert probe.calls == count["calls"]
        assert probe.unreturned.keys() <= {ABANDONED}
        assert probe.calls - probe.hits == count["left"]
        probe.unregister()
        host.engine.close()
        child.ask("deep 100")
        assert altered_bytes(child.pid, [program]) == {}


def go_plan(host: Host, program: Path, symbol: str, site: int) -> object:
    """The plan that the resolver makes."""
    from trapline.spec import parse_probe
    from trapline_agent.resolve import Resolver

    plan = Resolver("h", "h", [os.getpid()], 0).resolve(parse_probe(f'ur:{program}:"{symbol}"'))
    (made,) = plan.plans
    import msgspec

    return msgspec.structs.replace(made, site=site)


def test_returns_under_a_storm_of_signals(host: Host, targets: Targets) -> None:
    """Handlers interrupt calls anywhere, entries and return points included, and call probed functions themselves."""
    program = targets.build("signals")
    with targets.run("signals", "8") as child:
        symbols = ("target_push", "target_imul", "target_inner", "on_signal")
        plans = [host.files.plan(program, symbol, site=i) for i, symbol in enumerate(symbols)]
        probes = [host.register(p, probe=s, returns=True, pid=child.pid) for p, s in zip(plans, symbols, strict=True)]
        child.ask("start")
        for _ in range(200):
            child.count()
        child.ask("stop")
        count = child.count()
        push, imul, inner, handler = (p.hits for p in probes)
        assert count["wrong"] == 0
        assert push + imul == count["done"] == count["begun"]
        assert inner == count["inner"] == handler
        assert [p.unreturned for p in probes] == [{}] * 4
        for probe in probes:
            settled(probe)


def test_returns_in_children_of_every_kind(host: Host, targets: Targets) -> None:
    program = targets.build("forks")
    with targets.run("forks") as child:
        probe = probe_on(host, program, "target_forks")
        child.ask("storm")
        while child.count()["done"] < 200:
            pass
        child.ask("calm", timeout=60)
        count = child.count()
        assert count["failed"] == 0
        assert probe.calls == probe.hits == count["done"] > 0
        assert probe.unreturned == {}
