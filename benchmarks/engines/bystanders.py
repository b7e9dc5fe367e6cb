"""What a process pays that is not probed, while a tracer is at work elsewhere on the host.

A tracer listens to the kernel's stream of mappings of all processes, and holds who maps a probed file: so programs that
compute, write, fork, and above all exec, are timed beside an armed and hit process, and with no tracer at all, in turns (A-B-A).
"""

from __future__ import annotations

import asyncio
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.engines.rig import PROBED, Rig, rig, trapline
from tests.support.children import Child, fields, run

_WORK = 1500
_EXECS = 150


@dataclass
class Figure:
    what: str
    alone_ms: list[float] = field(default_factory=list)
    beside_ms: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    """Of each round: beside a tracer, against the mean of before and after."""


async def _work(child: Child) -> float:
    line = await asyncio.to_thread(child.ask, f"work {_WORK}", 120.0)
    return fields(line)["ns"] / 1e6


async def _execs() -> float:
    began = time.perf_counter()
    script = f"i=0; while [ $i -lt {_EXECS} ]; do /bin/true; i=$((i+1)); done"
    done = await asyncio.to_thread(run, ["/bin/sh", "-c", script])
    assert done.returncode == 0, done.stderr
    return (time.perf_counter() - began) * 1e3


async def _round(target: Rig, other: Child, figures: list[Figure]) -> None:
    async def both() -> tuple[float, float]:
        return await _work(other), await _execs()

    before = await both()
    async with trapline(target.directory) as tracer:
        await tracer.register("elsewhere", [target.plan(PROBED)], pid=target.pid)
        assert (await target.call("boosted", 1, 10))[0] == 10
        beside = await both()
        await tracer.client.unregister("elsewhere")
    after = await both()
    for i, figure in enumerate(figures):
        alone = (before[i] + after[i]) / 2
        figure.alone_ms.append(alone)
        figure.beside_ms.append(beside[i])
        figure.ratios.append(beside[i] / alone)


async def measure(rounds: int, cpu: int, console: Console) -> list[Figure]:
    figures = [Figure("computes, writes, maps, forks"), Figure("a shell that starts programs")]
    with rig(cpu) as target:
        # Another file than the probed one: the same program would be looked at, for its inode.
        copy = target.directory / "bystander"
        copy.write_bytes(target.path.read_bytes())
        copy.chmod(0o755)
        with Child([copy]) as other, Progress(console=console, transient=True) as progress:
            for _ in progress.track(range(rounds), description="bystanders"):
                await _round(target, other, figures)
    return figures


def to_json(figures: list[Figure]) -> list[dict[str, Any]]:
    return [
        {
            "what": f.what,
            "alone_ms": statistics.median(f.alone_ms),
            "beside_ms": statistics.median(f.beside_ms),
            "ratio": statistics.median(f.ratios),
            "ratios": f.ratios,
        }
        for f in figures
    ]


def show(figures: list[Figure], console: Console) -> None:
    table = Table(title="a process that is not probed, ms: without a tracer, and beside one")
    for heading in ("what it does", "without", "beside", "ratio", "lowest - highest"):
        table.add_column(heading, justify="left" if heading == "what it does" else "right", no_wrap=True)
    for f in figures:
        table.add_row(
            f.what,
            f"{statistics.median(f.alone_ms):.1f}",
            f"{statistics.median(f.beside_ms):.1f}",
            f"{statistics.median(f.ratios):.3f}",
            f"{min(f.ratios):.3f} - {max(f.ratios):.3f}",
        )
    console.print(table)
