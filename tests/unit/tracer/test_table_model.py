"""The uprobe table against a model of it, over simulated processes: hypothesis makes up the events, in any order.

The model is the definition: a place is armed if it is mapped, private and read-only, if its code is the file's, and if a
consumer wants it whose selector means the process. It knows nothing of what was before. The oracle of a hit is the world's
own count of the calls.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from msgspec import structs

from trapline_agent.engines.base import ProcessId
from trapline_agent.engines.fake import FakeEngine, World
from trapline_agent.engines.fake.world import BREAKPOINT, PAGE, SimulatedFile, SimulatedProcess
from trapline_agent.engines.ring import HitRing
from trapline_agent.plans import SitePlan
from trapline_agent.targets.maps import Mapping
from trapline_agent.tracer.looks import Looks
from trapline_agent.tracer.messages import Register
from trapline_agent.tracer.table import Consumer, Table

OFFSETS = (0, 8, PAGE - 4, PAGE, 2 * PAGE + 8, 4 * PAGE - 4)
BAD = 8
"""At this offset the plan's code is not what the file has (semantics R14)."""
COMMS = ("red", "blue")
PROTS = ("r-xp", "r-xp", "rwxp", "r-xs")


@dataclass
class Wish:
    """A consumer, as the model has it."""

    consumer: Consumer
    where: dict[str, str]
    places: set[tuple[SimulatedFile, int]]

    @property
    def returns(self) -> bool:
        return self.consumer.register.returns


@dataclass
class Model:
    world: World
    wishes: dict[str, Wish] = field(default_factory=dict)
    chains: dict[int, list[int]] = field(default_factory=dict)
    """Ancestors of those whose fork was seen. Of others, a parent that ended is forgotten by /proc."""

    def chain(self, pid: int) -> list[int]:
        """Returns a process' ancestors, itself first."""
        if pid in self.chains:
            return self.chains[pid]
        process = self.world.processes.get(pid)
        return [pid] if process is None else [pid, *self.chain(process.ppid)]

    def means(self, wish: Wish, process: SimulatedProcess) -> bool:
        chain = [str(pid) for pid in self.chain(process.pid)]
        tests = {"pid": chain[:1], "tree": chain, "comm": [process.comm]}
        return all(value in tests[key] for key, value in wish.where.items())

    def wanted(self, wish: Wish, process: SimulatedProcess) -> dict[int, str]:
        """Returns what has to be where, by address: ``armed`` or ``refused``."""
        found = {}
        for file, offset in wish.places if self.means(wish, process) else ():
            for m in process.memory.mappings:
                if m.file == file.key and m.offset <= offset < m.offset + m.end - m.start:
                    fine = m.prot == "r-xp" and offset != BAD
                    found[m.start + offset - m.offset] = "armed" if fine else "refused"
        return found


def plan(file: SimulatedFile, offset: int, site: int) -> SitePlan:
    made = file.plan(offset, site)
    return SitePlan(site, made.file, made.path, offset, b"\x90" + made.code[1:]) if offset == BAD else made


class OddError(Exception):
    """What an engine fails with in these tests."""


class TableMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        self.files = [self.world.file(f"/simulated/{n}") for n in range(2)]
        self.table = Table(proc=self.world)
        self.engine = FakeEngine(self.table, self.world)
        self.looks = Looks(self.engine, workers=3)
        self.model = Model(self.world)
        self.late: set[int] = set()
        """Processes that changed without telling anybody: the next look finds it (semantics P4)."""
        self.ended: list[tuple[HitRing, int]] = []
        self.names = iter(range(1_000_000))

    # --- processes ---------------------------------------------------------------------------------------------------

    def some(self, data: st.DataObject) -> SimulatedProcess:
        return self.world.processes[data.draw(st.sampled_from(sorted(self.world.processes)))]

    def followed(self, process: SimulatedProcess) -> bool:
        return process.pid in {p.pid for p in self.engine.processes()}

    def changed(self, process: SimulatedProcess, *, told: bool) -> None:
        if not told or not self.followed(process):
            self.late.add(process.pid)

    @rule(data=st.data())
    @precondition(lambda self: len(self.world.processes) < 6)
    def spawn(self, data: st.DataObject) -> None:
        files = data.draw(st.lists(st.sampled_from(self.files), unique_by=lambda f: f.path))
        self.late.add(self.world.spawn(*files, comm=data.draw(st.sampled_from(COMMS))).pid)

    @rule(data=st.data())
    @precondition(lambda self: 0 < len(self.world.processes) < 6)
    def fork(self, data: st.DataObject) -> None:
        parent = self.some(data)
        seen = self.followed(parent)
        child = self.world.fork(parent)
        if seen:
            self.model.chains[child.pid] = [child.pid, *self.model.chain(parent.pid)]
        if parent.pid in self.late or not self.followed(parent):
            self.late.add(child.pid)

    @rule(data=st.data())
    @precondition(lambda self: self.world.processes)
    def exec(self, data: st.DataObject) -> None:
        process = self.some(data)
        followed = self.followed(process)
        files = data.draw(st.lists(st.sampled_from(self.files), unique_by=lambda f: f.path))
        self.world.exec(process, *files, comm=data.draw(st.sampled_from(COMMS)))
        if not followed:
            self.late.add(process.pid)

    @rule(data=st.data(), told=st.booleans())
    @precondition(lambda self: self.world.processes)
    def mmap(self, data: st.DataObject, told: bool) -> None:
        process = self.some(data)
        if len(process.memory.mappings) < 4:
            self.changed(process, told=told)
            self.world.mmap(
                process, data.draw(st.sampled_from(self.files)), data.draw(st.sampled_from(PROTS)), told=told
            )

    @rule(data=st.data(), told=st.booleans(), first=st.integers(0, 3), length=st.integers(1, 4))
    @precondition(lambda self: any(p.memory.mappings for p in self.world.processes.values()))
    def munmap(self, data: st.DataObject, told: bool, first: int, length: int) -> None:
        process = self.some(data)
        if process.memory.mappings:
            m: Mapping = data.draw(st.sampled_from(process.memory.mappings))
            self.changed(process, told=told)
            start = min(m.start + first * PAGE, m.end - PAGE)
            self.world.munmap(process, start, min(start + length * PAGE, m.end), told=told)

    @rule(data=st.data())
    @precondition(lambda self: self.world.processes)
    def end(self, data: st.DataObject) -> None:
        self.world.end(self.some(data))

    # --- probes ------------------------------------------------------------------------------------------------------

    def publish(self, data: st.DataObject) -> tuple[Consumer, dict[str, str], set[tuple[SimulatedFile, int]]]:
        pids = [str(p) for p in self.world.processes]
        kinds = [{}, {"comm": "red"}, *({key: pid} for key in ("pid", "tree") for pid in pids[:3])]
        where: dict[str, str] = data.draw(st.sampled_from(kinds))
        places = data.draw(
            st.sets(st.tuples(st.sampled_from(self.files), st.sampled_from(OFFSETS)), min_size=1, max_size=4)
        )
        plans = [plan(f, o, n) for n, (f, o) in enumerate(sorted(places, key=lambda p: (p[0].path, p[1])))]
        name = f"p{next(self.names)}"
        register = Register(
            id=1,
            probe=name,
            generation=1,
            sites=["s"] * len(plans),
            plans=plans,
            where=where,
            returns=data.draw(st.booleans()),
        )
        return self.table.publish(register, lambda: HitRing(returns=register.returns)), where, places

    def round(self, consumer: Consumer) -> None:
        self.looks.run(lambda: self.table.candidates(consumer), "scan")

    def part(self, name: str) -> None:
        consumer = self.table.withdraw(name)
        assert consumer is not None
        self.looks.run(lambda: self.table.concerned(consumer, self.engine.processes()), "reconcile")
        consumer.close()
        self.ended.append((consumer.ring, consumer.ring.hits))
        assert consumer.ring.in_flight == 0, "what was in flight is counted (R13)"

    @rule(data=st.data())
    @precondition(lambda self: len(self.model.wishes) < 4)
    def register(self, data: st.DataObject) -> None:
        consumer, where, places = self.publish(data)
        self.round(consumer)
        self.model.wishes[consumer.probe] = Wish(consumer, where, places)

    @rule(data=st.data())
    @precondition(lambda self: self.model.wishes)
    def register_again(self, data: st.DataObject) -> None:
        """The same terms, and perhaps more places: what an agent does whenever it resolved again (R3)."""
        wish = self.model.wishes[data.draw(st.sampled_from(sorted(self.model.wishes)))]
        old = wish.consumer.register
        more = data.draw(st.sets(st.tuples(st.sampled_from(self.files), st.sampled_from(OFFSETS)), max_size=2))
        plans = list(old.plans) + [plan(f, o, len(old.plans) + n) for n, (f, o) in enumerate(more - wish.places)]
        again = structs.replace(old, generation=2, sites=["s"] * len(plans), plans=plans)
        wish.places |= more
        self.round(self.table.publish(again, HitRing))

    @rule(data=st.data(), k=st.integers(0, 3))
    def register_fails(self, data: st.DataObject, k: int) -> None:
        """The engine fails at the k-th process: out by the way of any probe (R5)."""
        consumer, _, _ = self.publish(data)
        looks = iter(range(1000))
        lock = threading.Lock()

        def fail(process: ProcessId) -> None:
            with lock:
                if next(looks) == k:
                    raise OddError

        self.engine.on_reconcile = fail
        try:
            self.round(consumer)
        except OddError:
            pass
        finally:
            self.engine.on_reconcile = lambda process: None
        self.part(consumer.probe)

    @rule(data=st.data())
    @precondition(lambda self: self.model.wishes)
    def unregister(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.model.wishes)))
        del self.model.wishes[name]
        self.part(name)

    @rule()
    def look(self) -> None:
        """The periodic one, behind all hooks. Where nothing is wanted it looks at no process (R8)."""
        before = self.world.looks
        idle = not self.model.wishes and not self.engine.processes()
        self.table.mark_ended()
        self.looks.run(lambda: self.table.candidates() | set(self.engine.processes()), "reconcile")
        assert not idle or self.world.looks == before
        self.late.clear()

    # --- what has to be so -------------------------------------------------------------------------------------------

    @rule(data=st.data(), offset=st.sampled_from(OFFSETS))
    @precondition(lambda self: self.world.processes)
    def call(self, data: st.DataObject, offset: int) -> None:
        """Every call in every armed place is a hit, of each consumer once; nobody else's, and nobody dies."""
        process, file = self.some(data), data.draw(st.sampled_from(self.files))
        before = {name: w.consumer.ring.hits for name, w in self.model.wishes.items()}
        before_calls = {name: w.consumer.ring.calls for name, w in self.model.wishes.items()}
        # A call that was left by a jump is found out by the next one with its key.
        in_flight = {name: w.consumer.ring.in_flight for name, w in self.model.wishes.items()}
        # (A mapping of which a page in the middle was unmapped is two, with one place for the offset.)
        at = {m.start + offset - m.offset for m in process.memory.mappings if m.file == file.key}
        self.world.call(process, file, offset)
        assert process.status is None, "a trap that nobody served"
        for name, wish in self.model.wishes.items():
            states = self.model.wanted(wish, process)
            expected = sum(states.get(addr) == "armed" for addr in at) if (file, offset) in wish.places else 0
            got = wish.consumer.ring.hits - before[name]
            if wish.returns:
                # What calls it may not be mapped.
                got = wish.consumer.ring.calls - before_calls[name]
                assert wish.consumer.ring.in_flight <= in_flight[name]
            assert got == expected or (process.pid in self.late and got <= len(at))

    @rule(data=st.data(), offset=st.sampled_from(OFFSETS))
    @precondition(lambda self: self.world.processes)
    def enter(self, data: st.DataObject, offset: int) -> None:
        process, file = self.some(data), data.draw(st.sampled_from(self.files))
        if len(process.stack) < 5 and any(m.file == file.key and m.addr(offset) for m in process.memory.mappings):
            self.world.enter(process, file, offset)

    @rule(data=st.data(), times=st.integers(1, 3), jump=st.booleans())
    @precondition(lambda self: any(p.stack for p in self.world.processes.values()))
    def leave(self, data: st.DataObject, times: int, jump: bool) -> None:
        process = self.some(data)
        hits = {name: w.consumer.ring.hits for name, w in self.model.wishes.items() if w.returns}
        self.world.leave(process, times=min(times, len(process.stack)), jump=jump)
        assert process.status is None, "a trap that nobody served"
        for name, before in hits.items():
            got = self.model.wishes[name].consumer.ring.hits - before
            assert 0 <= got <= (0 if jump else times)

    def armed(self, process: SimulatedProcess) -> set[int]:
        return {addr for addr, value in process.memory.written.items() if value == BREAKPOINT}

    @invariant()
    def what_is_armed_is_what_is_wanted(self) -> None:
        for process in self.world.processes.values():
            if process.pid in self.late:
                continue
            states = [self.model.wanted(w, process) for w in self.model.wishes.values()]
            # Where one consumer's plan is bad and another's is not is no case here: a bad place is bad for all.
            wanted = {addr for s in states for addr, state in s.items() if state == "armed"}
            points = self.return_points(process)
            assert self.armed(process) == wanted | points
            assert set(process.memory.written) == wanted | points

    def return_points(self, process: SimulatedProcess) -> set[int]:
        """Where it waits for returns: of those that are wanted, or they would have been taken out."""
        entries = {
            addr
            for wish in self.model.wishes.values()
            if wish.returns
            for addr, state in self.model.wanted(wish, process).items()
            if state == "armed"
        }
        awaited = self.engine.awaited(process)
        assert set().union(*awaited.values()) <= entries
        return set(awaited)

    @invariant()
    def calls_are_hits_or_explained(self) -> None:
        for wish in self.model.wishes.values():
            ring = wish.consumer.ring
            assert ring.in_flight >= 0
            assert ring.calls == (ring.hits + sum(ring.unreturned.values()) + ring.in_flight if wish.returns else 0)

    @invariant()
    def targets_tell_it(self) -> None:
        for wish in self.model.wishes.values():
            told = {(t.pid, t.addr): t.state for t in wish.consumer.targets.values() if t.state != "gone"}
            for process in self.world.processes.values():
                if process.pid in self.late:
                    continue
                states = self.model.wanted(wish, process)
                assert {a for (p, a), s in told.items() if p == process.pid and s == "armed"} == {
                    a for a, s in states.items() if s == "armed"
                }
                for addr, state in states.items():
                    assert told.get((process.pid, addr)) == state
            for pid, _ in (key for key, state in told.items() if state == "armed"):
                assert pid in self.world.processes

    @invariant()
    def without_consumers_nothing_is_left(self) -> None:
        if not self.model.wishes:
            assert self.engine.processes() == []
            assert not any(p.memory.written for p in self.world.processes.values())
            assert not self.table.files()

    @invariant()
    def what_was_taken_out_records_no_more(self) -> None:
        assert all(ring.hits == hits for ring, hits in self.ended)


class TestTable(TableMachine.TestCase):
    """R1, R3, R5, R8, R10, R11, R12, R13, R14, R15, R16, with each rule's events in any order."""

    settings = settings(
        max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
    )
