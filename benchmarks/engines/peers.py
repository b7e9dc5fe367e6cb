"""Ways to count, and to capture, at the benchmarks' target: Trapline's, and those of other tools that are installed here.

Other tools come from Debian (gdb, bpftrace) and PyPI (python-ptrace) and are no dependency: one that is not there is skipped
by name. Each is given its best case: no output during the hits, and while the target is pinned the same CPU, where waking it
is cheapest.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass

from benchmarks.engines.rig import PROBED, ROOT, TEXT, Rig, Trapline, build, untraced
from tests.support import uprobe
from tests.support.children import Child
from trapline_agent.plans import AggregatePlan, FetchPlan

KINDS = {
    "emulated": ("emulated", "target_emulated"),
    "boosted": ("boosted", PROBED),
    "registers": ("boosted", PROBED),
    "string": ("boosted", PROBED),
    "entry + return": ("returning", PROBED),
    "count()": ("boosted", PROBED),
    "hist(arg0)": ("boosted", PROBED),
    "quantiles(arg0)": ("boosted", PROBED),
    "distinct(arg0)": ("boosted", PROBED),
    "count() by (str)": ("boosted", PROBED),
}
"""What is measured -> (the target's KIND of call, the probed function)."""


@dataclass
class Session:
    """One arming of one tool."""

    tools: tuple[int, ...] = ()
    """Processes that serve hits, and are placed with the target."""
    runs: tuple[int, ...] = ()
    """Others whose CPU time is of its hits."""
    calls: int = 0
    """Made meanwhile, for the tool to have seen."""
    hits: int = 0
    """That it saw; known when the session is over."""


Arm = Callable[[Rig], AbstractAsyncContextManager[Session]]


@dataclass(frozen=True)
class Way:
    """One tool at one kind of hit."""

    tool: str
    kind: str
    arm: Arm
    threads: bool = False
    """Measured with several threads too."""


class Unavailable(Exception):
    """A tool is not here, or cannot do that; says why."""


# --- Trapline --------------------------------------------------------------------------------------------------------

REGISTERS = [FetchPlan(name=f"arg{i}", register=r) for i, r in enumerate(("rdi", "rsi", "rdx", "rcx", "r8", "r9"))]
LATENCY = [FetchPlan(name="latency", register="latency")]
STRING = [FetchPlan(name="s", register="rsi", string=True, max_bytes=64)]
AGGREGATES = {
    "count()": (AggregatePlan("count"), []),
    "hist(arg0)": (AggregatePlan("hist"), REGISTERS[:1]),
    "quantiles(arg0)": (AggregatePlan("quantiles"), REGISTERS[:1]),
    "distinct(arg0)": (AggregatePlan("distinct"), REGISTERS[:1]),
    "count() by (str)": (AggregatePlan("count", by=1), STRING),
}


def trapline_ways(tracer: Trapline) -> list[Way]:
    number = 0

    def way(kind: str, fetches: list[FetchPlan], *, threads: bool = False) -> Way:
        @asynccontextmanager
        async def arm(rig: Rig) -> AsyncIterator[Session]:
            nonlocal number
            number += 1
            probe = f"hit-{number}"
            plans = [rig.plan(KINDS[kind][1])]
            aggregate = AGGREGATES[kind][0] if kind in AGGREGATES else None
            await tracer.register(probe, plans, fetches, rig.pid, returns=kind == "entry + return", aggregate=aggregate)
            session = Session(runs=(tracer.process.pid,))
            yield session
            await tracer.client.unregister(probe)
            session.hits = await tracer.hits(probe, session.calls)
            await untraced(rig.pid)

        return Way("trapline ptrace", kind, arm, threads)

    ways = [
        way("emulated", []),
        way("boosted", [], threads=True),
        way("registers", REGISTERS),
        way("string", STRING),
    ]
    if tracer.returns:
        ways.append(way("entry + return", LATENCY))
    return [*ways, *(way(kind, fetches) for kind, (_, fetches) in AGGREGATES.items())]


# --- a tracer in C ---------------------------------------------------------------------------------------------------


def c_ways(rig: Rig) -> list[Way]:
    program = build("tracer.c", rig.directory)

    def way(kind: str, *, threads: bool = False) -> Way:
        @asynccontextmanager
        async def arm(rig: Rig) -> AsyncIterator[Session]:
            offsets = [rig.plan(KINDS[kind][1]).offset]
            if kind == "entry + return":
                offsets.append(rig.return_offset())
            sites = [":".join(f"{a:x}" for a in rig.beyond(offset, i)) for i, offset in enumerate(offsets)]
            argv = [program, str(rig.pid), "string" if kind == "string" else "count", *sites]
            with Child(argv, ready="armed") as tracer:
                session = Session((tracer.pid,))
                yield session
                tracer.signal(signal.SIGTERM)
                session.hits = int((await asyncio.to_thread(tracer.wait_for, "served")).split()[1])
                await asyncio.to_thread(tracer.wait)

        return Way("tracer in C", kind, arm, threads)

    # It always takes the registers: without them it could not tell which breakpoint was hit.
    return [way("emulated"), way("boosted", threads=True), way("string"), way("entry + return")]


# --- gdb -------------------------------------------------------------------------------------------------------------

_GDB_PYTHON = """\
python
class Probe(gdb.Breakpoint):
    hits = 0
    def stop(self):
        self.hits += 1  # gdb counts those that stop
        {body}
        return False
probes = [{breakpoints}]
end
"""
_GDB_STRING = 'gdb.parse_and_eval("(char *) $rsi").string()'


def gdb_ways() -> list[Way]:
    if not shutil.which("gdb"):
        raise Unavailable("gdb is not installed")

    def way(tool: str, kind: str, *, commands: bool = False, threads: bool = False) -> Way:
        @asynccontextmanager
        async def arm(rig: Rig) -> AsyncIterator[Session]:
            addresses = [rig.addr(rig.plan(KINDS[kind][1]).offset)]
            if kind == "entry + return":
                addresses.append(rig.addr(rig.return_offset()))
            script = ["set confirm off", "set pagination off", "set print thread-events off"]
            if commands:
                script += [f"break *{addresses[0]:#x}", "commands 1", "silent", "continue", "end"]
                count = "python print('hits', gdb.breakpoints()[0].hit_count)"
            else:
                made = ", ".join(f'Probe("*{a:#x}")' for a in addresses)
                body = _GDB_STRING if kind == "string" else "pass"
                script.append(_GDB_PYTHON.format(body=body, breakpoints=made))
                count = "python print('hits', probes[0].hits)"
            script += ["echo armed\\n", "continue", count, "delete", "detach", "echo served\\n"]
            with tempfile.NamedTemporaryFile("w", suffix=".gdb") as file:
                file.write("\n".join(script) + "\n")
                file.flush()
                argv = ["gdb", "--nx", "--batch", "-p", str(rig.pid), "-x", file.name]
                with Child(argv, ready="armed", stderr=-3, session=True) as gdb:
                    await rig.armed(KINDS[kind][1], gdb)
                    session = Session((gdb.pid,))
                    yield session
                    gdb.signal(signal.SIGINT)
                    session.hits = int((await asyncio.to_thread(gdb.wait_for, "hits ")).split()[1])
                    await asyncio.to_thread(gdb.wait_for, "served")
                    await asyncio.to_thread(gdb.wait)

        return Way(tool, kind, arm, threads)

    return [
        way("gdb, commands", "boosted", commands=True),
        way("gdb, Python stop()", "emulated"),
        way("gdb, Python stop()", "boosted", threads=True),
        way("gdb, Python stop()", "string"),
        way("gdb, Python stop()", "entry + return"),
    ]


# --- python-ptrace ---------------------------------------------------------------------------------------------------


def python_ptrace_ways() -> list[Way]:
    @asynccontextmanager
    async def arm(rig: Rig) -> AsyncIterator[Session]:
        addr = rig.addr(rig.plan(PROBED).offset)
        argv = [sys.executable, "-m", "benchmarks.engines.python_ptrace_peer", str(rig.pid), hex(addr)]
        with Child(argv, ready="armed", cwd=ROOT) as peer:
            session = Session((peer.pid,))
            yield session
            peer.signal(signal.SIGTERM)
            session.hits = int((await asyncio.to_thread(peer.wait_for, "served")).split()[1])
            await asyncio.to_thread(peer.wait)

    return [Way("python-ptrace debugger", "boosted", arm)]


# --- the kernel's uprobes --------------------------------------------------------------------------------------------

_BPFTRACE = {
    "emulated": "uprobe:{path}:{symbol} {{ @ = count(); }}",
    "boosted": "uprobe:{path}:{symbol} {{ @ = count(); }}",
    "string": "uprobe:{path}:{symbol} {{ @ = count(); @s[str(arg1)] = count(); }}",
    "entry + return": "uprobe:{path}:{symbol} {{ @ = count(); @t[tid] = nsecs; }} "
    "uretprobe:{path}:{symbol} /@t[tid]/ {{ @ns = hist(nsecs - @t[tid]); delete(@t[tid]); }}",
}


def bpftrace_ways() -> list[Way]:
    if not shutil.which("bpftrace"):
        raise Unavailable("bpftrace is not installed")
    if os.geteuid():
        raise Unavailable("bpftrace needs root")

    def way(kind: str, *, threads: bool = False) -> Way:
        @asynccontextmanager
        async def arm(rig: Rig) -> AsyncIterator[Session]:
            symbol = KINDS[kind][1]
            program = _BPFTRACE[kind].format(path=rig.path, symbol=symbol)
            with Child(["bpftrace", "-e", program], ready=None) as tool:
                await rig.armed(symbol, tool)
                session = Session()
                yield session
                tool.signal(signal.SIGINT)
                session.hits = int((await asyncio.to_thread(tool.wait_for, "@: ")).removeprefix("@: "))
                await asyncio.to_thread(tool.wait)

        return Way("bpftrace", kind, arm, threads)

    return [way("emulated"), way("boosted", threads=True), way("string"), way("entry + return")]


def perf_ways() -> list[Way]:
    if not uprobe.PMU.exists():
        raise Unavailable("the kernel has no uprobe events for perf")
    if os.geteuid():
        raise Unavailable("perf uprobe events need root")

    def way(kind: str) -> Way:
        @asynccontextmanager
        async def arm(rig: Rig) -> AsyncIterator[Session]:
            with uprobe.kernel_count(rig.path, rig.plan(KINDS[kind][1]).offset) as count:
                session = Session()
                yield session
                session.hits = count()

        return Way("perf uprobe event", kind, arm)

    return [way("emulated"), way("boosted")]


def all_ways(rig: Rig, tracer: Trapline, peers: bool) -> tuple[list[Way], list[str]]:
    """Returns the ways that can be measured here, and for each that cannot, why."""
    assert len(TEXT) < 64
    ways, skipped = trapline_ways(tracer), []
    if not tracer.returns:
        skipped.append("trapline ptrace, entry + return: not supported by this release")
    others: tuple[Callable[[], list[Way]], ...] = (gdb_ways, python_ptrace_ways, bpftrace_ways, perf_ways)
    ways += c_ways(rig)
    for make in others if peers else ():
        try:
            ways += make()
        except Unavailable as e:
            skipped.append(str(e))
    return ways, skipped
