"""How long it takes to put probes in, and to take them out again.

Trapline's times are those that an agent sees: from the request to the tracer's answer, over its socket, every byte written.
Of the other tools the whole is taken, their start included, until the last byte is in the target; and from the signal that
ends them until they have ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.engines.rig import INT3, Rig, Trapline, rig, trapline
from tests.support import uprobe
from tests.support.children import Child
from tests.support.targets import compile_c
from trapline_agent.plans import SitePlan
from trapline_agent.targets.maps import executable_mappings

NUMBERS = (1, 100, 1000)
_SYMBOL = "many_{:04}"
_PERF_MOST = 10
_BPFTRACE_MOST = 100
"""Probes of perf, and of a bpftrace that uses its events (0.17), take tens of ms each to come out, one after the other: a
thousand of them more than a minute."""


@dataclass
class Figure:
    what: str
    tool: str
    number: int
    in_ms: list[float] = field(default_factory=list)
    out_ms: list[float] = field(default_factory=list)


class Many:
    """A process with many functions."""

    def __init__(self, directory: Path) -> None:
        source = directory / "many.c"
        lines = [f'__attribute__((naked, noipa, used)) void {_SYMBOL.format(i)}(void) {{ __asm__("endbr64; ret"); }}'
                 for i in range(NUMBERS[-1])]  # fmt: skip
        source.write_text(
            "#include <unistd.h>\n"
            + "\n".join(lines)
            + '\nint main(void) { write(1, "ready\\n", 6); pause(); return 0; }\n'
        )
        self.path = directory / "many"
        compile_c(source, self.path, ("-Wno-unused-result",))
        self.child = Child([self.path])

    def plans(self, rig: Rig, number: int) -> list[SitePlan]:
        return [rig.files.plan(self.path, _SYMBOL.format(i), site=i) for i in range(number)]

    def armed(self, plans: list[SitePlan]) -> int:
        """Returns at how many of the plans' instructions there is an int3."""
        mapping = next(x for x in executable_mappings(self.child.pid) if x.path == str(self.path))
        with open(f"/proc/{self.child.pid}/mem", "rb", buffering=0) as memory:
            text = os.pread(memory.fileno(), mapping.end - mapping.start, mapping.start)
        return sum(text[p.offset - mapping.offset :][:1] == INT3 for p in plans)


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(120):
        while not condition():  # noqa: ASYNC110 - it is another process' memory
            await asyncio.sleep(0.001)


async def _timed(work: Awaitable[object]) -> float:
    began = time.perf_counter()
    await work
    return (time.perf_counter() - began) * 1e3


class Attach:
    """The measurements."""

    def __init__(self, rig: Rig, tracer: Trapline, many: Many, rounds: int) -> None:
        self.figures: list[Figure] = []
        self._rig, self._tracer, self._many, self._rounds = rig, tracer, many, rounds
        self._names = 0

    def _name(self) -> str:
        self._names += 1
        return f"attach-{self._names}"

    async def sites(self, number: int) -> None:
        """One probe on many functions of one process."""
        figure = Figure("functions, one probe", "trapline ptrace", number)
        plans, tracer = self._many.plans(self._rig, number), self._tracer
        for _ in range(self._rounds):
            name = self._name()
            figure.in_ms.append(await _timed(tracer.register(name, plans, pid=self._many.child.pid)))
            assert self._many.armed(plans) == number
            figure.out_ms.append(await _timed(tracer.client.unregister(name)))
            assert self._many.armed(plans) == 0
        self.figures.append(figure)

    async def probes(self, number: int) -> None:
        """Many probes on a function each of one process, asked for at once."""
        figure = Figure("probes, one function each", "trapline ptrace", number)
        plans, tracer = self._many.plans(self._rig, number), self._tracer
        for _ in range(self._rounds):
            names = [self._name() for _ in plans]
            registers = (
                tracer.register(n, [_first(p)], pid=self._many.child.pid) for n, p in zip(names, plans, strict=True)
            )
            figure.in_ms.append(await _timed(asyncio.gather(*registers)))
            assert self._many.armed(plans) == number
            figure.out_ms.append(await _timed(asyncio.gather(*(tracer.client.unregister(n) for n in names))))
            assert self._many.armed(plans) == 0
        self.figures.append(figure)

    async def processes(self, number: int) -> None:
        """One probe on one function of many processes."""
        figure = Figure("processes, one probe", "trapline ptrace", number)
        with Child([self._rig.path]) as parent:
            if number > 1:
                parent.send(f"fork {number - 1}")
                await asyncio.to_thread(parent.wait_for, "forked")
            plan = self._rig.plan("target_boosted")
            for _ in range(self._rounds if number < NUMBERS[-1] else 1):
                name = self._name()
                figure.in_ms.append(await _timed(self._tracer.register(name, [plan])))
                await self._tracer.armed(name, number)
                figure.out_ms.append(await _timed(self._tracer.client.unregister(name)))
        self.figures.append(figure)

    # --- others ------------------------------------------------------------------------------------------------------

    async def bpftrace(self, number: int) -> None:
        figure = Figure("functions, one probe", "bpftrace (with its start)", number)
        plans = self._many.plans(self._rig, number)
        pattern = {1: "many_0000", 100: "many_00*"}[number]
        argv = ["bpftrace", "-e", f"uprobe:{self._many.path}:{pattern} {{ @ = count(); }}"]
        began = time.perf_counter()
        with Child(argv, ready=None) as tool:
            await _until(lambda: self._many.armed(plans) == number or not tool.alive())
            assert tool.alive(), tool.obituary()
            figure.in_ms.append((time.perf_counter() - began) * 1e3)
            tool.signal(signal.SIGINT)
            figure.out_ms.append(await _timed(asyncio.to_thread(tool.wait, 300.0)))
        self.figures.append(figure)

    async def gdb(self, number: int) -> None:
        figure = Figure("functions, one probe", "gdb (with its start)", number)
        plans = self._many.plans(self._rig, number)
        with tempfile.NamedTemporaryFile("w", suffix=".gdb") as script:
            # What it says of each breakpoint would fill the pipe, which nobody reads.
            breaks = f'for i in range({number}): gdb.execute("break *&{_SYMBOL}".format(i), to_string=True)'
            script.write(f"set confirm off\npython\n{breaks}\nend\ncontinue\ndelete\ndetach\n")
            script.flush()
            argv = ["gdb", "--nx", "--batch", "-p", str(self._many.child.pid), "-x", script.name]
            for _ in range(min(self._rounds, 2)):
                began = time.perf_counter()
                with Child(argv, ready=None, stderr=-3, session=True) as tool:
                    await _until(lambda: self._many.armed(plans) == number or not tool.alive())
                    assert tool.alive(), tool.obituary()
                    figure.in_ms.append((time.perf_counter() - began) * 1e3)
                    tool.signal(signal.SIGINT)
                    figure.out_ms.append(await _timed(asyncio.to_thread(tool.wait, 300.0)))
        self.figures.append(figure)

    async def perf(self, number: int) -> None:
        figure = Figure("functions, one probe", "perf uprobe events", number)
        plans = self._many.plans(self._rig, number)
        with contextlib.ExitStack() as events:
            began = time.perf_counter()
            for plan in plans:
                events.enter_context(uprobe.kernel_count(self._many.path, plan.offset))
            figure.in_ms.append((time.perf_counter() - began) * 1e3)
            assert self._many.armed(plans) == number
            began = time.perf_counter()
        figure.out_ms.append((time.perf_counter() - began) * 1e3)
        self.figures.append(figure)


def _first(plan: SitePlan) -> SitePlan:
    """Returns a plan as the first site of a probe."""
    return SitePlan(**{**{name: getattr(plan, name) for name in plan.__struct_fields__}, "site": 0})


async def measure(rounds: int, cpu: int, peers: bool, console: Console) -> list[Figure]:
    with rig(cpu) as target:
        many = Many(target.directory)
        async with trapline(target.directory) as tracer:
            attach = Attach(target, tracer, many, rounds)
            works = [(part, n) for part in (attach.sites, attach.probes, attach.processes) for n in NUMBERS]
            if peers and not os.geteuid():
                works += [(attach.bpftrace, n) for n in (1, _BPFTRACE_MOST) if shutil.which("bpftrace")]
                works += [(attach.perf, n) for n in (1, _PERF_MOST) if uprobe.PMU.exists()]
            if peers and shutil.which("gdb"):
                works += [(attach.gdb, n) for n in NUMBERS]
            with many.child, Progress(console=console, transient=True) as progress:
                task = progress.add_task("attach", total=len(works))
                for part, number in works:
                    progress.update(task, description=f"attach: {part.__name__}, {number}")
                    await part(number)
                    progress.advance(task)
    return attach.figures


def to_json(figures: list[Figure]) -> list[dict[str, Any]]:
    return [
        {
            "what": f.what,
            "tool": f.tool,
            "number": f.number,
            "in_ms": statistics.median(f.in_ms),
            "out_ms": statistics.median(f.out_ms),
            "rounds_in_ms": f.in_ms,
            "rounds_out_ms": f.out_ms,
        }
        for f in figures
    ]


def show(figures: list[Figure], console: Console) -> None:
    table = Table(title="ms to put in, and to take out (median; highest)")
    for heading in ("what", "tool", "number", "in", "", "out", ""):
        table.add_column(heading, justify="left" if heading in ("what", "tool") else "right", no_wrap=True)
    for f in figures:
        table.add_row(
            f.what,
            f.tool,
            f"{f.number:,}",
            f"{statistics.median(f.in_ms):.1f}",
            f"{max(f.in_ms):.0f}",
            f"{statistics.median(f.out_ms):.1f}",
            f"{max(f.out_ms):.0f}",
        )
    console.print(table)
