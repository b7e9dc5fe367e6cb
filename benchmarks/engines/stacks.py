"""What stacks cost: python -m benchmarks.engines.stacks [--rounds 7] [--cpu N] [--json]

*Added* is the time of a hit by the target's own clock, less that of the unprobed call (A-B-A); *for the stack* is what it is
more than a hit that captures nothing, taken in turns with it. The target and the tracer are pinned to one CPU. Besides: how
long tables take to be made, by files, and by pyelftools for the same.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from elftools.dwarf.callframe import FDE
from elftools.elf.elffile import ELFFile
from rich.console import Console
from rich.table import Table

from benchmarks.engines.rig import Files, Trapline, trapline
from tests.support.children import Child, fields
from tests.support.targets import SOURCES, compile_c
from trapline_agent.plans import FetchPlan
from trapline_agent.symbols.elf import ElfFile
from trapline_agent.unwind.eh_frame import read_table

DEPTHS = (5, 20, 50, 120)
_BELOW = 5
"""Frames below the recursion: main and what calls it."""
_CALLS = 4000
FILES = ("/lib/x86_64-linux-gnu/libc.so.6", "/usr/bin/python3.11", "/usr/lib/x86_64-linux-gnu/libcrypto.so.3")


async def measure(rounds: int, cpu: int) -> tuple[dict[str, dict[str, float]], dict[str, int]]:
    """Returns microseconds by depth, and how the stacks ended."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        program = directory / "stacks"
        compile_c(SOURCES / "stacks.c", program, ())
        plan = Files().plan(program, "target_here")
        with Child([program]) as child:
            async with trapline(directory) as tracer:
                for pid in (child.pid, tracer.process.pid):
                    for task in os.listdir(f"/proc/{pid}/task"):
                        os.sched_setaffinity(int(task), (cpu,))
                added: dict[int, dict[str, list[float]]] = {d: {"plain": [], "stack": []} for d in DEPTHS}
                for _ in range(rounds):
                    for depth in DEPTHS:
                        for kind in ("plain", "stack"):
                            added[depth][kind].append(await _one(tracer, child, plan, depth, kind))
                ends = dict(tracer.ends)
    figures = {}
    for depth, by in added.items():
        plain, stack = (statistics.median(by[kind]) / 1000 for kind in ("plain", "stack"))
        figures[f"{depth}"] = {"plain": plain, "stack": stack, "for the stack": stack - plain}
    return figures, ends


async def _one(tracer: Trapline, child: Child, plan: Any, depth: int, kind: str) -> float:
    """Returns the ns that a hit adds to a call."""
    command = f"spin {max(1, depth - _BELOW)} {_CALLS}"

    async def ns() -> float:
        return fields(await asyncio.to_thread(child.ask, command))["ns"] / _CALLS

    before = await ns()
    fetches = [FetchPlan(name="stack", register="rip", stack=depth)] if kind == "stack" else []
    probe = f"{kind} {depth} {time.monotonic_ns()}"
    await tracer.register(probe, [plan], fetches, child.pid)
    await tracer.armed(probe, 1)
    if kind == "stack":
        await asyncio.sleep(0.2)  # for the tables
    probed = await ns()
    await tracer.hits(probe, _CALLS)
    await tracer.client.unregister(probe)
    return probed - (before + await ns()) / 2


def tables() -> dict[str, dict[str, float]]:
    """Returns ms and rows, by file."""
    found: dict[str, dict[str, float]] = {}
    for path in FILES:
        if not os.path.exists(path):
            continue
        fd = os.open(path, os.O_RDONLY)
        try:
            began = time.perf_counter()
            made = read_table(ElfFile(fd, path))
            took = time.perf_counter() - began
        finally:
            os.close(fd)
        began = time.perf_counter()
        with open(path, "rb") as file:
            for entry in ELFFile(file).get_dwarf_info().EH_CFI_entries():
                if isinstance(entry, FDE):
                    try:
                        entry.get_decoded()
                    except ValueError:
                        continue
        theirs = time.perf_counter() - began
        found[path] = {
            "rows": len(made),
            "bytes": len(made.encode()),
            "ms": took * 1000,
            "pyelftools ms": theirs * 1000,
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engines.stacks", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="default %(default)s")
    parser.add_argument("--cpu", type=int, default=max(os.sched_getaffinity(0)), help="where all is pinned")
    parser.add_argument("--json", action="store_true", help="figures as JSON")
    args = parser.parse_args()
    figures, ends = asyncio.run(measure(args.rounds, args.cpu))
    made = tables()
    if args.json:
        print(json.dumps({"depths": figures, "ends": ends, "tables": made}, indent=1))
        return
    console = Console()
    for title, rows in (("hits, us", figures), ("tables", made)):
        table = Table(title=title)
        for column in ("", *next(iter(rows.values()))):
            table.add_column(column, justify="right" if column else "left")
        for name, row in rows.items():
            table.add_row(name, *(f"{value:,.1f}" for value in row.values()))
        console.print(table)
    console.print(ends)


if __name__ == "__main__":
    main()
