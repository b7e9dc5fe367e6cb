"""Several hot processes at once: what one tracer can serve, and what more of them would.

A tracer follows each process with a thread of its own, on the CPU where the process runs, but all its threads share one
interpreter. So two hot processes on two CPUs are served by one tracer, and by one each, beside one process alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.engines.rig import PROBED, Rig, Trapline, rig, trapline

_CALLS = 6000


@dataclass
class Figure:
    what: str
    us: list[float] = field(default_factory=list)
    """Added to a hit of one process."""

    @property
    def median(self) -> float:
        return statistics.median(self.us)


async def _run(rigs: Sequence[Rig]) -> float:
    """Has all targets call at once; returns us per call of the slowest."""
    done = await asyncio.gather(*(r.call("boosted", 1, _CALLS) for r in rigs))
    return max(ns / calls for calls, ns in done) / 1e3


async def _probed(rigs: Sequence[Rig], tracers: Sequence[Trapline], number: int) -> float:
    names = [f"several-{number}-{i}" for i in range(len(rigs))]
    for r, tracer, name in zip(rigs, tracers, names, strict=True):
        await tracer.register(name, [r.plan(PROBED)], pid=r.pid)
    await asyncio.gather(*(r.call("boosted", 1, 200) for r in rigs))  # each tracer thread finds its CPU
    us = await _run(rigs)
    for tracer, name in zip(tracers, names, strict=True):
        await tracer.client.unregister(name)
        hits = await tracer.hits(name, _CALLS + 200)
        assert hits == _CALLS + 200, f"{hits} hits of {_CALLS + 200}"
    return us


async def measure(rounds: int, console: Console) -> list[Figure]:
    cpus = sorted(os.sched_getaffinity(0))[:2]
    figures = [
        Figure("one process, one CPU"),
        Figure("two processes, one CPU, one tracer"),
        Figure("two processes, two CPUs, one tracer"),
        Figure("two processes, two CPUs, a tracer each"),
    ]
    if len(cpus) < 2:
        return []
    with contextlib.ExitStack() as stack, Progress(console=console, transient=True) as progress:
        one, two = (stack.enter_context(rig(cpu)) for cpu in cpus)
        async with trapline(one.directory) as first, trapline(two.directory) as second:
            for number in progress.track(range(rounds), description="several"):
                one.cpu = two.cpu = cpus[0]
                for r in (one, two):
                    r.place(True)
                figures[0].us.append(await _probed([one], [first], 4 * number))
                figures[1].us.append(await _probed([one, two], [first, first], 4 * number + 1))
                two.cpu = cpus[1]
                two.place(True)
                figures[2].us.append(await _probed([one, two], [first, first], 4 * number + 2))
                figures[3].us.append(await _probed([one, two], [first, second], 4 * number + 3))
    return figures


def to_json(figures: list[Figure]) -> list[dict[str, Any]]:
    return [{"what": f.what, "us": f.median, "rounds_us": f.us} for f in figures]


def show(figures: list[Figure], console: Console) -> None:
    table = Table(title="several hot processes at once, pinned: us per hit of each")
    for heading in ("what", "us", "lowest - highest", "hits/s of all"):
        table.add_column(heading, justify="left" if heading == "what" else "right", no_wrap=True)
    for i, f in enumerate(figures):
        table.add_row(
            f.what,
            f"{f.median:.1f}",
            f"{min(f.us):.1f} - {max(f.us):.1f}",
            f"{(1 if i == 0 else 2) * 1e6 / f.median:,.0f}",
        )
    console.print(table)
