"""What a process pays that is not probed, while a tracer is at work elsewhere on the host.

A tracer listens to the kernel's stream of mappings of all processes, and holds who maps a probed file: so programs that
compute, write, fork, and above all exec, are timed beside an armed and hit process, and with no tracer at all, in turns
(A-B-A). CPU time is compared, in user and kernel mode, the least of a few tries: it depends least on what else the machine
does. What the tracer itself takes meanwhile is told apart.
"""

from __future__ import annotations

import asyncio
import os
import resource
import statistics
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.engines.rig import PROBED, Rig, rig, trapline
from tests.support.children import Child, fields, run
from trapline_agent.kernel import procfs

_WORK = 800
_EXECS = 150
_TRIES = 5


@dataclass
class Figure:
    what: str
    alone_ms: list[float] = field(default_factory=list)
    beside_ms: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    """Of each round: beside a tracer, against the mean of before and after."""
    tracer_ms: list[float] = field(default_factory=list)


async def _work(child: Child) -> float:
    line = await asyncio.to_thread(child.ask, f"work {_WORK}", 120.0)
    return fields(line)["ns"] / 1e6


def _shell() -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    script = f"i=0; while [ $i -lt {_EXECS} ]; do /bin/true; i=$((i+1)); done"
    done = run(["/bin/sh", "-c", script])
    assert done.returncode == 0, done.stderr
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) * 1e3


def _cpu_ms(pid: int) -> float:
    """Returns the CPU time that a process has taken (proc_pid_stat(5), fields 14 and 15)."""
    stat = procfs.stat_fields(pid)
    return (int(stat[11]) + int(stat[12])) * 1e3 / os.sysconf("SC_CLK_TCK")


async def _least(other: Child, tracer: int = 0) -> list[tuple[float, float]]:
    """Returns (ms of CPU time, the tracer's meanwhile) for each of what bystanders do."""
    result = []
    for once in (lambda: _work(other), lambda: asyncio.to_thread(_shell)):
        before = _cpu_ms(tracer) if tracer else 0.0
        least = min([await once() for _ in range(_TRIES)])  # type: ignore[operator]
        result.append((least, (_cpu_ms(tracer) - before) / _TRIES if tracer else 0.0))
    return result


async def _round(target: Rig, other: Child, figures: list[Figure]) -> None:
    before = await _least(other)
    async with trapline(target.directory) as tracer:
        await tracer.register("elsewhere", [target.plan(PROBED)], pid=target.pid)
        assert (await target.call("boosted", 1, 10))[0] == 10
        beside = await _least(other, tracer.process.pid)
        await tracer.client.unregister("elsewhere")
    after = await _least(other)
    for i, figure in enumerate(figures):
        alone = (before[i][0] + after[i][0]) / 2
        figure.alone_ms.append(alone)
        figure.beside_ms.append(beside[i][0])
        figure.tracer_ms.append(beside[i][1])
        figure.ratios.append(beside[i][0] / alone)


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
            "tracer_ms": statistics.median(f.tracer_ms),
            "ratio": statistics.median(f.ratios),
            "ratios": f.ratios,
        }
        for f in figures
    ]


def show(figures: list[Figure], console: Console) -> None:
    table = Table(title="CPU time of processes that are not probed, ms: without a tracer, and beside one")
    for heading in ("what it does", "without", "beside", "ratio", "lowest - highest", "the tracer's own"):
        table.add_column(heading, justify="left" if heading == "what it does" else "right", no_wrap=True)
    for f in figures:
        table.add_row(
            f.what,
            f"{statistics.median(f.alone_ms):.1f}",
            f"{statistics.median(f.beside_ms):.1f}",
            f"{statistics.median(f.ratios):.3f}",
            f"{min(f.ratios):.3f} - {max(f.ratios):.3f}",
            f"{statistics.median(f.tracer_ms):.1f}",
        )
    console.print(table)
