"""Targets that the breaker leaves out, in the coverage log; what ends beside the control thread."""

from __future__ import annotations

import time

from tests.unit.tracer.test_rules import Bench
from trapline_agent.engines.base import ProcessId
from trapline_agent.engines.fake.world import SimulatedProcess
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
