"""Mappings in processes that nobody follows yet: who catches them, and what is said where calls may have been missed.

The programs are started by a shell that knows nothing of the tracer, and count their calls themselves.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import struct
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.engines.host import Files
from tests.engines.test_tracer import connected, path, tracer
from tests.support import needs
from tests.support.children import TIMEOUT_S, Child, run
from tests.support.targets import Targets
from trapline_agent.plans import SitePlan
from trapline_agent.tracer import messages as m
from trapline_agent.tracer.client import TracerClient

pytestmark = [needs.gcc, needs.ptrace_any, needs.x86_64]
__all__ = ["path"]

LOADER = Path("/lib64/ld-linux-x86-64.so.2").resolve()


class Calls:
    """What the runs of ``once`` counted."""

    def __init__(self, directory: Path) -> None:
        self.file = directory / "counters"
        self.file.write_bytes(bytes(4096))

    def read(self) -> dict[str, int]:
        return dict(zip(("begun", "done", "runs", "wrong"), struct.unpack_from("=4Q", self.file.read_bytes()), strict=True))


class Watched:
    """A tracer with one probe, and what it says of it."""

    def __init__(self, client: TracerClient) -> None:
        self.client = client
        self.targets: list[m.TargetState] = []
        self.hits = 0

    async def read(self) -> None:
        async for event in self.client.events():
            if isinstance(event, m.Targets):
                self.targets += event.targets
            elif isinstance(event, m.Stats):
                self.hits = event.hits


@contextlib.asynccontextmanager
async def watched(path: Path, plan: SitePlan, **where: str) -> AsyncIterator[tuple[Watched, Child]]:
    with tracer(path) as process:
        async with connected(path, process) as client:
            watched = Watched(client)
            reading = asyncio.create_task(watched.read())
            client.set_loaders([Files().plan(LOADER, "_dl_debug_state")])
            await client.register("p", generation=1, sites=["s"], plans=[plan], where=where)
            try:
                yield watched, process
                if process.alive():
                    await client.unregister("p")
            finally:
                # What came before the reply to the last request is queued by now.
                for _ in range(100):
                    await asyncio.sleep(0)
                reading.cancel()


async def shell(script: str, *args: str | Path) -> None:
    result = await asyncio.to_thread(run, ["/bin/sh", "-c", script, "sh", *args], timeout=240)
    assert result.returncode == 0, result.stderr


LOOP = 'n=$1; shift; while [ $n -gt 0 ]; do "$@" || exit 1; n=$((n-1)); done'


@needs.fanotify
async def test_not_a_call_is_missed_of_a_thousand_programs_that_are_started(
    path: Path, targets: Targets, tmp_path: Path
) -> None:
    program, calls = targets.build("once"), Calls(tmp_path)
    async with watched(path, Files().plan(program, "target_once")) as (seen, _):
        await shell(LOOP, "1000", program, calls.file, "5")
    assert calls.read() == {"begun": 5000, "done": 5000, "runs": 1000, "wrong": 0}
    assert seen.hits == 5000, [t for t in seen.targets if t.hook != "fanotify"] + [len({t.pid for t in seen.targets})]
    assert {(t.cause, t.hook, t.may_have_missed) for t in seen.targets} == {("exec", "fanotify", False)}


@needs.fanotify
async def test_not_a_call_is_missed_of_a_thousand_libraries_that_are_opened(
    path: Path, targets: Targets, tmp_path: Path
) -> None:
    program, library, calls = targets.build("once"), targets.library(), Calls(tmp_path)
    async with watched(path, Files().plan(library, "dlfn")) as (seen, _):
        await shell(LOOP, "1000", program, calls.file, "5", library)
    assert calls.read() == {"begun": 5000, "done": 5000, "runs": 1000, "wrong": 0}
    assert seen.hits == 5000
    assert {(t.cause, t.hook, t.may_have_missed) for t in seen.targets} == {("mmap", "fanotify", False)}
