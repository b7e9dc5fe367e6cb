"""A small host for the contract tests: a uprobe table and the engine under test, in this process.

The sinks run while the thread that hit is stopped, so after a target has answered, ``hits`` is exact: nothing to wait for.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from msgspec import structs

from tests.support.world import SimulatedFiles
from trapline.aggregates import Table as Cells
from trapline.protocol import aggregates
from trapline.protocol.hits import HitBatch, decode
from trapline.spec import parse_probe
from trapline_agent.engines.aggregate import AggregateStore
from trapline_agent.engines.base import Engine, Observer, ProcessId
from trapline_agent.engines.fake import FakeEngine, World
from trapline_agent.engines.journal import Journal, boot_id, parse, pid_namespace
from trapline_agent.engines.ptrace.engine import PtraceEngine
from trapline_agent.engines.ptrace.memory import AddressSpace
from trapline_agent.engines.restoring import Outcome, restore_all
from trapline_agent.engines.ring import HitRing
from trapline_agent.kernel import procfs
from trapline_agent.plans import AggregatePlan, FetchPlan, SitePlan
from trapline_agent.points import usdt_places
from trapline_agent.symbols.elf import ElfFile
from trapline_agent.symbols.index import IndexCache
from trapline_agent.targets.files import file_key_of
from trapline_agent.targets.maps import executable_mappings
from trapline_agent.tracer.looks import Looks
from trapline_agent.tracer.messages import Register, TargetState
from trapline_agent.tracer.table import Consumer, Table

_LOADER = Path("/lib64/ld-linux-x86-64.so.2")
_LIBC = Path("/lib/x86_64-linux-gnu/libc.so.6")


class Files:
    """Plans by symbol, as the agent would make them."""

    def __init__(self) -> None:
        self._cache = IndexCache()

    def plan(self, path: Path, symbol: str, site: int = 0, offset: int = 0) -> SitePlan:
        fd = os.open(path, os.O_RDONLY)
        try:
            index = self._cache.get(fd, str(path))
            found = index.find(symbol)[0]
            segment = index.segment_at(found.offset)
            assert segment is not None
            at = found.offset + offset
            return SitePlan(
                site=site,
                file=file_key_of(fd, str(path)),
                path=str(path),
                offset=at,
                code=os.pread(fd, min(15, segment.end - at), at),
                slack_offset=segment.slack_offset,
                slack_len=segment.slack_len,
            )
        finally:
            os.close(fd)

    def usdt(self, path: Path) -> list[SitePlan]:
        """Plans of the places of the probe of ``usdt.c``."""
        fd = os.open(path, os.O_RDONLY)
        try:
            index, elf = self._cache.get(fd, str(path)), ElfFile(fd, str(path))
            places = list(usdt_places(parse_probe(f"usdt:{path}:shop:sold"), elf, index, path.name))
            file = file_key_of(fd, str(path))
            return [
                SitePlan(
                    site=0,
                    file=file,
                    path=str(path),
                    offset=p.offset,
                    code=os.pread(fd, 15, p.offset),
                    semaphore=p.semaphore,
                )
                for p in places
            ]
        finally:
            os.close(fd)


class Host:
    """Registers and unregisters as the tracer's control thread does."""

    def __init__(self, make: Callable[[Observer], Engine]) -> None:
        world = World() if make is FakeEngine else None
        self.table = Table(proc=world)
        self.table.self_pids = frozenset((os.getpid(),))
        self.journal = Journal(os.memfd_create("journal", os.MFD_CLOEXEC)) if make is PtraceEngine else None
        if make is PtraceEngine:
            self.engine: Engine = PtraceEngine(self.table, self.journal)
        else:
            self.engine = make(self.table) if world is None else FakeEngine(self.table, world)
        self.looks = Looks(self.engine)
        self.files = Files() if world is None else SimulatedFiles(world)
        if world is None:
            longjmps = [self.files.plan(_LIBC.resolve(), name) for name in ("longjmp", "__longjmp_chk")]
            loader = self.files.plan(_LOADER.resolve(), "_dl_debug_state")
            self.table.set_loaders([loader, *(structs.replace(p, unwinds=True) for p in longjmps)])
        self._consumers: dict[str, Consumer] = {}

    def register(
        self,
        plans: SitePlan | Sequence[SitePlan],
        *,
        probe: str = "p",
        fetches: Sequence[FetchPlan] = (),
        max_hits: int = 0,
        returns: bool = False,
        aggregate: AggregatePlan | None = None,
        **where: object,
    ) -> Probe:
        """Registers a probe: publishes it, then looks at every process."""
        plans = [plans] if isinstance(plans, SitePlan) else list(plans)
        message = Register(
            id=1,
            probe=probe,
            generation=1,
            sites=[f"site{p.site}" for p in plans],
            plans=plans,
            fetches=list(fetches),
            where={k: str(v) for k, v in where.items()},
            max_hits=max_hits,
            returns=returns,
            aggregate=aggregate,
        )

        def ring() -> HitRing:
            if aggregate is None:
                return HitRing(fetches, max_hits=max_hits, returns=returns, stacks=self.table.stacks)
            return AggregateStore(aggregate, fetches, {}, max_hits=max_hits, returns=returns)

        consumer = self.table.publish(message, ring)
        self._consumers[probe] = consumer
        self.looks.run(lambda: self.table.candidates(consumer), "scan")
        return Probe(self, consumer)

    def unregister(self, probe: str = "p") -> None:
        """Withdraws a probe; its bytes are out when this returns."""
        consumer = self.table.withdraw(probe)
        if consumer is not None:
            self.looks.run(lambda: self.table.concerned(consumer, self.engine.processes()), "reconcile")
            consumer.close()

    def reconcile(self, pid: int) -> None:
        self.engine.reconcile(ProcessId(pid, procfs.start_time(pid)), "reconcile")

    def tick(self) -> None:
        """Has the engine try again what it could not do."""
        if retry := self.engine.tick():
            self.looks.run(lambda: retry, "reconcile")

    def follows(self, pid: int) -> bool:
        """Whether the engine has anything to do with a process still."""
        if isinstance(self.engine, FakeEngine):
            return pid in {p.pid for p in self.engine.processes()}
        return procfs.tracer(pid) != 0

    def altered(self, pid: int, paths: Iterable[Path] | None = None) -> dict[tuple[str, int], tuple[int, int]]:
        """As ``altered_bytes``; of every mapped file where none is named."""
        if isinstance(self.engine, FakeEngine):
            names = None if paths is None else {str(p) for p in paths}
            found = self.engine.world.altered(self.engine.world.processes[pid])
            return {k: v for k, v in found.items() if names is None or k[0] in names}
        return altered_bytes(pid, mapped_files(pid) if paths is None else paths)

    @contextlib.contextmanager
    def untouched(self, pid: int) -> Iterator[None]:
        """As ``untouched``."""
        if isinstance(self.engine, FakeEngine):
            yield
            assert self.altered(pid) == {}
            assert pid not in {p.pid for p in self.engine.processes()}
        else:
            with untouched(pid):
                yield

    def overwrite(self, pid: int, program: Path, symbol: str, content: bytes) -> None:
        """Changes the code of a process, as another tool would."""
        if isinstance(self.engine, FakeEngine):
            self.engine.world.overwrite(pid, self.files.plan(program, symbol), content[0])
            return
        plan = self.files.plan(program, symbol)
        at = next(a for m in executable_mappings(pid) if m.file == plan.file and (a := m.addr(plan.offset)))
        with open(f"/proc/{pid}/mem", "r+b", 0) as memory:
            memory.seek(at)
            memory.write(content)

    def close(self) -> None:
        for consumer in self.table.consumers:
            self.unregister(consumer.probe)
        self.engine.close()
        if self.journal is not None:
            data = os.pread(self.journal.fd, os.fstat(self.journal.fd).st_size, 0)
            os.close(self.journal.fd)
            entries = [e for _, e in parse(data, boot_id(), pid_namespace()).entries]
            left = [e for e, outcome in restore_all(entries, kin_of=entries) if outcome is Outcome.RESTORED]
            assert not left, f"all was taken out, but for {left}"


ENGINES: dict[str, type[PtraceEngine] | type[FakeEngine]] = {
    "ptrace": PtraceEngine,
    "mapped-slots": PtraceEngine,
    "fake": FakeEngine,
}
"""``mapped-slots``: as if no file had room behind its code."""


@contextlib.contextmanager
def host_over(engine: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    """A host over one of ``ENGINES``, which is closed in the end."""
    if engine == "mapped-slots":
        monkeypatch.setattr(AddressSpace, "uses_slack", False)
    host = Host(ENGINES[engine])
    try:
        yield host
    finally:
        host.close()


class Probe:
    """A registered probe, as a test looks at it."""

    def __init__(self, host: Host, consumer: Consumer) -> None:
        self._host = host
        self._consumer = consumer

    @property
    def hits(self) -> int:
        return self._consumer.ring.hits

    @property
    def ring(self) -> HitRing:
        return self._consumer.ring

    @property
    def calls(self) -> int:
        return self.ring.calls

    @property
    def unreturned(self) -> dict[str, int]:
        return dict(self.ring.unreturned)

    @property
    def in_flight(self) -> int:
        return self.ring.in_flight

    @property
    def targets(self) -> list[TargetState]:
        return list(self._consumer.targets.values())

    def states(self) -> Counter[str]:
        return Counter(t.state for t in self.targets)

    def batches(self) -> list[HitBatch]:
        """Drains the ring."""
        return [decode(batch) for _, batch in self._drained()]

    def _drained(self) -> list[tuple[int, bytes]]:
        return self.ring.drain(
            host="h",
            probe=self._consumer.probe,
            source="s",
            generation=1,
            sites=self._consumer.register.sites,
            comms={},
        )

    def table(self) -> Cells:
        """Drains the store of an aggregate."""
        table = Cells(100_000)
        for _, frame in self._drained():
            aggregates.decode(frame).add_to(table)
        return table

    def unregister(self) -> None:
        self._host.unregister(self._consumer.probe)


def altered_bytes(pid: int, paths: Iterable[Path]) -> dict[tuple[str, int], tuple[int, int]]:
    """Returns where the code of a process differs from its files: {(path, file offset): (in the file, in memory)}."""
    names = {str(p) for p in paths}
    found: dict[tuple[str, int], tuple[int, int]] = {}
    with open(f"/proc/{pid}/mem", "rb", 0) as memory:
        for mapping in executable_mappings(pid):
            if mapping.path not in names:
                continue
            length = mapping.end - mapping.start
            with contextlib.suppress(OSError):
                memory.seek(mapping.start)
                mapped = memory.read(length)
                with open(mapping.path, "rb") as file:
                    file.seek(mapping.offset)
                    content = file.read(length).ljust(length, b"\0")
                ours, theirs = (np.frombuffer(part, np.uint8, len(mapped)) for part in (content, mapped))
                for i in np.flatnonzero(ours != theirs).tolist():
                    found[mapping.path, mapping.offset + i] = (content[i], mapped[i])
    return found


def mapped_files(pid: int) -> set[Path]:
    return {Path(m.path) for m in executable_mappings(pid)}


@contextlib.contextmanager
def untouched(pid: int) -> Iterator[None]:
    """Asserts that the body leaves a process' code as its files have it, and nobody tracing it (semantics S3)."""
    yield
    assert altered_bytes(pid, mapped_files(pid)) == {}
    for tid in procfs.tasks(pid):
        assert procfs.tracer(tid) == 0, f"thread {tid} of {pid} is still traced"
