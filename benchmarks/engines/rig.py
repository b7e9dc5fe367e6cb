"""What the engines' benchmarks share: the target, a tracer of our own, and where things are."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from iced_x86 import Decoder, FlowControl

from tests.engines.host import Files
from tests.support.children import Child, fields
from tests.support.targets import SOURCES, compile_c
from trapline.protocol import aggregates, hits
from trapline.protocol.stacks import unpack
from trapline_agent.arch.x86_64.stepping import plan_step
from trapline_agent.kernel import procfs
from trapline_agent.plans import AggregatePlan, FetchPlan, FileKey, SitePlan
from trapline_agent.targets.maps import executable_mappings
from trapline_agent.tracer import messages as m
from trapline_agent.tracer.client import TracerClient, spawn_tracer
from trapline_agent.unwind.tables import Tables

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TEXT = "a string of some forty bytes, as paths are"
INT3 = b"\xcc"
PROBED = "target_boosted"
_ARMED_S = 20.0


def build(source: str, directory: Path, *flags: str) -> Path:
    """Compiles a program of this directory."""
    output = directory / source.removesuffix(".c")
    compile_c(HERE / source, output, (f"-I{SOURCES}", *flags))
    return output


class Rig:
    """The target: its process, and the addresses of what is probed in it."""

    def __init__(self, directory: Path, cpu: int) -> None:
        self.directory = directory
        self.cpu = cpu
        self.cpus = frozenset(os.sched_getaffinity(0))
        self.files = Files()
        self.path = build("target.c", directory)
        self.child = Child([self.path])

    @property
    def pid(self) -> int:
        return self.child.pid

    def plan(self, symbol: str) -> SitePlan:
        return self.files.plan(self.path, symbol)

    def addr(self, offset: int) -> int:
        """Returns where a file offset of the program is in the process."""
        return next(
            a
            for mapping in executable_mappings(self.pid)
            if mapping.path == str(self.path) and (a := mapping.addr(offset)) is not None
        )

    def return_offset(self) -> int:
        """Returns the file offset of the instruction that `target_boosted` returns to in `target_returning`."""
        start = self.plan("target_returning").offset
        with self.path.open("rb") as file:
            file.seek(start)
            for instruction in Decoder(64, file.read(64), ip=start):
                if instruction.flow_control == FlowControl.CALL:
                    return int(instruction.next_ip)
        raise AssertionError("target_returning calls nothing")

    def beyond(self, offset: int, number: int) -> tuple[int, int]:
        """Returns (address of an instruction, address at which a thread that has hit it goes on), as the engine does it: for
        what it cannot emulate the displaced copy is written, into the ``number``-th place from the end of the
        module's unused bytes."""
        known = self.plan(PROBED)
        with self.path.open("rb") as file:
            file.seek(offset)
            step = plan_step(file.read(15))
        at = self.addr(offset)
        if (emulated := step.next_ip(at)) is not None:
            return at, emulated([])  # type: ignore[arg-type] # none that is probed here looks at registers
        slot_at = self.addr(known.slack_offset) + known.slack_len - 64 * (number + 1)
        with open(f"/proc/{self.pid}/mem", "r+b", buffering=0) as memory:
            memory.seek(slot_at)
            memory.write(step.slot(at, slot_at).code)
        return at, slot_at

    def place(self, pinned: bool, *tools: int) -> None:
        """Pins the target, and the tools that serve it, to one CPU, or lets them run anywhere."""
        for pid in (self.pid, *tools):
            with contextlib.suppress(FileNotFoundError):
                for task in os.listdir(f"/proc/{pid}/task"):
                    with contextlib.suppress(ProcessLookupError):
                        os.sched_setaffinity(int(task), {self.cpu} if pinned else self.cpus)

    async def call(self, kind: str, threads: int, calls: int) -> tuple[int, int]:
        """Has the target call; returns (calls, ns that they took altogether, by its own clock)."""
        line = await asyncio.to_thread(self.child.ask, f"call {kind} {threads} {calls} {TEXT}", 300.0)
        return int(line.split()[1]), fields(line)["ns"]

    async def armed(self, symbol: str, tool: Child | None = None) -> None:
        """Waits until somebody's int3 is at a function. Raises TimeoutError, ChildDied."""
        addr = self.addr(self.plan(symbol).offset)
        memory = os.open(f"/proc/{self.pid}/mem", os.O_RDONLY)
        try:
            async with asyncio.timeout(_ARMED_S):
                while os.pread(memory, 1, addr) != INT3:
                    if tool is not None and not tool.alive():
                        raise RuntimeError(tool.obituary())
                    await asyncio.sleep(0.005)
        finally:
            os.close(memory)


async def untraced(pid: int) -> None:
    """Waits until nobody traces a process: one that is let go without a stop goes a little after the last byte. Raises
    TimeoutError."""
    async with asyncio.timeout(_ARMED_S):
        while procfs.tracer(pid):  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.005)


def cpu_ns(*pids: int) -> int:
    """Returns the CPU time that all threads of some processes have had, in ns (proc_pid_schedstat: the first number)."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            for task in os.listdir(f"/proc/{pid}/task"):
                with contextlib.suppress(OSError):
                    total += int(procfs.read(f"/proc/{pid}/task/{task}/schedstat").split()[0])
    return total


@contextmanager
def rig(cpu: int) -> Iterator[Rig]:
    """Makes a target, and ends it."""
    with tempfile.TemporaryDirectory() as directory:
        made = Rig(Path(directory), cpu)
        with made.child:
            yield made


class Trapline:
    """A tracer of our own, as an agent sees it; counts the hits that it delivers."""

    def __init__(self, client: TracerClient, process: subprocess.Popen[bytes]) -> None:
        self.client = client
        self.process = process
        self.targets: dict[str, int] = {}
        """How many targets of a probe are armed."""
        self._rows: dict[str, int] = {}
        self._tables = Tables()
        self._told: dict[FileKey, tuple[int, int]] = {}
        self.ends: Counter[str] = Counter()
        """How the stacks of hits ended."""
        self._changed = asyncio.Condition()
        self._reader = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async for event in self.client.events():
            async with self._changed:
                if isinstance(event, bytes):
                    header = aggregates.head(event)
                    self._rows[header.probe] = (
                        self._rows.get(header.probe, 0) + header.count + sum(header.drops.values())
                    )
                    if header.files:
                        self._look_at_stacks(hits.decode(event))
                elif isinstance(event, m.FrameFile):
                    made = await asyncio.to_thread(self._tables.make, event)
                    if made is not None and self._told.get(event.file) != made.stamp:
                        self._told[event.file] = made.stamp
                        self.client.set_frame_table(event.file, made.build_id, made.data)
                elif isinstance(event, m.Targets):
                    armed = sum(t.state == "armed" for t in event.targets)
                    self.targets[event.probe] = self.targets.get(event.probe, 0) + armed
                self._changed.notify_all()

    def _look_at_stacks(self, batch: hits.HitBatch) -> None:
        for column in batch.header.columns:
            if column.type == "stack":
                for i in batch.columns[column.name].tolist():
                    stack = unpack(batch.header.strings[i], batch.header.files)
                    self.ends[f"{stack.end.text}, {len(stack.frames)} frames"] += 1

    returns = "returns" in inspect.signature(TracerClient.register).parameters
    """Whether this release has return probes."""

    async def register(
        self,
        probe: str,
        plans: Sequence[SitePlan],
        fetches: Sequence[FetchPlan] = (),
        pid: int = 0,
        *,
        returns: bool = False,
        aggregate: AggregatePlan | None = None,
    ) -> None:
        """Registers; in one process, or in all that map the files."""
        more: dict[str, Any] = {"returns": True} if returns else {}
        if aggregate is not None:
            more["aggregate"] = aggregate
        await self.client.register(
            probe,
            generation=1,
            sites=[f"s{p.site}" for p in plans],
            plans=plans,
            fetches=fetches,
            where={"pid": str(pid)} if pid else {},
            **more,
        )

    async def armed(self, probe: str, number: int) -> None:
        """Waits until so many targets of a probe were told of."""
        async with asyncio.timeout(60), self._changed:
            await self._changed.wait_for(lambda: self.targets.get(probe, 0) >= number)

    async def hits(self, probe: str, expected: int) -> int:
        """Returns the hits of a probe, recorded or counted as dropped, when as many as expected have come, or 5 s."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(5), self._changed:
                await self._changed.wait_for(lambda: self._rows.get(probe, 0) >= expected)
        return self._rows.get(probe, 0)

    async def close(self) -> None:
        await self.client.shutdown()
        self._reader.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)


@asynccontextmanager
async def trapline(directory: Path, name: str = "tracer") -> AsyncIterator[Trapline]:
    """Starts a tracer, and ends it."""
    socket = directory / f"{name}.sock"
    process = spawn_tracer(socket, log=directory / f"{name}.log")
    try:
        client = await TracerClient.connect(
            socket, host="hst_bench", process=process, budgets=m.Budgets(probe=0, process=0, host=0)
        )
        made = Trapline(client, process)
        yield made
        await made.close()
    finally:
        process.terminate()
        await asyncio.to_thread(process.wait)
        if log := (directory / f"{name}.log").read_text():
            print(f"the tracer complained: {log[-2000:]}", file=sys.stderr)
