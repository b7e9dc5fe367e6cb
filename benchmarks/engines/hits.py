"""Cost of a hit: the time that one adds to the traced program's own, beside other tools in one run.

The target calls a function in a loop and takes the time itself. Every arming lies between two measurements of the unprobed
function (A-B-A), all ways take turns, and the median over the rounds counts. Hits are held against the target's calls: a
figure beside which hits were lost is marked.

*CPU* is the CPU time of a hit, the target's and the tool's, in the kernel and outside, while both are pinned: unlike the
time that passes it depends little on what else the machine does. The least round counts.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.engines.peers import KINDS, Session, Way, all_ways
from benchmarks.engines.rig import Rig, cpu_ns, rig, trapline

THREADS = (1, 4, 16, 64)
_UNPROBED = 100_000
_FIRST = 256
"""Calls of the first measurement of a cell, which says how many more fit into the time for one."""
_MOST = 20_000


@dataclass(frozen=True)
class Cell:
    """One figure."""

    tool: str
    kind: str
    threads: int
    pinned: bool

    @property
    def placement(self) -> str:
        return "pinned" if self.pinned else "free"


@dataclass
class Figure:
    added_ns: list[float] = field(default_factory=list)
    cpu_ns: list[float] = field(default_factory=list)
    calls: int = 0
    lost: int = 0

    @property
    def median(self) -> float:
        return statistics.median(self.added_ns)


class Hits:
    """The measurements."""

    def __init__(self, rig: Rig, measure_s: float) -> None:
        self.figures: dict[Cell, Figure] = {}
        self.broken: dict[str, str] = {}
        """What went wrong with a tool, by its name: it is left out from then on."""
        self._rig = rig
        self._measure_ns = measure_s * 1e9

    async def round(self, way: Way) -> None:
        """Arms one way once, and measures all its cells."""
        threads = THREADS if way.threads else THREADS[:1]
        cells = [Cell(way.tool, way.kind, n, pinned) for pinned in (True, False) for n in threads]
        try:
            before = [await self._unprobed(cell) for cell in cells]
            async with way.arm(self._rig) as session:
                probed = [await self._probed(cell, session) for cell in cells]
            after = [await self._unprobed(cell) for cell in cells]
        except (RuntimeError, TimeoutError, AssertionError) as e:
            if not self._rig.child.alive():
                raise
            self.broken[way.tool] = f"{way.tool}: {e}"
            return
        finally:
            self._rig.place(False)
        for i, cell in enumerate(cells):
            self.figures[cell].added_ns.append(probed[i] - (before[i] + after[i]) / 2)
            self.figures[cell].lost += session.calls - session.hits

    async def _unprobed(self, cell: Cell) -> float:
        self._rig.place(cell.pinned)
        calls, ns = await self._rig.call(KINDS[cell.kind][0], cell.threads, _UNPROBED)
        return ns / calls

    async def _probed(self, cell: Cell, session: Session) -> float:
        self._rig.place(cell.pinned, *session.tools)
        figure = self.figures.setdefault(cell, Figure())
        if not figure.calls:
            calls, ns = await self._rig.call(KINDS[cell.kind][0], cell.threads, _FIRST)
            session.calls += calls
            figure.calls = max(_FIRST, min(_MOST, int(calls * self._measure_ns / ns)))
        pids = (self._rig.pid, *session.tools, *session.runs)
        before = cpu_ns(*pids)
        calls, ns = await self._rig.call(KINDS[cell.kind][0], cell.threads, figure.calls)
        figure.cpu_ns.append((cpu_ns(*pids) - before) / calls)
        session.calls += calls
        return ns / calls


async def measure(rounds: int, cpu: int, measure_s: float, peers: bool, console: Console) -> tuple[Hits, list[str]]:
    """Returns the figures, and what was left out and why."""
    with rig(cpu) as target:
        async with trapline(target.directory) as tracer:
            ways, skipped = all_ways(target, tracer, peers)
            hits = Hits(target, measure_s)
            with Progress(console=console, transient=True) as progress:
                task = progress.add_task("hits", total=rounds * len(ways))
                for _ in range(rounds):
                    for way in ways:
                        progress.update(task, description=f"hits: {way.tool}, {way.kind}")
                        if way.tool not in hits.broken:
                            await hits.round(way)
                        progress.advance(task)
        assert target.child.count()["wrong"] == 0, "a probed call returned something wrong"
    return hits, [*skipped, *hits.broken.values()]


def to_json(hits: Hits) -> list[dict[str, Any]]:
    return [
        {
            "tool": cell.tool,
            "kind": cell.kind,
            "threads": cell.threads,
            "placement": cell.placement,
            "added_ns": figure.median,
            "rounds_ns": figure.added_ns,
            "cpu_ns": min(figure.cpu_ns),
            "hits_per_round": figure.calls,
            "lost": figure.lost,
        }
        for cell, figure in hits.figures.items()
        if figure.added_ns
    ]


def show(hits: Hits, console: Console) -> None:
    """Prints one table of the kinds, and one of the threads."""
    done = {cell: figure for cell, figure in hits.figures.items() if figure.added_ns}
    table = Table(title="us added per hit, one thread (lowest - highest round)")
    for heading in ("kind", "tool", "pinned", "", "against C", "free", "", "against C", "CPU", "against C"):
        table.add_column(heading, justify="left" if heading in ("kind", "tool") else "right", no_wrap=True)
    for kind in KINDS:
        for tool in _tools(c for c in done if c.kind == kind):
            pinned, free = (Cell(tool, kind, 1, pinned) for pinned in (True, False))
            table.add_row(kind, tool, *_cell(done, pinned), *_cell(done, free), *_cpu(done, pinned))
        table.add_section()
    console.print(table)
    table = Table(title="us added per hit (boosted) by threads of the target: wall time / hits of all")
    table.add_column("tool", no_wrap=True)
    for placement in ("pinned", "free"):
        for threads in THREADS:
            table.add_column(f"{placement} {threads}", justify="right")
    for tool in _tools(c for c in done if c.threads > 1):
        cells = [Cell(tool, "boosted", n, pinned) for pinned in (True, False) for n in THREADS]
        table.add_row(tool, *(_us(done[c]) if c in done else "" for c in cells))
    console.print(table)


def _tools(cells: Iterable[Cell]) -> list[str]:
    return list(dict.fromkeys(c.tool for c in cells))


def _us(figure: Figure) -> str:
    return f"{figure.median / 1e3:.2f}" + (f" lost {figure.lost}" if figure.lost else "")


def _cell(done: dict[Cell, Figure], cell: Cell) -> tuple[str, str, str]:
    figure, floor = done.get(cell), _floor(done, cell)
    if figure is None:
        return "", "", ""
    spread = f"{min(figure.added_ns) / 1e3:.1f} - {max(figure.added_ns) / 1e3:.1f}"
    return _us(figure), spread, f"{figure.median / floor.median:.2f} x" if floor else ""


def _cpu(done: dict[Cell, Figure], cell: Cell) -> tuple[str, str]:
    figure, floor = done.get(cell), _floor(done, cell)
    if figure is None:
        return "", ""
    least = min(figure.cpu_ns)
    return f"{least / 1e3:.2f}", f"{least / min(floor.cpu_ns):.2f} x" if floor else ""


def _floor(done: dict[Cell, Figure], cell: Cell) -> Figure | None:
    kind = "boosted" if cell.kind == "registers" else cell.kind  # the tracer in C takes them always
    return done.get(Cell("tracer in C", kind, cell.threads, cell.pinned))
