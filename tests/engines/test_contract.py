"""What every engine must do, whatever it is made of: the rules of docs/architecture/semantics.md, each named in its tests.

It runs unchanged over every engine of host.ENGINES, and speaks to targets only by commands and answers, so that they may
be real programs or their likenesses. What is marked ``traps`` is for engines that say so of themselves (``Capabilities``).
The oracle is always the target's own counter.
"""

from __future__ import annotations

import signal
import time
from collections import Counter

import pytest
from msgspec import structs

from tests.engines.host import Host, Probe
from tests.support import needs
from tests.support.children import Child, fields, python, stopped
from tests.support.targets import Targets
from trapline.protocol.hits import ValueStatus
from trapline_agent.kernel import procfs, ptrace
from trapline_agent.plans import AggregatePlan, FetchPlan

traps = pytest.mark.traps


def test_s3_counts_every_call_and_leaves_no_trace(host: Host, targets: Targets) -> None:
    program = targets.build("hot")
    with targets.run("hot", "1") as child:
        with host.untouched(child.pid):
            probe = host.register(host.files.plan(program, "target_hot"), pid=child.pid)
            assert probe.states() == {"armed": 1}
            child.ask("call 1000")
            assert probe.hits == 1000
            probe.unregister()
            host.engine.close()
        child.ask("call 500")
        assert probe.hits == 1000
        assert child.count()["wrong"] == 0


@traps
def test_registers_and_strings_are_those_of_the_call(host: Host, targets: Targets) -> None:
    program = targets.build("hot")
    fetches = [
        FetchPlan(name="i", register="rdi"),
        FetchPlan(name="s", register="rsi", string=True),
        FetchPlan(name="short", register="rsi", string=True, max_bytes=4),
    ]
    with targets.run("hot", "1") as child:
        probe = host.register(host.files.plan(program, "target_hot"), fetches=fetches, pid=child.pid)
        child.ask("call 5 héllo")
        child.ask("callp 1 0")
        child.ask("callp 1 16")
    (batch,) = probe.batches()
    hits = list(batch.hits())
    assert [h.args["i"] for h in hits] == [0, 1, 2, 3, 4, 0, 0]
    assert [h.args["s"] for h in hits] == ["héllo"] * 5 + [None, None]
    assert hits[0].args["short"] == "hél"
    assert hits[0].status == {"short": ValueStatus.TRUNCATED.text}
    assert hits[5].status["s"] == ValueStatus.NULL.text
    assert hits[6].status["s"] == ValueStatus.FAULT.text
    assert {h.pid for h in hits} == {child.pid}
    assert [h.seq for h in hits] == list(range(7))
    assert [int(h.ts_ns) for h in hits] == sorted(int(h.ts_ns) for h in hits)


def test_h1_an_aggregate_counts_every_call_of_all_threads(host: Host, targets: Targets) -> None:
    program = targets.build("hot")
    with targets.run("hot", "4") as child:
        site = host.files.plan(program, "target_hot")
        probes = [
            host.register(
                site,
                probe="by thread",
                aggregate=AggregatePlan("count", by=1),
                fetches=[FetchPlan("tid", "tid")],
                pid=child.pid,
            ),
            host.register(site, probe="alone", aggregate=AggregatePlan("count"), pid=child.pid),
        ]
        child.ask("start")
        while child.count()["done"] < 200:
            pass
        child.ask("stop")
        done = child.count()["done"]
        by_thread, alone = (probe.table() for probe in probes)
    assert by_thread.count == alone.count == probes[0].hits == done
    assert len(by_thread.cells) == (4 if host.engine.capabilities().traps else 1)
    assert {key: cell.count for key, cell in alone.cells.items()} == {(): done}


@traps
def test_an_aggregate_is_of_the_calls_own_values(host: Host, targets: Targets) -> None:
    program = targets.build("hot")
    arg0, text = FetchPlan("arg0", "rdi"), FetchPlan("s", "rsi", string=True)
    with targets.run("hot", "1") as child:
        site = host.files.plan(program, "target_hot")
        hist = host.register(
            site, probe="hist", aggregate=AggregatePlan("hist", by=1), fetches=[text, arg0], pid=child.pid
        )
        top = host.register(site, probe="top", aggregate=AggregatePlan("topk", (2,)), fetches=[text], pid=child.pid)
        returned = [structs.replace(text, entry=True), FetchPlan("retval", "rax")]
        result = host.register(
            site, probe="sum", aggregate=AggregatePlan("sum", by=1), fetches=returned, returns=True, pid=child.pid
        )
        child.ask("call 300 one")
        child.ask("call 5 two")
        child.ask("callp 2 0")
        cells = {key: cell.bins for key, cell in hist.table().cells.items()}
        one, two, null = ((b"one", 0),), ((b"two", 0),), ((None, ValueStatus.NULL),)
        assert cells[one] == Counter(i.bit_length() for i in range(300))
        assert (cells[two], cells[null]) == ({0: 1, 1: 1, 2: 2, 3: 1}, {0: 1, 1: 1})
        (cell,) = top.table().cells.values()
        assert (cell.items, cell.bad) == ({one[0]: 300, two[0]: 5}, {ValueStatus.NULL: 2})
        sums = {key: cell.sum for key, cell in result.table().cells.items()}
        assert sums == {one: sum(i * 3 + 1 for i in range(300)), two: 35, null: 5}  # what target_hot returns


@traps
def test_six_arguments(host: Host, targets: Targets) -> None:
    program = targets.build("hot")
    names = ("rdi", "rsi", "rdx", "rcx", "r8", "r9")
    fetches = [FetchPlan(name=f"arg{i}", register=r, string=i == 5) for i, r in enumerate(names)]
    with targets.run("hot", "1") as child:
        probe = host.register(host.files.plan(program, "target_six"), fetches=fetches, pid=child.pid)
        child.ask("six")
    (hit,) = next(iter(probe.batches())).hits()
    assert list(hit.args.values()) == [1, 2, 3, 4, 5, "six"]


def test_all_threads_and_those_that_come_later(host: Host, targets: Targets) -> None:
    program = targets.build("hot")
    with targets.run("hot", "4") as child:
        probe = host.register(host.files.plan(program, "target_hot"), pid=child.pid)
        child.ask("start")
        child.ask("spawn 4")
        while not child.count()["done"]:
            pass
        child.ask("stop")
        count = child.count()
        assert probe.hits == count["done"] == count["begun"] > 0
        assert count["wrong"] == 0
        probe.unregister()


def test_r13_window_is_exact_while_threads_run(host: Host, targets: Targets) -> None:
    """calls inside [registered, unregister called] <= hits <= calls inside [register called, unregistered]."""
    program = targets.build("hot")
    plan = host.files.plan(program, "target_hot")
    with targets.run("hot", "4") as child:
        child.ask("start")
        for cycle in range(20):
            before = child.count()
            probe = host.register(plan, probe=f"p{cycle}", pid=child.pid)
            first = child.count()
            last = child.count()
            probe.unregister()
            after = child.count()
            assert last["done"] - first["begun"] <= probe.hits <= after["begun"] - before["done"]
        with stopped(child):
            assert child.count()["wrong"] == 0
            host.engine.close()
            assert host.altered(child.pid) == {}


def test_r7_cycles_under_load(host: Host, targets: Targets) -> None:
    """A thread that has hit just before the byte goes runs the instruction itself: no call is lost, nobody dies."""
    plan = host.files.plan(targets.build("hot"), "target_hot")
    with targets.run("hot", "4") as child:
        child.ask("start")
        for _ in range(100):
            host.register(plan, pid=child.pid)
            host.unregister()
        child.ask("stop")
        count = child.count()
        assert count["done"] == count["begun"] > 0
        assert count["wrong"] == 0
        host.engine.close()
        assert host.altered(child.pid) == {}


def test_r3_registering_twice_changes_nothing(host: Host, targets: Targets) -> None:
    plan = host.files.plan(targets.build("hot"), "target_hot")
    with targets.run("hot", "1") as child:
        probe = host.register(plan, pid=child.pid)
        once = host.altered(child.pid, [targets.build("hot")])
        again = host.register(plan, pid=child.pid)
        assert host.altered(child.pid, [targets.build("hot")]) == once
        child.ask("call 10")
        assert again.hits == probe.hits == 10


def test_r1_consumers_share_a_site(host: Host, targets: Targets) -> None:
    program = targets.build("hot")
    plan = host.files.plan(program, "target_hot")
    with targets.run("hot", "1") as child:
        probes = [host.register(plan, probe=f"p{i}", pid=child.pid) for i in range(3)]
        armed = host.altered(child.pid, [program])
        assert [p.states() for p in probes] == [{"armed": 1}] * 3, "each is told, not the first alone"
        child.ask("call 7")
        for probe in probes[:-1]:
            probe.unregister()
            assert host.altered(child.pid, [program]) == armed, "the others still want it"
        child.ask("call 5")
        assert [p.hits for p in probes] == [7, 7, 12]
        probes[-1].unregister()
        host.engine.close()
        assert host.altered(child.pid, [program]) == {}


def test_r16_selector_leaves_other_processes_alone(host: Host, targets: Targets) -> None:
    program = targets.build("hot")
    with targets.run("hot", "1") as chosen, targets.run("hot", "1") as other, host.untouched(other.pid):
        probe = host.register(host.files.plan(program, "target_hot"), pid=chosen.pid)
        chosen.ask("call 3")
        other.ask("call 100")
        assert probe.hits == 3
        assert {t.pid for t in probe.targets} == {chosen.pid}
        assert host.altered(other.pid, [program]) == {}


def test_r16_without_selector_every_process_that_maps_the_file(host: Host, targets: Targets) -> None:
    program = targets.build("hot")
    with targets.run("hot", "1") as a, targets.run("hot", "1") as b:
        probe = host.register(host.files.plan(program, "target_hot"))
        a.ask("call 3")
        b.ask("call 4")
        assert probe.hits == 7
        probe.unregister()


@traps
def test_h3_every_kind_of_first_instruction(host: Host, targets: Targets) -> None:
    """The target compares the whole register file, the flags and memory with what they were unprobed."""
    program = targets.build("prologues")
    with targets.run("prologues") as child:
        names = child.ask("list").split()[1:]
        refused, armed = {}, []
        for name in names:
            probe = host.register(host.files.plan(program, name), probe=name, pid=child.pid)
            (target,) = probe.targets
            if target.state == "refused":
                refused[name] = target.reason
                continue
            before = fields(child.ask("count"))[name.removeprefix("p_")]
            assert fields(child.ask(f"run {name} 3"))["wrong"] == 0, child.ask("why")
            after = fields(child.ask("count"))[name.removeprefix("p_")]
            assert probe.hits == after - before, name
            armed.append(name)
            probe.unregister()
            assert fields(child.ask(f"run {name} 1"))["wrong"] == 0, child.ask("why")
        assert set(refused.values()) <= {"CannotDisplace"}, refused
        assert refused.keys() <= {"p_syscall_getpid", "p_cpuid"}, "only what enters the kernel is refused"
        assert len(armed) >= 25


def test_p1_children_of_every_kind(host: Host, targets: Targets) -> None:
    program = targets.build("forks")
    with targets.run("forks") as child:
        probe = host.register(host.files.plan(program, "target_forks"))
        for kind in ("fork", "vfork", "spawn", "clone", "thread", "call"):
            before, hits = child.count()["done"], probe.hits
            child.ask(f"{kind} 20")
            assert child.count()["done"] - before == 20
            assert probe.hits - hits == 20, kind
        assert child.count()["failed"] == 0
        probe.unregister()


def test_p1_children_outside_the_selector_are_clean(host: Host, targets: Targets) -> None:
    program = targets.build("forks")
    with targets.run("forks") as child:
        probe = host.register(host.files.plan(program, "target_forks"), pid=child.pid)
        held = int(child.ask("hold 50").split()[-1])
        while host.follows(held):
            pass  # it stands still at its birth until it is clean and let go
        assert host.altered(held, [program]) == {}
        child.ask("go")
        child.ask("call 5")
        assert probe.hits == 5
        assert child.count()["failed"] == 0


def test_r2_storm_of_children_while_registering(host: Host, targets: Targets) -> None:
    program = targets.build("forks")
    plan = host.files.plan(program, "target_forks")
    with targets.run("forks") as child:
        child.ask("storm")
        for cycle in range(20):
            host.register(plan, probe=f"p{cycle}")
            host.unregister(f"p{cycle}")
        probe = host.register(plan, probe="last")
        start = child.count()
        child.ask("call 10")
        child.ask("calm")
        end = child.count()
        assert end["failed"] == 0, "a child died"
        assert probe.hits >= end["done"] - start["begun"] > 0
        host.unregister("last")


@pytest.mark.parametrize("command", ["exec", "exec-thread"])
def test_p2_exec_drops_the_old_image_and_arms_the_new(host: Host, targets: Targets, command: str) -> None:
    program = targets.build("execs")
    with targets.run("execs") as child:
        probe = host.register(host.files.plan(program, "target_execs"), pid=child.pid)
        child.ask("call 10")
        child.send(command)
        child.wait_for("ready")
        child.ask("call 10")
        count = child.count()
        assert probe.hits == count["done"] == 20
        assert count["wrong"] == 0
        assert {t.cause for t in probe.targets if t.state == "armed"} == {"exec"}
        assert not any(t.may_have_missed for t in probe.targets)


def test_p3_library_opened_later_is_armed_before_it_runs(host: Host, targets: Targets) -> None:
    library = targets.library()
    with targets.run("dl", library) as child:
        probe = host.register(host.files.plan(library, "dlfn"), pid=child.pid)
        assert probe.targets == []
        child.ask("open")
        child.ask("call 10")
        child.ask("close")
        child.ask("cycle 20 3")
        count = child.count()
        assert probe.hits == count["done"] == 70
        assert count["wrong"] == 0
        assert not any(t.may_have_missed for t in probe.targets)


@traps
def test_p5_blocking_calls_are_not_interrupted(host: Host, targets: Targets) -> None:
    program = targets.build("blocking")
    plan = host.files.plan(program, "target_blocking")
    with targets.run("blocking") as child:
        for cycle in range(10):
            probe = host.register(plan, probe=f"p{cycle}", pid=child.pid)
            child.ask("call 5")
            child.ask("wake")
            probe.unregister()
            host.reconcile(child.pid)
        count = child.count()
        assert count["eintr"] == 0
        assert count["failed"] == 0


@traps
def test_p5_ignored_signals_interrupt_nothing(host: Host, targets: Targets) -> None:
    """The kernel drops a signal that is ignored before it wakes anybody; not so where the thread is traced."""
    program = targets.build("blocking")
    with targets.run("blocking") as child:
        probe = host.register(host.files.plan(program, "target_blocking"), pid=child.pid)
        for _ in range(20):
            for tid in procfs.tasks(child.pid):
                for number in (signal.SIGCHLD, signal.SIGWINCH, signal.SIGURG, signal.SIGCONT):
                    ptrace.thread_kill(child.pid, tid, number)
            child.ask("wake")
        count = child.count()
        # recv's time-out is not among its arguments: it is begun again for a second, lest it never ends.
        assert {k: v for k, v in count.items() if ".eintr" in k and v and k != "recv.eintr"} == {}
        assert count["recv.eintr"] <= 10
        assert count["failed"] == 0
        probe.unregister()


@traps
def test_p5_a_time_out_comes_though_ignored_signals_keep_coming(host: Host, targets: Targets) -> None:
    """A call that is begun again for every signal would never end."""
    program = targets.build("blocking")
    with targets.run("blocking") as child:
        probe = host.register(host.files.plan(program, "target_blocking"), pid=child.pid)
        before, began = child.count()["loops"], time.monotonic()
        while time.monotonic() - began < 2:
            for tid in procfs.tasks(child.pid):
                ptrace.thread_kill(child.pid, tid, signal.SIGWINCH)
        # Seven threads wait for 100 ms each; doubled, and with recv's second.
        assert child.count()["loops"] - before >= 6 * 2 / 0.3
        probe.unregister()


@traps
def test_h4_signals_see_the_programs_own_addresses(host: Host, targets: Targets) -> None:
    program = targets.build("signals")
    with targets.run("signals", "4") as child:
        probe = host.register(
            [host.files.plan(program, s, i) for i, s in enumerate(("target_push", "target_imul", "target_inner"))],
            pid=child.pid,
        )
        child.ask("start")
        while child.count()["handled"] < 2000:
            pass
        child.ask("stop", timeout=60)
        count = child.count()
        assert count["outside"] == 0, "a handler saw an instruction pointer inside a slot"
        assert count["wrong"] == 0
        assert count["sent"] == count["handled"]
        assert probe.hits == count["done"] + count["inner"]


@traps
def test_h2_own_sigtrap_handler_is_kept(host: Host, targets: Targets) -> None:
    with targets.run("sigstate", "handler") as child:
        probe = host.register(host.files.plan(targets.build("sigstate"), "target_sigstate"), pid=child.pid)
        child.ask("call 10")
        child.ask("trap 5")
        child.ask("raise 5")
        child.ask("call 10")
        count = child.count()
        assert probe.hits == 20
        assert (count["traps"], count["raised"], count["strange"], count["wrong"]) == (5, 5, 0, 0)


@traps
@pytest.mark.parametrize("mode", ["default", "blocked"])
def test_h5_signal_state_is_kept(host: Host, targets: Targets, mode: str) -> None:
    with targets.run("sigstate", mode) as child:
        before = child.ask("state")
        probe = host.register(host.files.plan(targets.build("sigstate"), "target_sigstate"), pid=child.pid)
        child.ask("call 10")
        assert probe.hits == 10
        probe.unregister()
        assert child.ask("state") == before


@traps
@pytest.mark.parametrize(
    ("mode", "reason"), [("ignored", "SigtrapIgnored"), ("blocked-handler", "SigtrapBlockedAndCaught")]
)
def test_h5_signal_state_that_could_not_be_kept_is_refused(
    host: Host, targets: Targets, mode: str, reason: str
) -> None:
    with targets.run("sigstate", mode) as child, host.untouched(child.pid):
        before = child.ask("state")
        probe = host.register(host.files.plan(targets.build("sigstate"), "target_sigstate"), pid=child.pid)
        assert [(t.state, t.reason) for t in probe.targets] == [("refused", reason)]
        child.ask("call 10")
        assert probe.hits == 0
        assert child.ask("state") == before
        probe.unregister()
        host.engine.close()


@traps
@needs.gdb
def test_p7_process_of_another_debugger_is_refused(host: Host, targets: Targets) -> None:
    program = targets.build("hot")
    with targets.run("hot", "1") as child:
        # Its word, not TracerPid: right after the attach it forks a child to try ptrace on, which must not outlive it.
        says = ["-ex", "python print('attached', flush=True)"]
        with Child(["gdb", "-nx", "-q", "-p", str(child.pid), *says], ready="attached") as gdb:
            probe = host.register(host.files.plan(program, "target_hot"), pid=child.pid)
            assert [(t.state, t.reason) for t in probe.targets] == [("refused", "TracedByOther")]
            assert "gdb" in probe.targets[0].message
            gdb.send("detach")
            gdb.send("quit")
            assert gdb.wait() == 0
        assert host.altered(child.pid, [program]) == {}


def test_r14_changed_code_is_refused(host: Host, targets: Targets) -> None:
    """The instruction is taken from the file; memory that differs is somebody else's doing (semantics R14)."""
    program = targets.build("hot")
    plan = host.files.plan(program, "target_hot")
    with targets.run("hot", "1") as child:
        host.overwrite(child.pid, program, "target_six", b"\xcc")
        six = host.files.plan(program, "target_six", 1)
        probe = host.register([plan, six], pid=child.pid)
        states = {t.site: (t.state, t.reason) for t in probe.targets}
        assert states == {0: ("armed", ""), 1: ("refused", "BreakpointPresent")}, "one bad site never hides another"
        child.ask("call 3")
        assert probe.hits == 3


def test_r4_targets_killed_while_registering(host: Host, targets: Targets) -> None:
    program = targets.build("hot")
    plan = host.files.plan(program, "target_hot")
    for cycle in range(10):
        children = [targets.start("hot", "2") for _ in range(4)]
        try:
            for child in children[::2]:
                child.popen.kill()
            probe = host.register(plan, probe=f"p{cycle}")
            assert {t.pid for t in probe.targets if t.state == "armed"} <= {c.pid for c in children}
            for child in children[1::2]:
                child.ask("call 2")
            assert probe.hits == 4
            probe.unregister()
        finally:
            for child in children:
                child.kill()


def test_limit_ends_recording(host: Host, targets: Targets) -> None:
    with targets.run("hot", "1") as child:
        probe = host.register(host.files.plan(targets.build("hot"), "target_hot"), max_hits=5, pid=child.pid)
        child.ask("call 20")
        assert (probe.hits, probe.ring.limited) == (5, 15)


_SHELL = """
import os, signal, subprocess, sys
child = subprocess.Popen([sys.argv[1], "2"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
child.stdout.readline()
print("ready", child.pid, flush=True)
for line in sys.stdin:
    if line == "jobs\\n":
        child.send_signal(signal.SIGSTOP)
        stopped = os.WIFSTOPPED(os.waitpid(child.pid, os.WUNTRACED)[1])
        child.send_signal(signal.SIGCONT)
        print(stopped, os.WIFCONTINUED(os.waitpid(child.pid, os.WCONTINUED)[1]), flush=True)
    else:
        child.stdin.write(line)
        child.stdin.flush()
        print(child.stdout.readline(), end="", flush=True)
"""


@traps
def test_p6_job_control_is_as_without(host: Host, targets: Targets) -> None:
    """The target's parent sees it stop and continue. (A process of its own: waiting would steal our tracees' stops.)"""
    program = targets.build("hot")
    with python(_SHELL, str(program)) as shell:
        pid = int(shell.ready_line.split()[1])
        probe = host.register(host.files.plan(program, "target_hot"), pid=pid)
        for _ in range(5):
            assert shell.ask("jobs") == "True True"
            shell.ask("call 4")
        assert probe.hits == 20
        probe.unregister()


def test_h1_dropped_hits_are_counted(host: Host, targets: Targets, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trapline_agent.engines.ring.ROWS", 8)
    monkeypatch.setattr("trapline_agent.engines.ring.CHUNKS", 2)
    with targets.run("hot", "1") as child:
        probe = host.register(host.files.plan(targets.build("hot"), "target_hot"), pid=child.pid)
        child.ask("call 100")
    batches = probe.batches()
    delivered = sum(b.header.count for b in batches)
    assert probe.hits == 100 == delivered + sum(probe.ring.drops.values())
    assert batches[0].header.drops == probe.ring.drops
    assert batches[0].header.seq == 100 - delivered


def return_probe(host: Host, targets: Targets, *symbols: str, **where: object) -> Probe:
    program = targets.build("returns")
    plans = [host.files.plan(program, symbol, site=i) for i, symbol in enumerate(symbols)]
    return host.register(plans, returns=True, **where)


def test_h6_every_return_is_a_hit_however_deep(host: Host, targets: Targets) -> None:
    with targets.run("returns") as child:
        with host.untouched(child.pid):
            probe = return_probe(host, targets, "target_ret", "target_rec", pid=child.pid)
            assert probe.states() == {"armed": 2}
            child.ask("call 100")
            child.ask("recurse 300")
            count = child.count()
            assert probe.calls == probe.hits == count["calls"] == count["returns"] == 400
            assert (probe.unreturned, probe.in_flight, count["wrong"]) == ({}, 0, 0)
            probe.unregister()
            host.engine.close()
        child.ask("call 100")
        assert probe.calls == 400


def test_h6_calls_that_are_left_are_no_hits(host: Host, targets: Targets) -> None:
    with targets.run("returns") as child:
        probe = return_probe(host, targets, "target_frame", "target_jumper", "target_ret", pid=child.pid)
        child.ask("jump 50")
        child.ask("call 20")
        count = child.count()
        assert (probe.calls, probe.hits, count["left"]) == (120, 20, 100)
        assert sum(probe.unreturned.values()) + probe.in_flight == 100
        probe.unregister()
        assert sum(probe.unreturned.values()) == 100


def test_h7_calls_in_flight_when_the_probe_goes(host: Host, targets: Targets) -> None:
    with targets.run("returns") as child:
        probe = return_probe(host, targets, "target_hold", "target_ret", pid=child.pid)
        child.ask("hold")
        child.ask("call 3")
        assert (probe.calls, probe.hits, probe.in_flight) == (4, 3, 1)
        probe.unregister()
        host.engine.close()
        assert host.altered(child.pid) == {}
        assert (probe.calls, probe.hits, probe.unreturned, probe.in_flight) == (4, 3, {"disarmed": 1}, 0)
        child.ask("go")
        assert child.count()["returns"] == 4


def test_h6_a_fork_inside_of_a_call_returns_twice(host: Host, targets: Targets) -> None:
    with targets.run("returns") as child:
        probe = return_probe(host, targets, "target_fork")
        for _ in range(5):
            child.ask("fork 7")
        assert child.count()["returns"] == 10
        assert (probe.calls, probe.hits, probe.unreturned) == (10, 10, {})
        probe.unregister()


# --- USDT probes with a semaphore


def test_r19_a_semaphore_is_raised_while_its_probe_is_armed(host: Host, targets: Targets) -> None:
    plans = host.files.usdt(targets.build("usdt"))
    with targets.run("usdt") as child, host.untouched(child.pid):
        child.ask("call 3")
        assert child.count()["evaluated"] == 0, "nobody looks, and the program skips it"
        probe = host.register(plans, pid=child.pid)
        assert probe.states() == {"armed": 2}
        assert child.ask("semaphore") == "semaphore=2", "one for each place"
        child.ask("call 10")
        assert probe.hits == child.count()["evaluated"] == 20
        second = host.register(plans, probe="second", pid=child.pid)
        host.register(plans, probe="second", pid=child.pid)
        assert child.ask("semaphore") == "semaphore=2", "not one for each consumer"
        probe.unregister()
        child.ask("call 5")
        assert (probe.hits, second.hits) == (20, 10)
        assert child.ask("semaphore") == "semaphore=2"
        second.unregister()
        assert child.ask("semaphore") == "semaphore=0"
        child.ask("call 100")
        assert child.count()["evaluated"] == 30
        host.engine.close()


def test_r19_what_others_raise_is_kept(host: Host, targets: Targets) -> None:
    plans = host.files.usdt(targets.build("usdt"))
    with targets.run("usdt") as child:
        child.ask("lift 3")
        probe = host.register(plans[:1], pid=child.pid)
        assert child.ask("semaphore") == "semaphore=4"
        child.ask("lift 255")
        assert child.ask("semaphore") == "semaphore=259"
        probe.unregister()
        assert child.ask("semaphore") == "semaphore=258"


def test_r19_a_plain_probe_at_the_same_place_raises_nothing(host: Host, targets: Targets) -> None:
    (plan, _) = host.files.usdt(targets.build("usdt"))
    with targets.run("usdt") as child:
        plain = host.register(structs.replace(plan, semaphore=None), probe="plain", pid=child.pid)
        child.ask("call 5")
        assert (plain.hits, child.ask("semaphore")) == (0, "semaphore=0")
        probe = host.register(plan, pid=child.pid)
        child.ask("call 5")
        assert (plain.hits, probe.hits, child.ask("semaphore")) == (5, 5, "semaphore=1")
        probe.unregister()
        child.ask("call 5")
        assert (plain.hits, child.ask("semaphore")) == (5, "semaphore=0")


@pytest.mark.parametrize("kind", ["fork", "vfork", "clone"])
def test_r19_p1_semaphores_of_children(host: Host, targets: Targets, kind: str) -> None:
    plans = host.files.usdt(targets.build("usdt"))
    with targets.run("usdt") as child:
        probe = host.register(plans)
        child.ask(f"{kind} 10")
        count = child.count()
        assert (probe.hits, count["evaluated"], count["semaphore"], count["failed"]) == (20, 20, 2, 0)
        probe.unregister()
        assert child.ask("semaphore") == "semaphore=0"
        child.ask(f"{kind} 10")
        assert child.count()["evaluated"] == 20


def test_r19_p1_a_child_that_is_not_meant_is_lowered(host: Host, targets: Targets) -> None:
    plans = host.files.usdt(targets.build("usdt"))
    with targets.run("usdt") as child:
        child.ask("lift 1")
        probe = host.register(plans, pid=child.pid)
        held = int(child.ask("hold").split()[-1])
        while host.follows(held):
            pass
        child.ask("go 10")
        count = child.count()
        assert (count["semaphore"], count["failed"], probe.hits) == (1, 0, 0)
        assert child.ask("semaphore") == "semaphore=3"


def test_r19_p1_a_child_is_lowered_when_its_probe_goes(host: Host, targets: Targets) -> None:
    plans = host.files.usdt(targets.build("usdt"))
    with targets.run("usdt") as child:
        probe = host.register(plans)
        child.ask("hold")
        probe.unregister()
        assert child.ask("semaphore") == "semaphore=0"
        child.ask("go 10")
        assert child.count()["semaphore"] == probe.hits == 0
