"""Rules of docs/architecture/semantics.md that are the table's own, one by one, over simulated processes."""

from __future__ import annotations

import os
import random
import threading
from collections import Counter
from pathlib import Path

import pytest

from tests.support import needs
from tests.support.children import TIMEOUT_S
from trapline_agent.engines.base import ProcessId
from trapline_agent.engines.fake import FakeEngine, World
from trapline_agent.engines.fake.world import BREAKPOINT, PAGE, SimulatedProcess
from trapline_agent.engines.ring import HitRing
from trapline_agent.plans import SitePlan
from trapline_agent.targets.files import file_key_of
from trapline_agent.tracer import messages as m
from trapline_agent.tracer.looks import Looks
from trapline_agent.tracer.loop import Tracer
from trapline_agent.tracer.table import Consumer, Table


class Bench:
    """A table, a fake engine and one file."""

    def __init__(self) -> None:
        self.world = World()
        self.file = self.world.file("/simulated/file")
        self.table = Table(proc=self.world)
        self.engine = FakeEngine(self.table, self.world)
        self.looks = Looks(self.engine)
        self.looked_at: Counter[int] = Counter()
        self.engine.on_reconcile = lambda process: self.looked_at.update((process.pid,))

    def register(self, *offsets: int, probe: str = "p", code: bytes = b"", **where: str) -> Consumer:
        plans = [self.file.plan(offset, n) for n, offset in enumerate(offsets)]
        if code:
            plans = [SitePlan(p.site, p.file, p.path, p.offset, code) for p in plans]
        consumer = self.table.publish(register(probe, plans, **where), HitRing)
        self.looks.run(lambda: self.table.candidates(consumer), "scan")
        return consumer

    def unregister(self, probe: str = "p") -> None:
        consumer = self.table.withdraw(probe)
        assert consumer is not None
        self.looks.run(lambda: self.table.concerned(consumer, self.engine.processes()), "reconcile")


def register(probe: str, plans: list[SitePlan], **where: str) -> m.Register:
    return m.Register(id=1, probe=probe, generation=1, sites=["s"] * len(plans), plans=plans, where=where)


def armed(process: SimulatedProcess) -> set[int]:
    return {addr for addr, value in process.memory.written.items() if value == BREAKPOINT}


def states(consumer: Consumer, process: SimulatedProcess) -> dict[int, tuple[str, str]]:
    return {
        t.addr: (t.state, t.reason) for t in consumer.targets.values() if t.pid == process.pid and t.state != "gone"
    }


@pytest.fixture
def bench() -> Bench:
    return Bench()


# --- R5: a failed registration, through the real control thread's code --------------------------------------------------


class Control:
    """A ``Tracer`` whose engine and processes are simulated; its news are served here."""

    def __init__(self, tracer: Tracer, bench: Bench) -> None:
        self.tracer = tracer
        tracer._table, tracer._engine, tracer._looks = bench.table, bench.engine, bench.looks  # type: ignore[assignment]

    def register(self, message: m.Register) -> Exception | None:
        answers: list[Exception | None] = []
        self.tracer._register(message, answers.append)
        while not answers:
            assert os.read(self.tracer._wake_r, 1)
            while self.tracer._news:
                self.tracer._news.popleft()()
        return answers[0]


class OddError(Exception):
    """What the engine fails with."""


@needs.ptrace
@pytest.mark.parametrize("k", range(5))
def test_r5_a_register_that_fails_leaves_not_one_byte(tracer: Tracer, bench: Bench, k: int) -> None:
    """It fails at the k-th process; those that are armed by then fork while it is rolled back."""
    processes = [bench.world.spawn(bench.file) for _ in range(5)]
    children: list[SimulatedProcess] = []
    count = 0
    lock = threading.Lock()

    def fail(process: ProcessId) -> None:
        nonlocal count
        with lock:
            count += 1
            if count == k + 1:
                raise OddError
            if count > 5:  # the second walk
                children.append(bench.world.fork(bench.world.processes[process.pid]))

    bench.engine.on_reconcile = fail
    error = Control(tracer, bench).register(register("p", [bench.file.plan(8)]))
    assert isinstance(error, OddError)
    assert len(children) >= 4, "those that were armed were looked at again"
    assert not any(p.memory.written for p in bench.world.processes.values())
    assert bench.engine.processes() == []
    assert bench.table.consumers == ()
    for process in (*processes, *children):
        bench.world.call(process, bench.file, 8)
        assert process.status is None


@needs.ptrace
def test_r5_a_second_registration_that_fails_leaves_the_first(tracer: Tracer, bench: Bench) -> None:
    process = bench.world.spawn(bench.file)
    control = Control(tracer, bench)
    assert control.register(register("p", [bench.file.plan(8)])) is None
    before = armed(process)
    other = bench.world.spawn(bench.file)

    def fail(looked_at: ProcessId) -> None:
        if looked_at.pid == other.pid and armed(process) != before:
            raise OddError

    bench.engine.on_reconcile = fail
    bench.looks._max = 1
    error = control.register(register("p", [bench.file.plan(8), bench.file.plan(16, 1)]))
    if error is None:  # the other one had its look first: nothing failed
        assert len(armed(process)) == 2
    else:
        assert isinstance(error, OddError)
        assert armed(process) == before


# --- R6 ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_r6_interleaved_rounds_end_in_what_is_wanted(bench: Bench, seed: int) -> None:
    """Probes come and go without waiting for one another, while processes fork, exec and end on another thread."""
    world, dice = bench.world, random.Random(seed)
    started = [world.spawn(bench.file) for _ in range(6)]
    stop = threading.Event()
    ended: list[int] = []

    def live() -> None:
        mine = random.Random(~seed)
        for _ in range(200):
            process = mine.choice(started)
            child = world.fork(process)
            if mine.random() < 0.5:
                world.exec(child, bench.file)
            world.call(child, bench.file, 8)
            world.call(process, bench.file, 16)
            ended.append(child.status or 0)
            world.end(child)
        stop.set()

    life = threading.Thread(target=live)
    life.start()
    wanted: set[str] = set()
    rounds: list[threading.Event] = []
    for n in range(60):
        over = threading.Event()
        if wanted and dice.random() < 0.5:
            name = dice.choice(sorted(wanted))
            wanted.discard(name)
            gone = bench.table.withdraw(name)
            assert gone is not None
            bench.looks.begin(
                lambda gone=gone: bench.table.concerned(gone, bench.engine.processes()),
                "reconcile",
                lambda error, over=over: over.set(),
            )
        else:
            name = f"p{n}"
            wanted.add(name)
            consumer = bench.table.publish(register(name, [bench.file.plan(dice.choice((8, 16)))]), HitRing)
            bench.looks.begin(
                lambda consumer=consumer: bench.table.candidates(consumer),
                "scan",
                lambda error, over=over: over.set(),
            )
        rounds.append(over)
    life.join(TIMEOUT_S)
    assert stop.is_set()
    for over in rounds:
        assert over.wait(TIMEOUT_S)
    assert set(ended) <= {0}, "a child was ended by a trap"
    offsets = {offset for c in bench.table.consumers for _, offset in c.plans}
    for process in started:
        assert process.status is None
        (mapping,) = process.memory.mappings
        assert armed(process) == {mapping.start + offset for offset in offsets}


# --- the others -------------------------------------------------------------------------------------------------------


def test_r8_without_probes_no_process_is_looked_at(bench: Bench) -> None:
    """In the mail of 2011 the test was inverted: it has to bail out where the count is zero."""
    mapping = [bench.world.spawn(bench.file) for _ in range(3)]
    others = [bench.world.spawn(bench.world.file("/simulated/other")) for _ in range(3)]
    bench.looks.run(lambda: bench.table.candidates() | set(bench.engine.processes()), "reconcile")
    assert bench.world.looks == 0
    bench.register(8, probe="one", pid=str(mapping[0].pid))
    assert bench.looked_at.keys() == {mapping[0].pid}
    assert bench.world.looks == 1, "a probe on one process lists no others"
    bench.register(8, probe="all")
    assert bench.looked_at.keys() == {p.pid for p in mapping}
    bench.unregister("one")
    bench.unregister("all")
    assert not bench.looked_at.keys() & {p.pid for p in others}
    before = bench.world.looks
    bench.looks.run(lambda: bench.table.candidates() | set(bench.engine.processes()), "reconcile")
    assert bench.world.looks == before


def test_r6_a_round_leaves_processes_of_other_files_alone(bench: Bench) -> None:
    ours, other = bench.world.spawn(bench.file), bench.world.file("/simulated/other")
    theirs = bench.world.spawn(other)
    bench.register(8)
    bench.looked_at.clear()
    consumer = bench.table.publish(register("q", [other.plan(8)]), HitRing)
    bench.looks.run(lambda: bench.table.candidates(consumer), "scan")
    bench.unregister("q")
    assert bench.looked_at.keys() == {theirs.pid}
    assert armed(ours)
    assert not armed(theirs)


def test_r9_the_inode_is_held_while_a_probe_is_on_it(tmp_path: Path) -> None:
    """A file that is deleted keeps its number until the probe is out, so that no other file can get it."""
    path = tmp_path / "program"
    path.write_bytes(b"x")
    inode = path.stat().st_ino
    table = Table()
    with path.open("rb") as file:
        key = file_key_of(file.fileno(), str(path))
    consumer = table.publish(register("p", [SitePlan(0, key, str(path), 16, b"\x55")]), HitRing)
    path.unlink()
    (fd,) = consumer.held.values()
    assert os.fstat(fd).st_ino == inode
    assert os.fstat(fd).st_nlink == 0
    table.withdraw("p")
    os.fstat(fd)  # until its bytes are out
    consumer.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_r10_first_and_last_byte_split_and_twice(bench: Bench) -> None:
    process = bench.world.spawn(bench.file)
    second = bench.world.mmap(process, bench.file)
    (first, _) = process.memory.mappings
    last = len(bench.file.content) - 1
    bench.register(0, PAGE - 1, PAGE, last)
    whole = {m.start + offset for m in (first, second) for offset in (0, PAGE - 1, PAGE, last)}
    assert armed(process) == whole
    bench.world.munmap(process, first.start + PAGE, first.start + 2 * PAGE)
    assert armed(process) == whole - {first.start + PAGE}


def test_r11_r15_what_is_refused_is_refused_in_later_mappings_and_hides_nothing(bench: Bench) -> None:
    process = bench.world.spawn(bench.file)
    (first,) = process.memory.mappings
    bad = bench.register(8, probe="bad", code=b"\x90")
    good = bench.register(16, probe="good")
    writable = bench.world.mmap(process, bench.file, "rwxp")
    shared = bench.world.mmap(process, bench.file, "r-xs")
    later = bench.world.mmap(process, bench.file)
    assert armed(process) == {first.start + 16, later.start + 16}
    assert states(good, process) == {
        first.start + 16: ("armed", ""),
        writable.start + 16: ("refused", "WritableMapping"),
        shared.start + 16: ("refused", "SharedMapping"),
        later.start + 16: ("armed", ""),
    }
    assert states(bad, process) == {
        first.start + 8: ("refused", "TextDiffers"),
        writable.start + 8: ("refused", "WritableMapping"),
        shared.start + 8: ("refused", "SharedMapping"),
        later.start + 8: ("refused", "TextDiffers"),
    }
    child = bench.world.fork(process)
    assert states(bad, child) == states(bad, process), "in a child too"
    assert states(good, child) == states(good, process)


def test_r12_an_unmapped_place_is_gone_and_counted_by_nobody(bench: Bench) -> None:
    process = bench.world.spawn(bench.file)
    consumer = bench.register(8, PAGE + 8)
    (mapping,) = process.memory.mappings
    for told in (True, False, True):  # the same range, again and again
        bench.world.munmap(process, mapping.start, mapping.start + PAGE, told=told)
    assert states(consumer, process) == {mapping.start + PAGE + 8: ("armed", "")}
    bench.world.munmap(process, mapping.start, mapping.end)
    assert states(consumer, process) == {}
    again = bench.world.mmap(process, bench.file, told=False)
    bench.looks.run(lambda: bench.table.candidates(), "reconcile")
    assert armed(process) == {again.start + 8, again.start + PAGE + 8}


def test_r13_after_unregister_nothing_is_recorded(bench: Bench) -> None:
    process = bench.world.spawn(bench.file)
    one, other = bench.register(8, probe="one"), bench.register(8, probe="other")
    bench.world.call(process, bench.file, 8)
    bench.unregister("one")
    bench.world.call(process, bench.file, 8)
    assert (one.ring.hits, other.ring.hits) == (1, 2)


def test_r16_a_wider_filter_arms_the_others_and_its_end_leaves_them_clean(bench: Bench) -> None:
    red, blue = bench.world.spawn(bench.file, comm="red"), bench.world.spawn(bench.file, comm="blue")
    narrow = bench.register(8, probe="narrow", comm="red")
    assert (len(armed(red)), len(armed(blue))) == (1, 0)
    wide = bench.register(8, probe="wide")
    assert (len(armed(red)), len(armed(blue))) == (1, 1)
    bench.world.call(red, bench.file, 8)
    bench.world.call(blue, bench.file, 8)
    assert (narrow.ring.hits, wide.ring.hits) == (1, 2)
    assert states(narrow, blue) == {}
    bench.unregister("wide")
    assert (len(armed(red)), len(armed(blue))) == (1, 0)
    bench.world.exec(red, bench.file, comm="blue")
    assert armed(red) == set(), "it is not meant any more"
    assert states(narrow, red) == {}
