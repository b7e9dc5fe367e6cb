"""Cost of a hit of the ptrace engine: nanoseconds that one hit adds to the traced program's own time.

The target is `tests/targets/hot.c`: one thread, pinned, calls a C function of two arguments in a loop and takes the
time itself. Every measurement lies between two of the unprobed function (A-B-A), all ways take turns in one run, and
the median over the rounds counts. Hits are held against the target's own count: a way that lost any has no figure.

Other tools are given their best case: they run on the target's CPU, where a wake-up is cheapest.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import shutil
import signal
import statistics
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from tests.support.children import Child, fields
from tests.support.targets import Targets
from trapline.protocol import hits
from trapline_agent.plans import FetchPlan, SitePlan
from trapline_agent.symbols.elf import ElfFile
from trapline_agent.targets.maps import Mapping, executable_mappings
from trapline_agent.tracer import messages as m
from trapline_agent.tracer.client import TracerClient, spawn_tracer
from trapline_agent.tracer.messages import Budgets

ROOT = Path(__file__).resolve().parents[2]
SYMBOL = "target_hot"
TEXT = "a string of some forty bytes, as paths are"


@dataclass(frozen=True)
class Site:
    """The probed function in the running target."""

    pid: int
    path: Path
    addr: int
    plan: SitePlan


def find_site(pid: int, path: Path) -> Site:
    """Returns where ``SYMBOL`` of a program is, in its file and in a process."""
    with path.open("rb") as file:
        elf = ElfFile(file.fileno(), str(path))
        table = elf.symbols()
        assert table is not None
        offset = int(table.offsets[table.names.index(SYMBOL)])
        segment = elf.segment_at(offset)
        assert segment is not None
        code = elf.read_code(offset, min(15, segment.end - offset))
    mapping: Mapping = next(x for x in executable_mappings(pid) if x.path == str(path) and x.addr(offset) is not None)
    plan = SitePlan(
        site=0,
        file=mapping.file,
        path=str(path),
        offset=offset,
        code=code,
        slack_offset=segment.slack_offset,
        slack_len=segment.slack_len,
    )
    addr = mapping.addr(offset)
    assert addr is not None
    return Site(pid, path, addr, plan)


# --- ways to count: each arms for the body and yields a function that says how many hits it saw ----------------------


@dataclass
class Way:
    name: str
    arm: Callable[[int], AbstractAsyncContextManager[dict[str, int]]]
    """Takes the number of calls that will come; on leaving, ``hits`` in the yielded dict is what was seen."""
    calls: int
    added_ns: list[float] = field(default_factory=list)
    lost: int = 0


class Trapline:
    """A tracer of our own, and probes with different captures."""

    def __init__(self, client: TracerClient, site: Site) -> None:
        self._client = client
        self._site = site
        self._rows = 0
        self._dropped = 0
        self._stats: m.Stats | None = None
        self._changed = asyncio.Condition()
        self._reader = asyncio.create_task(self._read())
        self._number = 0

    async def _read(self) -> None:
        async for event in self._client.events():
            async with self._changed:
                if isinstance(event, bytes):
                    header, _ = hits.peek(event)
                    self._rows += header.count
                    self._dropped += sum(header.drops.values())
                elif isinstance(event, m.Stats):
                    self._stats = event
                self._changed.notify_all()

    def way(self, fetches: list[FetchPlan]) -> Callable[[int], AbstractAsyncContextManager[dict[str, int]]]:
        @asynccontextmanager
        async def arm(calls: int) -> AsyncIterator[dict[str, int]]:
            self._number += 1
            self._rows = self._dropped = 0
            probe = f"bench-{self._number}"
            seen: dict[str, int] = {}
            await self._client.register(
                probe,
                generation=1,
                sites=[f"hot:{SYMBOL}"],
                plans=[self._site.plan],
                fetches=fetches,
                where={"pid": str(self._site.pid)},
            )
            yield seen
            await self._client.unregister(probe)
            async with asyncio.timeout(30), self._changed:
                await self._changed.wait_for(lambda: self._rows + self._dropped >= calls)
            seen["hits"] = self._rows
            seen["dropped"] = self._dropped

        return arm

    async def close(self) -> None:
        self._reader.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)


def pin(pid: int, cpu: int) -> None:
    """Pins all threads of a process."""
    for task in os.listdir(f"/proc/{pid}/task"):
        os.sched_setaffinity(int(task), {cpu})


def gdb_way(
    site: Site, cpu: int, commands: list[str], *, ignored: bool
) -> Callable[[int], AbstractAsyncContextManager[dict[str, int]]]:
    """gdb, in batch mode; its own count is what `info breakpoints` says."""

    @asynccontextmanager
    async def arm(calls: int) -> AsyncIterator[dict[str, int]]:
        script = ["set confirm off", "set pagination off", f"break *{site.addr:#x}"]
        if ignored:
            script.append("ignore 1 1000000000")
        else:
            script.append("commands 1\nsilent\n" + "".join(f"{c}\n" for c in commands) + "continue\nend")
        script += ["echo armed\\n", "continue", "info breakpoints", "delete", "detach", "echo served\\n"]
        with tempfile.NamedTemporaryFile("w", suffix=".gdb") as file:
            file.write("\n".join(script) + "\n")
            file.flush()
            argv = ["gdb", "--nx", "--batch", "-p", str(site.pid), "-x", file.name]
            with Child(argv, ready="armed", stderr=-3, session=True) as gdb:
                pin(gdb.pid, cpu)
                seen: dict[str, int] = {}
                yield seen
                gdb.signal(signal.SIGINT)
                line = await asyncio.to_thread(gdb.wait_for, "\tbreakpoint already hit")
                seen["hits"] = int(line.split("already hit ")[1].split()[0])
                await asyncio.to_thread(gdb.wait_for, "served")
                await asyncio.to_thread(gdb.wait)

    return arm


def python_ptrace_way(site: Site, cpu: int) -> Callable[[int], AbstractAsyncContextManager[dict[str, int]]]:
    @asynccontextmanager
    async def arm(calls: int) -> AsyncIterator[dict[str, int]]:
        argv = [
            sys.executable,
            "-m",
            "benchmarks.engines.python_ptrace_peer",
            str(site.pid),
            hex(site.addr),
            str(calls),
        ]
        with Child(argv, ready="armed", cwd=ROOT) as peer:
            pin(peer.pid, cpu)
            seen: dict[str, int] = {}
            yield seen
            line = await asyncio.to_thread(peer.wait_for, "served")
            seen["hits"] = int(line.split()[1])
            await asyncio.to_thread(peer.wait)

    return arm


# --- the run ---------------------------------------------------------------------------------------------------------


async def call(target: Child, calls: int) -> float:
    """Returns ns per call of the target's loop, by its own clock."""
    line = await asyncio.to_thread(target.ask, f"call {calls} {TEXT}", 300.0)
    return fields(line)["ns"] / calls


async def measure(way: Way, target: Child) -> None:
    before = await call(target, 200_000)
    async with way.arm(way.calls) as seen:
        probed = await call(target, way.calls)
    after = await call(target, 200_000)
    way.lost += way.calls - seen["hits"]
    way.added_ns.append(probed - (before + after) / 2)


async def run(rounds: int, cpu: int, calls: int, peers: bool, console: Console) -> list[Way]:
    with tempfile.TemporaryDirectory() as directory:
        # With a frame pointer the function begins with `push %rbp`, as most do.
        target_path = Targets(Path(directory)).build(
            "hot", "-O1", "-fno-omit-frame-pointer", "-mno-omit-leaf-frame-pointer"
        )
        socket = Path(directory) / "tracer.sock"
        with Child([target_path, "0"]) as target:
            pin(target.pid, cpu)
            site = find_site(target.pid, target_path)
            process = spawn_tracer(socket, log=Path(directory) / "tracer.log")
            try:
                client = await TracerClient.connect(
                    socket, host="hst_bench", process=process, budgets=Budgets(probe=0, process=0, host=0)
                )
                trapline = Trapline(client, site)
                registers = [
                    FetchPlan(name=f"arg{i}", register=r)
                    for i, r in enumerate(("rdi", "rsi", "rdx", "rcx", "r8", "r9"))
                ]
                string = [FetchPlan(name="s", register="rsi", string=True, max_bytes=64)]
                ways = [
                    Way("trapline ptrace: count", trapline.way([]), calls),
                    Way("trapline ptrace: registers", trapline.way(registers), calls),
                    Way("trapline ptrace: string, 42 B", trapline.way(string), calls),
                ]
                if peers:
                    ways.append(Way("python-ptrace debugger", python_ptrace_way(site, cpu), calls))
                if peers and shutil.which("gdb"):
                    few = max(calls // 5, 100)
                    ways += [
                        Way("gdb: ignore count", gdb_way(site, cpu, [], ignored=True), few),
                        Way("gdb: commands, silent", gdb_way(site, cpu, [], ignored=False), few),
                    ]
                with Progress(console=console, transient=True) as progress:
                    task = progress.add_task("measuring", total=rounds * len(ways))
                    for _ in range(rounds):
                        for way in ways:
                            progress.update(task, description=way.name)
                            await measure(way, target)
                            progress.advance(task)
                await client.shutdown()
                await trapline.close()
                assert target.count()["wrong"] == 0
            finally:
                process.terminate()
                await asyncio.to_thread(process.wait)
    return ways


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--calls", type=int, default=5000, help="hits per round; a fifth of it for gdb")
    parser.add_argument("--cpu", type=int, default=max(os.sched_getaffinity(0)), help="CPU of the target")
    parser.add_argument("--no-peers", action="store_true", help="Trapline alone")
    parser.add_argument("--json", action="store_true", help="figures as JSON, on standard output")
    args = parser.parse_args()
    console = Console(stderr=args.json)
    ways = asyncio.run(run(args.rounds, args.cpu, args.calls, not args.no_peers, console))
    medians = {w.name: statistics.median(w.added_ns) for w in ways}
    if args.json:
        figures = [
            {
                "way": w.name,
                "added_ns": medians[w.name],
                "rounds_ns": w.added_ns,
                "hits_per_round": w.calls,
                "lost": w.lost,
            }
            for w in ways
        ]
        print(
            json.dumps(
                {"python": platform.python_version(), "kernel": platform.release(), "figures": figures}, indent=2
            )
        )
        return
    table = Table(title=f"time added per hit, median of {args.rounds} rounds")
    for heading in ("way", "added us", "lowest", "highest", "lost", "ratio"):
        table.add_column(heading, justify="left" if heading == "way" else "right", no_wrap=True)
    for w in ways:
        table.add_row(
            w.name,
            f"{medians[w.name] / 1e3:.1f}",
            f"{min(w.added_ns) / 1e3:.1f}",
            f"{max(w.added_ns) / 1e3:.1f}",
            str(w.lost),
            f"{medians[w.name] / medians[ways[0].name]:.1f} x",
        )
    console.print(table)
    if any(w.lost for w in ways):
        sys.exit("hits were lost: the figures above are not comparable")


if __name__ == "__main__":
    main()
