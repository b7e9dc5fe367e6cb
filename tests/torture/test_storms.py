"""Probes come and go by the thousand while programs run, fork, exec and open libraries as fast as they can."""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.engines.host import Host, altered_bytes, mapped_files
from tests.support import needs
from tests.support.children import Child
from tests.support.targets import Targets
from tests.torture.scale import Torture, size
from tests.torture.test_mappings import remapping
from trapline_agent.kernel import procfs
from trapline_agent.plans import SitePlan
from trapline_agent.targets.maps import executable_mappings

pytestmark = [needs.gcc, needs.binutils, needs.ptrace_any, needs.x86_64]

Count = Callable[[], int]


def counters(child: Child, program: Path, *names: str) -> dict[str, Count]:
    """Returns readers of a target's own counters in its memory: asking it would take it from what it is busy with."""
    symbols = {
        line.split()[2]: int(line.split()[0], 16)
        for line in subprocess.check_output(["nm", program], text=True).splitlines()
        if len(line.split()) == 3
    }
    text = next(m for m in executable_mappings(child.pid) if m.path == str(program))
    base = text.start - text.offset  # where a position-independent program's segments keep their distance
    memory = os.open(f"/proc/{child.pid}/mem", os.O_RDONLY)

    def reader(address: int) -> Count:
        return lambda: int(struct.unpack("=Q", os.pread(memory, 8, address))[0])

    return {name: reader(base + symbols[name]) for name in names}


@contextlib.contextmanager
def shared_counters(child: Child) -> Iterator[tuple[Count, Count, Count]]:
    """Yields readers of the counters that a target shares with its images and children: begun, done, the third."""
    numbers = os.listdir(f"/proc/{child.pid}/fd")
    (fd,) = (n for n in numbers if "memfd:counters" in os.readlink(f"/proc/{child.pid}/fd/{n}"))
    with open(f"/proc/{child.pid}/fd/{fd}", "rb") as file, mmap.mmap(file.fileno(), 4096, prot=mmap.PROT_READ) as page:

        def reader(index: int) -> Count:
            return lambda: int(struct.unpack_from("=Q", page, 8 * index)[0])

        yield reader(0), reader(1), reader(2)


def bounded_cycle(host: Host, plan: SitePlan, name: str, begun: Count, done: Count, **where: object) -> tuple[int, int]:
    """One probe, set and taken out; asserts that its count is exact as far as an edge is sharp while threads run
    (docs: Exactness). Returns (hits, the calls that it had to see)."""
    earlier = done()
    probe = host.register(plan, probe=name, **where)
    first = begun()
    last = done()
    probe.unregister()
    later = begun()
    assert last - first <= probe.hits <= later - earlier, name
    return probe.hits, last - first


def signal_states(pid: int) -> dict[int, tuple[int, int, int]]:
    """Returns what each thread blocks, ignores and catches."""
    return {tid: procfs.signal_sets(tid) for tid in procfs.tasks(pid)}


def as_it_was(host: Host, child: Child) -> None:
    """Asserts that nothing is left in a process: no byte, no tracer (S3)."""
    host.engine.close()
    assert altered_bytes(child.pid, mapped_files(child.pid)) == {}
    assert {procfs.tracer(tid) for tid in procfs.tasks(child.pid)} == {0}


@pytest.mark.parametrize("followed", [True, False])
def test_r7_probes_come_and_go_on_64_busy_threads(
    host: Host, targets: Targets, torture: Torture, followed: bool
) -> None:
    """In a process that another probe keeps followed, and in one that is seized and let go each time.

    The target is nice: else each wake-up of ours waits for 64 threads, which says nothing but how the kernel schedules.
    """
    program = targets.build("hot")
    plan = host.files.plan(program, "target_hot")
    with Child(["nice", "-n", "19", program, "64"]) as child:
        states = signal_states(child.pid)
        read = counters(child, program, "begun", "done")
        child.ask("start")
        if followed:
            host.register(host.files.plan(program, "target_six"), probe="other", pid=child.pid)
        hits = 0
        for cycle in torture.cycles(100, 10_000) if followed else torture.cycles(6, 1000):
            hits += bounded_cycle(host, plan, f"p{cycle}", read["begun"], read["done"], pid=child.pid)[0]
        while not hits:  # on a busy machine a nice target may not have run yet
            hits += bounded_cycle(host, plan, "more", read["begun"], read["done"], pid=child.pid)[0]
        child.ask("stop", timeout=120)
        if followed:
            host.unregister("other")
        count = child.count()
        assert (count["threads"], count["wrong"], count["begun"] - count["done"]) == (64, 0, 0)
        torture.note(f"hits={hits}")
        as_it_was(host, child)
        assert signal_states(child.pid) == states
        probe = host.register(plan, probe="last", pid=child.pid)
        child.ask("call 100")
        assert probe.hits == 100


def test_probes_come_and_go_while_children_of_every_kind_do(host: Host, targets: Targets, torture: Torture) -> None:
    program = targets.build("forks")
    plan = host.files.plan(program, "target_forks")
    with targets.run("forks") as child, shared_counters(child) as (begun, done, children):
        for where in ({}, {"pid": child.pid}, {"tree": child.pid}):
            child.ask("storm")
            wanted = children() + size(300, 2000)
            cycle = 0
            while children() < wanted:
                for cycle in torture.cycles(5, 5):
                    name = f"p{cycle}"
                    if "pid" in where:  # children are outside of it, and to be clean
                        host.register(plan, probe=name, **where).unregister()
                    else:
                        bounded_cycle(host, plan, name, begun, done, **where)
            child.ask("calm")
            assert child.count()["failed"] == 0, "a child died"
        torture.note(f"children={children()}")
        probe = host.register(plan, probe="last")
        for kind in ("fork", "vfork", "spawn", "clone", "thread", "call"):
            child.ask(f"{kind} 20")
        assert probe.hits == 120
        probe.unregister()
        as_it_was(host, child)


def test_r7_probes_come_and_go_while_two_processes_share_their_memory(
    host: Host, targets: Targets, torture: Torture
) -> None:
    """The one calls (CLONE_VM), the other waits for it: no slot may go while either can be inside."""
    program = targets.build("forks")
    plan = host.files.plan(program, "target_forks")
    with targets.run("forks") as child, shared_counters(child) as (begun, done, _):
        calls = size(20_000_000, 200_000_000)
        child.send(f"clone {calls}")
        cycle = 0
        while done() < calls:
            for cycle in torture.cycles(1, 1):
                bounded_cycle(host, plan, f"p{cycle}", begun, done)
                host.engine.close()
        child.wait_for("ended")
        count = child.count()
        assert (count["failed"], count["done"]) == (0, calls)
        as_it_was(host, child)


@pytest.mark.parametrize("storm", ["storm", "storm-thread"])
def test_probes_come_and_go_while_a_program_execs(host: Host, targets: Targets, torture: Torture, storm: str) -> None:
    program = targets.build("execs")
    plan = host.files.plan(program, "target_execs")
    with targets.run("execs") as child, shared_counters(child) as (begun, done, images):
        execs = size(200, 1000)
        hits = seen = 0
        child.send(f"{storm} {execs}")
        while images() <= execs:
            for cycle in torture.cycles(1, 1):
                got, must = bounded_cycle(host, plan, f"p{cycle}", begun, done, pid=child.pid)
                hits, seen = hits + got, seen + must
        child.wait_for("ready")
        # One that stays from the first image to the last misses none.
        probe = host.register(plan, probe="all", pid=child.pid)
        child.send(f"{storm} {execs}")
        child.wait_for("ready", timeout=120)
        count = child.count()
        assert count["wrong"] == 0
        assert (probe.hits, count["done"]) == (5 * execs, 10 * execs)
        assert not any(t.may_have_missed for t in probe.targets)
        torture.note(f"execs={count['images'] - 1} hits={hits}")
        probe.unregister()
        as_it_was(host, child)


def test_a_program_that_execs_from_its_threads_is_there_all_the_time(targets: Targets) -> None:
    """The leader ends first, and then another thread has its number: /proc is asked about one after the other."""
    with targets.run("execs") as child, shared_counters(child) as (_, _, images):
        execs = size(200, 1000)
        child.send(f"storm-thread {execs}")
        ended = 0
        while images() <= execs:
            try:
                assert procfs.live_task(child.pid)
            except ProcessLookupError:
                ended += 1
        assert ended == 0


def test_probes_come_and_go_while_a_library_does(host: Host, targets: Targets, torture: Torture) -> None:
    library = targets.library()
    plan = host.files.plan(library, "dlfn")
    with targets.run("dl", library) as child:
        read = counters(child, targets.build("dl"), "begun", "done", "opens")
        child.ask("storm")
        wanted = size(300, 1000)
        hits = 0
        for cycle in torture.cycles(30, 500):
            hits += bounded_cycle(host, plan, f"p{cycle}", read["begun"], read["done"], pid=child.pid)[0]
        probe = host.register(plan, probe="all", pid=child.pid)
        before, opened = read["begun"](), read["opens"]()
        while read["opens"]() < opened + wanted:
            pass
        child.ask("calm")
        count = child.count()
        assert probe.hits >= count["done"] - before >= 3 * (wanted - 1)
        assert count["wrong"] == 0
        assert not any(t.may_have_missed for t in probe.targets)
        torture.note(f"opens={count['opens']} hits={hits + probe.hits}")
        probe.unregister()
        as_it_was(host, child)


def test_r18_probes_come_and_go_while_their_place_is_used_for_other_things(
    host: Host, targets: Targets, torture: Torture
) -> None:
    """A byte may get into an address that means something else by then: look and write are two calls. It is taken back."""
    with remapping(host, targets) as (child, plan):
        child.ask("storm")
        for cycle in torture.cycles(100, 5000):
            probe = host.register(plan, probe=f"p{cycle}", pid=child.pid)
            host.reconcile(child.pid)
            probe.unregister()
        child.ask("calm")
        count = child.count()
        assert (count["wrong"], count["stray"]) == (0, 0)
        torture.note(f"maps={count['maps']} strays that were undone={count['passing']}")
        as_it_was(host, child)
