"""Targets that the breaker leaves out, in the coverage log; what ends beside the control thread."""

from __future__ import annotations

import os
import threading
import time

from tests.unit.tracer.test_rules import Bench, register
from trapline_agent.engines.base import ProcessId
from trapline_agent.engines.fake.world import SimulatedProcess
from trapline_agent.engines.ring import HitRing
from trapline_agent.tracer.breaker import Point, State, Verdict, Verdicts
from trapline_agent.tracer.messages import CoverageEntry
from trapline_agent.tracer.table import Table

OFFSET = 64


def judge(bench: Bench, process: SimulatedProcess, state: State | None, *, out: bool = False) -> None:
    """Has the breaker say something about all points of a process, as ``Guard`` does."""
    identity = ProcessId(process.pid, process.start_time)
    before = bench.table.verdicts
    addr = next(m.addr(OFFSET) for m in process.memory.mappings if m.file == bench.file.key)
    assert addr is not None
    point = Point(identity, addr, bench.file.key, OFFSET)
    verdicts = Verdicts({} if state is None else {point: Verdict(state, out, "it costs too much")})
    bench.table.judge(verdicts)
    bench.looks.run(lambda: [identity], "reconcile")
    bench.table.settle(before.points() | verdicts.points(), time.monotonic_ns())


def log(table: Table) -> list[CoverageEntry]:
    return [entry for _, entries in table.take_log() for entry in entries]


def test_what_begins_its_life_left_out_is_in_the_coverage_log_when_it_is_in() -> None:
    for state in (State.THROTTLED, State.TRIPPED):
        bench = Bench()
        process = bench.world.spawn(bench.file)
        bench.register(OFFSET, probe="first")
        judge(bench, process, state, out=True)
        log(bench.table)
        consumer = bench.register(OFFSET, probe="second")
        assert [t.state for t in consumer.targets.values()] == [state.text]
        judge(bench, process, State.THROTTLED, out=False)
        judge(bench, process, None)
        assert [t.state for t in consumer.targets.values()] == ["armed"]
        (entry,) = consumer.coverage.take()
        assert (entry.hook, entry.may_have_missed, entry.ended_ns) == ("budget", True, 0)


def test_what_goes_while_it_is_throttled_has_its_entry_ended() -> None:
    bench = Bench()
    process = bench.world.spawn(bench.file)
    bench.register(OFFSET)
    judge(bench, process, State.THROTTLED, out=True)
    assert [e.ended_ns for e in log(bench.table)] == [0]
    process.memory.mappings = [m for m in process.memory.mappings if m.file != bench.file.key]
    bench.looks.run(lambda: [ProcessId(process.pid, process.start_time)], "reconcile")
    (entry,) = log(bench.table)
    assert entry.ended_ns


def test_a_process_ends_while_a_probe_comes() -> None:
    """Ends are told by the engine's threads, probes come on the control thread; its end must reach whoever launched it."""
    bench = Bench()
    process = bench.world.spawn(bench.file)
    consumer = bench.register(OFFSET)

    another = register("another", [bench.file.plan(OFFSET)])
    control = threading.Thread(target=lambda: bench.table.publish(another, HitRing))

    class Keys(dict):  # type: ignore[type-arg]
        def pop(self, *args):  # type: ignore[no-untyped-def]
            if not control.is_alive():
                control.start()
            while bench.table.consumer("another") is None:
                os.sched_yield()
            return super().pop(*args)

    consumer.of_process = Keys(consumer.of_process)
    ended: list[int] = []
    bench.table.on_exit = lambda identity, status: ended.append(identity.pid)
    bench.table.exited(ProcessId(process.pid, process.start_time), 0)
    control.join()
    assert ended == [process.pid]
    assert [t.state for t in consumer.targets.values()] == ["gone"]


def test_what_is_metered_in_processes_that_end_before_they_are_followed_is_forgotten() -> None:
    bench = Bench()
    bench.register(OFFSET)
    process = bench.world.spawn(bench.file)
    bench.table.wanted(ProcessId(process.pid, process.start_time), "scan")
    assert bench.table.meters._meters
    bench.table.mark_ended()
    assert bench.table.meters._meters
    bench.world.end(process)
    bench.table.mark_ended()
    assert not bench.table.meters._meters
