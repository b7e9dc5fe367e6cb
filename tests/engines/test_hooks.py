"""Mappings in processes that nobody follows yet: who catches them, and what is said where calls may have been missed.

The programs are started by a shell that knows nothing of the tracer, and count their calls themselves.
"""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import select
import shutil
import signal
import struct
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.engines.host import Files, Host
from tests.engines.test_tracer import TRACER, connected, path, tracer
from tests.support import needs
from tests.support.children import TIMEOUT_S, Child, run
from tests.support.targets import Targets
from trapline_agent.engines.ptrace.engine import PtraceEngine
from trapline_agent.kernel import ptrace
from trapline_agent.plans import SitePlan
from trapline_agent.targets.files import file_key_of
from trapline_agent.targets.maps import executable_mappings
from trapline_agent.tracer import messages as m
from trapline_agent.tracer.answerer import DEADLINE_S
from trapline_agent.tracer.client import TracerClient
from trapline_agent.tracer.mappers import Held, MapperHook

pytestmark = [needs.gcc, needs.ptrace_any, needs.x86_64]
__all__ = ["path"]

LOADER = Path("/lib64/ld-linux-x86-64.so.2").resolve()


class Calls:
    """What the runs of ``once`` counted."""

    def __init__(self, directory: Path) -> None:
        self.file = directory / "counters"
        self.file.write_bytes(bytes(4096))

    def read(self) -> dict[str, int]:
        return dict(
            zip(("begun", "done", "runs", "wrong"), struct.unpack_from("=4Q", self.file.read_bytes()), strict=True)
        )


class Watched:
    """A tracer with one probe, and what it says of it."""

    def __init__(self, client: TracerClient) -> None:
        self.client = client
        self.targets: list[m.TargetState] = []
        self.log: dict[int, m.CoverageEntry] = {}
        self.hits = 0
        self.news = asyncio.Event()

    @property
    def late(self) -> int:
        return sum(e.may_have_missed for e in self.log.values())

    def account(self, calls: int, of_each: int, at_most: int = 10) -> None:
        """Asserts that every call was counted, but for those that the coverage log gives away: on a machine that is busy
        with other things a few mappers may meet the deadline."""
        late = [e for e in self.log.values() if e.may_have_missed]
        missing = calls - self.hits
        assert 0 <= missing <= of_each * len(late), (missing, late)
        assert len(late) <= at_most, late
        assert "fanotify" in {e.hook for e in self.log.values() if e not in late} <= {"fanotify", "fork-exec"}

    async def read(self) -> None:
        async for event in self.client.events():
            if isinstance(event, m.Targets):
                self.targets += event.targets
            elif isinstance(event, m.Covered):
                self.log |= {entry.number: entry for entry in event.entries}
            elif isinstance(event, m.Stats):
                self.hits = event.hits
            self.news.set()


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
async def test_p4_not_a_call_is_missed_of_a_thousand_programs_that_are_started(
    path: Path, targets: Targets, tmp_path: Path
) -> None:
    program, calls = targets.build("once"), Calls(tmp_path)
    async with watched(path, Files().plan(program, "target_once")) as (seen, _):
        await shell(LOOP, "1000", program, calls.file, "5")
    assert calls.read() == {"begun": 5000, "done": 5000, "runs": 1000, "wrong": 0}
    seen.account(5000, 5)


@needs.fanotify
async def test_p3_not_a_call_is_missed_of_a_thousand_libraries_that_are_opened(
    path: Path, targets: Targets, tmp_path: Path
) -> None:
    program, library, calls = targets.build("once"), targets.library(), Calls(tmp_path)
    async with watched(path, Files().plan(library, "dlfn")) as (seen, _):
        await shell(LOOP, "1000", program, calls.file, "5", library)
    assert calls.read() == {"begun": 5000, "done": 5000, "runs": 1000, "wrong": 0}
    seen.account(5000, 5)


@needs.fanotify
async def test_r19_p3_the_semaphores_of_libraries_that_are_opened_are_raised_before_their_code_runs(
    path: Path, targets: Targets, tmp_path: Path
) -> None:
    """The mapper is held as it maps the code; the data, with the semaphore, comes after. What is skipped is wrong."""
    program, calls = targets.build("once"), Calls(tmp_path)
    library = targets.build("usdt", "-DLIBRARY", "-shared", "-fPIC")
    (plan,) = Files().usdt(library)
    async with watched(path, plan) as (seen, _):
        await shell(LOOP, "100", program, calls.file, "5", library)
    found = calls.read()
    assert (found["done"], found["runs"]) == (500, 100)
    assert seen.hits == 500 - found["wrong"] >= 500 - 5 * seen.late
    assert seen.late <= 50  # on a busy machine; each is told
    assert "loader" in {e.hook for e in seen.log.values() if not e.may_have_missed}, "by its hook, when all is mapped"


@needs.fanotify
async def test_a_library_that_comes_and_goes_is_armed_each_time(path: Path, targets: Targets) -> None:
    library = targets.library()
    with targets.run("dl", library) as child:
        async with watched(path, Files().plan(library, "dlfn")) as (seen, _):
            await asyncio.to_thread(child.ask, "cycle 1000 3")
        assert child.count() == {"begun": 3000, "done": 3000, "opens": 1000, "wrong": 0}
        seen.account(3000, 3)


@needs.fanotify
async def test_a_crowd_that_opens_a_library_at_once(path: Path, targets: Targets, tmp_path: Path) -> None:
    """More wait than the tracer can serve within the deadline, but it gives signs of life."""
    program, library, calls = targets.build("once"), targets.library(), Calls(tmp_path)
    async with watched(path, Files().plan(library, "dlfn")) as (seen, _):
        await shell('n=100; while [ $n -gt 0 ]; do "$@" & n=$((n-1)); done; wait', program, calls.file, "5", library)
        async with asyncio.timeout(TIMEOUT_S):
            while seen.hits + 5 * seen.late < 500:  # the last entries of the log may be on their way
                seen.news.clear()
                await seen.news.wait()
    assert calls.read() == {"begun": 500, "done": 500, "runs": 100, "wrong": 0}
    seen.account(500, 5, at_most=25)


@needs.fanotify
async def test_threads_that_open_a_library_while_others_fork_and_block(
    path: Path, targets: Targets, tmp_path: Path
) -> None:
    """A mapper's process is followed with all its threads, some of which are in the middle of something."""
    program, library = targets.build("busy"), targets.library()
    async with watched(path, Files().plan(library, "dlfn")) as (seen, _):
        for _ in range(20):
            result = await asyncio.to_thread(run, [program, library])
            assert result.returncode == 0, result.stderr
            assert result.stdout == "interrupted 0 calls 40 wrong 0\n"
    seen.account(20 * 40, 2)


def answerer_of(process: Child) -> int:
    """Returns the pid of a tracer's answerer."""
    with open(f"/proc/{process.pid}/task/{process.pid}/children") as file:
        (pid,) = [int(p) for p in file.read().split() if b"answerer" in Path(f"/proc/{p}/cmdline").read_bytes()]
    return pid


def marks_of(answerer: int) -> int:
    """Returns how many inodes are marked."""
    info = "".join(p.read_text() for p in Path(f"/proc/{answerer}/fdinfo").iterdir())
    return info.count("fanotify ino:")


async def until(seen: Watched, state: str, pid: int) -> m.TargetState:
    """Waits for a target of a process to be in a state."""
    async with asyncio.timeout(TIMEOUT_S):
        while not (found := [t for t in seen.targets if t.pid == pid and t.state == state]):
            seen.news.clear()
            await seen.news.wait()
    return found[-1]


@needs.fanotify
async def test_p4_a_tracer_that_hangs_holds_nobody_up_and_says_what_may_be_missing(
    path: Path, targets: Targets
) -> None:
    library = targets.library()
    with targets.run("dl", library) as child:
        async with watched(path, Files().plan(library, "dlfn")) as (seen, process):
            process.signal(signal.SIGSTOP)
            began = time.monotonic()
            assert await asyncio.to_thread(child.ask, "open") == "opened"
            took = time.monotonic() - began
            child.ask("call 10")
            process.signal(signal.SIGCONT)
            target = await until(seen, "armed", child.pid)
            child.ask("call 5")
        assert DEADLINE_S <= took < DEADLINE_S + 2
        assert target.may_have_missed
        assert target.message
        assert seen.hits == 5


@needs.fanotify
@pytest.mark.parametrize("how", [signal.SIGSTOP, signal.SIGKILL])
async def test_an_answerer_that_fails_holds_nobody_up_and_is_replaced(
    path: Path, targets: Targets, tmp_path: Path, how: signal.Signals
) -> None:
    program, library, calls = targets.build("once"), targets.library(), Calls(tmp_path)
    async with watched(path, Files().plan(library, "dlfn")) as (seen, process):
        answerer = answerer_of(process)
        with targets.run("dl", library) as child:
            gone = os.pidfd_open(answerer)
            os.kill(answerer, how)
            began = time.monotonic()
            assert await asyncio.to_thread(child.ask, "open") == "opened"
            assert time.monotonic() - began < 4
            await asyncio.to_thread(select.select, [gone], [], [], TIMEOUT_S)
            os.close(gone)
            target = await until(seen, "armed", child.pid)
            assert target.hook != "fanotify"
            assert target.may_have_missed
        async with asyncio.timeout(TIMEOUT_S):
            while True:
                with contextlib.suppress(ValueError, FileNotFoundError):
                    if (another := answerer_of(process)) != answerer and marks_of(another) == 1:
                        break
                await asyncio.sleep(0)
        before = len(seen.targets)
        await shell(LOOP, "20", program, calls.file, "5", library)
    assert seen.hits == 100
    assert {(t.hook, t.may_have_missed) for t in seen.targets[before:] if t.pid != child.pid} == {("fanotify", False)}


@needs.fanotify
async def test_who_is_held_goes_on_when_the_tracer_is_killed(path: Path, targets: Targets) -> None:
    library = targets.library()
    with targets.run("dl", library) as child, tracer_to_be_killed(path) as process:
        async with connected(path, process) as client:
            await client.register("p", generation=1, sites=["s"], plans=[Files().plan(library, "dlfn")])
            gone = os.pidfd_open(answerer_of(process))
            process.signal(signal.SIGSTOP)
            child.send("open")
            process.signal(signal.SIGKILL)
            assert await asyncio.to_thread(select.select, [gone], [], [], TIMEOUT_S) == ([gone], [], [])
            os.close(gone)
            assert child.lines.next() == "opened"
            child.ask("call 3")
            assert child.count()["wrong"] == 0


@contextlib.contextmanager
def tracer_to_be_killed(path: Path) -> Iterator[Child]:
    child = Child([*TRACER, str(path)], ready=None)
    try:
        yield child
    finally:
        child.kill()


@needs.fanotify
async def test_traplines_own_processes_are_not_held(path: Path, targets: Targets) -> None:
    """With the tracer stopped, whoever is held waits for the deadline; the agent (this process) must not."""
    library = targets.library()
    async with watched(path, Files().plan(library, "dlfn")) as (_, process):
        process.signal(signal.SIGSTOP)
        try:
            with library.open("rb") as file:
                began = time.monotonic()
                with mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_EXEC):
                    took = time.monotonic() - began
        finally:
            process.signal(signal.SIGCONT)
    assert took < DEADLINE_S / 2


@needs.fanotify
async def test_who_only_reads_a_probed_file_is_not_held(path: Path, targets: Targets) -> None:
    library = targets.library()
    async with watched(path, Files().plan(library, "dlfn")) as (_, process):
        process.signal(signal.SIGSTOP)
        try:
            began = time.monotonic()
            result = await asyncio.to_thread(run, ["cmp", library, library])
            took = time.monotonic() - began
        finally:
            process.signal(signal.SIGCONT)
    assert result.returncode == 0, result.stderr
    assert took < DEADLINE_S


@needs.fanotify
async def test_marks_follow_the_probes(path: Path, targets: Targets) -> None:
    one, other = targets.copy(targets.library()), targets.copy(targets.library())
    async with watched(path, Files().plan(one, "dlfn")) as (seen, process):
        answerer = answerer_of(process)
        assert marks_of(answerer) == 1
        await seen.client.register("q", generation=1, sites=["s"], plans=[Files().plan(other, "dlfn")])
        await seen.client.register("r", generation=1, sites=["s"], plans=[Files().plan(other, "dlfn")])
        assert marks_of(answerer) == 2
        await seen.client.unregister("q")
        assert marks_of(answerer) == 2
        await seen.client.unregister("r")
        assert marks_of(answerer) == 1
        await seen.client.unregister("p")
        assert marks_of(answerer) == 0


@needs.perf
async def test_where_the_file_system_cannot_a_later_hook_stands_in_and_says_so(path: Path, targets: Targets) -> None:
    library = targets.library()
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        copy = Path(shutil.copy2(library, directory))
        with targets.run("dl", copy) as child:
            async with watched(path, Files().plan(copy, "dlfn")) as (seen, _):
                child.ask("open")
                target = await until(seen, "armed", child.pid)
                child.ask("call 5")
            assert (target.hook, target.may_have_missed) == ("perf-mmap", True)
            assert seen.hits == 5


@needs.root
async def test_without_perf_and_fanotify_other_hooks_stand_in_and_say_so(
    path: Path, targets: Targets, tmp_path: Path
) -> None:
    """A tracer without the capabilities that those need; the host's facts say which hooks work and why not."""
    program = targets.build("execs")
    command = ["setpriv", "--bounding-set=-sys_admin,-perfmon", "--inh-caps=-sys_admin,-perfmon", *TRACER, str(path)]
    child = Child(command, ready=None)
    try:
        async with connected(path, child) as client:
            hooks = {name: (works, why) for name, works, why in client.ready.hooks}
            assert not hooks["perf-mmap"][0]
            assert not hooks["fanotify"][0]
            assert "CAP_SYS_ADMIN" in hooks["fanotify"][1]
            assert hooks["proc-connector"] == (True, "")
            seen = Watched(client)
            reading = asyncio.create_task(seen.read())
            await client.register("p", generation=1, sites=["s"], plans=[Files().plan(program, "target_execs")])
            with Child([program]) as target:
                found = await until(seen, "armed", target.pid)
                await asyncio.to_thread(target.ask, "call 7")
            assert (found.cause, found.hook, found.may_have_missed) == ("exec", "proc-connector", True)
            await client.unregister("p")
            reading.cancel()
    finally:
        child.signal(signal.SIGTERM)
        child.wait()
        child.kill()


@needs.fanotify
def test_s5_processes_that_are_not_meant_are_neither_held_nor_touched(
    targets: Targets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, calls = targets.build("once"), Calls(tmp_path)
    meant, unrelated = targets.copy(targets.library()), targets.copy(targets.library())
    seized: list[int] = []
    held: list[Held] = []
    seize = ptrace.seize
    monkeypatch.setattr(ptrace, "seize", lambda tid, *options: (seized.append(tid), seize(tid, *options))[1])
    host = Host(PtraceEngine)

    def hold(mapper: Held) -> bool:
        held.append(mapper)
        return host.engine.await_mapper(mapper)  # type: ignore[attr-defined,no-any-return]

    hook = MapperHook(is_meant=host.table.is_meant, hold=hold, on_late=lambda mapper: None, on_lost=lambda: None)
    try:
        probe = host.register(host.files.plan(meant, "dlfn"), comm="another")
        hook.sync(host.table.descriptors(), host.table.loaders())
        for library in (unrelated, meant):
            for _ in range(10):
                assert run([program, calls.file, "5", library]).returncode == 0
        assert (held, seized) == ([], [])

        probe.unregister()
        probe = host.register(host.files.plan(meant, "dlfn"), comm="once")
        hook.sync(host.table.descriptors(), host.table.loaders())
        assert run([program, calls.file, "5", meant]).returncode == 0
        assert (len(held), len(seized), probe.hits) == (1, 1, 5)
    finally:
        hook.close()
        host.close()


@needs.fanotify
def test_an_interpreter_that_was_upgraded_is_never_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who is started next by Trapline maps the new one, and is not to wait for Trapline."""
    upgraded = tmp_path / "python3"
    shutil.copy(sys.executable, upgraded)
    monkeypatch.setattr(sys, "executable", str(upgraded))
    hook = MapperHook(is_meant=lambda pid, file: True, hold=lambda mapper: True, on_late=print, on_lost=lambda: None)
    with open(upgraded, "rb") as file:
        hook.sync({file_key_of(file.fileno(), str(upgraded)): file.fileno()}, {})
    assert list(hook.refused.values()) == ["Trapline itself is started from it"]
    hook.close()


@needs.fanotify
def test_files_that_nearly_everybody_maps_are_never_held(targets: Targets) -> None:
    hook = MapperHook(is_meant=lambda pid, file: True, hold=lambda mapper: True, on_late=print, on_lost=lambda: None)
    libc = next(Path(m.path) for m in executable_mappings(os.getpid()) if "libc" in m.path)
    with contextlib.ExitStack() as stack:
        wanted = {}
        for path in (libc, LOADER, Path(sys.executable).resolve()):
            fd = os.open(path, os.O_RDONLY)
            stack.callback(os.close, fd)
            wanted[file_key_of(fd, str(path))] = fd
        hook.sync(wanted, {})
        assert hook.refused.keys() == wanted.keys()
        assert all(hook.refused.values())
        assert hook.pid == 0
        hook.close()
