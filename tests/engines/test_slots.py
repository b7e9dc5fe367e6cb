"""Displaced instructions of files without room behind their code: slot pages, which the process maps itself (ADR 0012).

The contract suite runs over ``mapped-slots`` too, where no file has room. Here is what can only go wrong with pages.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engines.host import Host, Probe
from tests.support import needs
from tests.support.children import Child
from tests.support.targets import Targets
from trapline.errors import Unsupported
from trapline_agent.engines.ptrace import pages
from trapline_agent.engines.ptrace.engine import PtraceEngine
from trapline_agent.engines.ptrace.memory import AREA_BYTES, AREA_HEADER
from trapline_agent.targets import layout, maps

pytestmark = [needs.gcc, needs.ptrace_any, needs.x86_64]
ROOT = Path(__file__).resolve().parent.parent.parent
FILLER = AREA_HEADER.ljust(AREA_BYTES, b"\xf4")
KINDS = [(), ("-no-pie",), ("-static",), ("-static-pie",)]


def full(host: Host, targets: Targets, *flags: str) -> Path:
    """Returns the program, with something else than zeros behind its code."""
    program = targets.copy(targets.build("slots", *flags))
    plan = host.files.plan(program, "target_slots")
    with program.open("r+b") as file:
        file.seek(plan.slack_offset)
        file.write(b"\x90" * plan.slack_len)
    assert plan.slack_len
    plan = host.files.plan(program, "target_slots")
    assert not plan.slack_len
    return program


def slot_pages(pid: int) -> list[int]:
    found = layout.spans(maps.read_maps(pid))
    return [s.start for s in found if s.prot == "r-xp" and not s.inode and s.end - s.start == AREA_BYTES]


def content(pid: int, addr: int, length: int = AREA_BYTES) -> bytes:
    fd = os.open(f"/proc/{pid}/mem", os.O_RDONLY)
    try:
        return os.pread(fd, length, addr)
    finally:
        os.close(fd)


def vdso(pid: int) -> bytes:
    (span,) = (s for s in layout.spans(maps.read_maps(pid)) if s.name == b"[vdso]")
    return content(pid, span.start, span.end - span.start)


def reason(probe: Probe) -> str:
    (target,) = probe.targets
    assert target.state == "refused"
    return target.reason


@pytest.mark.parametrize("flags", KINDS, ids=lambda flags: " ".join(flags) or "pie")
def test_a_file_without_room_is_probed(host: Host, targets: Targets, flags: tuple[str, ...]) -> None:
    """Nothing is mapped before the first hit; registers are kept; the pages are blank afterwards, and used again."""
    program = full(host, targets, *flags)
    plan = host.files.plan(program, "target_slots")
    with Child([program]) as child:
        image = vdso(child.pid)
        with host.untouched(child.pid):
            probe = host.register(plan, pid=child.pid)
            assert (probe.states()["armed"], slot_pages(child.pid)) == (1, [])
            child.ask("call 200")
            (area,) = slot_pages(child.pid)
            assert vdso(child.pid) == image
            assert content(child.pid, area) != FILLER
            child.ask("heap 600")
            child.ask("call 50")
            assert probe.hits == 250
            probe.unregister()
            host.engine.close()
        assert content(child.pid, area) == FILLER
        other = Host(PtraceEngine)
        try:
            again = other.register(plan, pid=child.pid)
            child.ask("call 7")
            assert (again.hits, slot_pages(child.pid)) == (7, [area])
        finally:
            other.close()
        assert content(child.pid, area) == FILLER
        child.ask("call 3")
        assert child.count()["wrong"] == 0


def test_a_crowd_at_the_first_hit_maps_once(host: Host, targets: Targets) -> None:
    program = full(host, targets)
    with Child([program, "64"]) as child:
        probe = host.register(host.files.plan(program, "target_slots"), pid=child.pid)
        child.ask("crowd")
        assert (probe.hits, len(slot_pages(child.pid))) == (64, 1)
        assert child.count()["wrong"] == 0


@pytest.mark.parametrize("hit_before", [False, True])
def test_children_of_every_kind_and_slot_pages(host: Host, targets: Targets, hit_before: bool) -> None:
    program = full(host, targets)
    with Child([program]) as child:
        probe = host.register(host.files.plan(program, "target_slots"))
        if hit_before:
            child.ask("call 1")
        for kind in ("fork", "vfork", "clone", "fork"):
            assert child.ask(f"{kind} 5") == "ended 0"
        child.ask("call 5")
        count = child.count()
        assert (probe.hits, count["wrong"]) == (count["done"], 0)
        assert len(slot_pages(child.pid)) == 1


def test_a_child_that_forks_while_others_are_at_the_first_hit(host: Host, targets: Targets) -> None:
    program = full(host, targets)
    plan = host.files.plan(program, "target_slots")
    for _ in range(5):
        with Child([program, "4"]) as child:
            probe = host.register(plan, probe="storm")
            child.ask("run")
            for _ in range(10):
                assert child.ask("fork 3") == "ended 0"
            child.ask("rest")
            count = child.count()
            assert (probe.hits, count["wrong"]) == (count["done"], 0)
            probe.unregister()


def test_signals_at_the_first_hit(host: Host, targets: Targets) -> None:
    """Their handler runs into the same breakpoint."""
    program = full(host, targets)
    plan = host.files.plan(program, "target_slots")
    for _ in range(5):
        with Child([program]) as child:
            probe = host.register(plan, pid=child.pid)
            child.ask("signals 300")
            count = child.count()
            assert (probe.hits, count["wrong"]) == (count["done"], 0)
            probe.unregister()


def test_locked_memory(host: Host, targets: Targets) -> None:
    program = full(host, targets)
    with Child([program]) as child:
        child.ask("lock")
        probe = host.register(host.files.plan(program, "target_slots"), pid=child.pid)
        child.ask("call 5")
        assert (probe.hits, child.count()["wrong"]) == (5, 0)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_process_under_seccomp_is_refused(host: Host, targets: Targets, when: str) -> None:
    """At the latest by the first hit, which goes on as if there had been none."""
    program = full(host, targets)
    with Child([program]) as child:
        if when == "before":
            child.ask("filter")
        probe = host.register(host.files.plan(program, "target_slots"), pid=child.pid)
        assert probe.states()["armed"] == (when == "after")
        if when == "after":
            child.ask("filter")
        child.ask("call 5")
        assert reason(probe) == "Seccomp"
        assert probe.targets[0].may_have_missed == (when == "after")
        assert probe.hits == (when == "after")
        assert (child.count()["wrong"], slot_pages(child.pid)) == (0, [])


def test_a_process_that_may_map_no_more(host: Host, targets: Targets) -> None:
    program = full(host, targets)
    plan = host.files.plan(program, "target_slots")
    with Child([program, "8"]) as child:
        probe = host.register(plan, pid=child.pid)
        child.ask("limit")
        child.ask("crowd")
        assert reason(probe) == "NoRoom"
        assert "Cannot allocate memory" in probe.targets[0].message
        assert probe.targets[0].may_have_missed
        host.reconcile(child.pid)
        child.ask("call 5")
        assert (reason(probe), probe.hits) == ("NoRoom", 1), "it is not asked over and over"
        assert (child.count()["wrong"], slot_pages(child.pid)) == (0, [])
        assert host.altered(child.pid, [program]) == {}
        probe.unregister()
        host.engine.close()
        child.ask("free")
        probe = host.register(plan, probe="again", pid=child.pid)
        child.ask("call 5")
        assert probe.hits == 5


@pytest.mark.parametrize("command", ["unmap", "over"])
def test_a_program_that_unmaps_what_it_does_not_know(host: Host, targets: Targets, command: str) -> None:
    """Nobody jumps to where the slot was, and nothing is written there."""
    program = full(host, targets)
    with Child([program]) as child:
        probe = host.register(host.files.plan(program, "target_slots"), pid=child.pid)
        for i in range(3):
            child.ask("call 5")
            (area,) = slot_pages(child.pid)
            child.ask(command)
            child.ask("call 5")
            assert (probe.hits, child.count()["wrong"]) == (10 * (i + 1), 0)
            if command == "over":
                assert not any(content(child.pid, area))
        probe.unregister()
        host.engine.close()
        if command == "over":
            assert not any(content(child.pid, area))


def test_a_child_in_the_same_memory_that_may_map_no_more(host: Host, targets: Targets) -> None:
    """What it runs into is told of the process that the site is known of."""
    program = full(host, targets)
    with Child([program]) as child:
        probe = host.register(host.files.plan(program, "target_slots"), pid=child.pid)
        child.ask("limit")
        assert child.ask("clone 3") == "ended 0"
        assert reason(probe) == "NoRoom"
        child.ask("call 3")
        assert child.count()["wrong"] == 0


def test_a_place_that_is_taken_meanwhile(host: Host, targets: Targets, monkeypatch: pytest.MonkeyPatch) -> None:
    program = full(host, targets)
    real, asked = pages._places, []

    def places(pid: int, mapped: list[layout.Span], site: pages.Site) -> list[int]:
        asked.append(pid)
        # (Once when it is armed, then at the first hit.)
        return [site.addr & ~4095] if len(asked) == 2 else real(pid, mapped, site)

    monkeypatch.setattr(pages, "_places", places)
    with Child([program]) as child:
        probe = host.register(host.files.plan(program, "target_slots"), pid=child.pid)
        child.ask("call 5")
        assert (probe.hits, child.count()["wrong"], len(slot_pages(child.pid))) == (5, 0, 1)
        assert len(asked) == 3


@pytest.mark.parametrize("lacks", ["_places", "_spare"])
def test_what_cannot_be_had_is_known_when_it_is_armed(
    host: Host, targets: Targets, monkeypatch: pytest.MonkeyPatch, lacks: str
) -> None:
    monkeypatch.setattr(pages, lacks, lambda *args: [])
    program = full(host, targets)
    with Child([program]) as child:
        assert reason(host.register(host.files.plan(program, "target_slots"), pid=child.pid)) == "NoRoom"
        assert host.altered(child.pid, [program]) == {}


def test_a_system_call_that_the_program_would_dispatch_itself(host: Host, targets: Targets) -> None:
    """The signal that it makes is ours, not the program's (prctl(2), PR_SET_SYSCALL_USER_DISPATCH)."""
    program = full(host, targets)
    with Child([program]) as child:
        child.ask("dispatch")
        probe = host.register(host.files.plan(program, "target_slots"), pid=child.pid)
        child.ask("call 5")
        assert (reason(probe), child.count()["wrong"]) == ("NoRoom", 0)


def test_more_slots_than_one_area_has(host: Host, targets: Targets, monkeypatch: pytest.MonkeyPatch) -> None:
    program = full(host, targets)
    with Child([program]) as child:
        host.register(host.files.plan(program, "main"), probe="stays", pid=child.pid)
        probe = host.register(host.files.plan(program, "target_slots"), pid=child.pid)
        child.ask("call 1")
        (first,) = slot_pages(child.pid)
        # As remains of a tracer that was killed: not blank, so not to be used.
        fd = os.open(f"/proc/{child.pid}/mem", os.O_RDWR)
        os.pwrite(fd, AREA_HEADER + b"\x90" * (AREA_BYTES - len(AREA_HEADER)), first)
        os.close(fd)
        child.ask("call 4")
        assert (probe.hits, child.count()["wrong"]) == (5, 0)
        assert len(slot_pages(child.pid)) == 2


TRACER = """
import os, signal, sys
from pathlib import Path
from tests.engines.host import Host
from trapline_agent.engines.ptrace.engine import PtraceEngine
from trapline_agent.engines.ptrace.memory import AddressSpace
from trapline_agent.engines.ptrace.pages import SlotPages
from trapline_agent.kernel import ptrace

pid, path, die_at = int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
host = Host(PtraceEngine)
plan = host.files.plan(path, "target_slots")
spaces = []
init = AddressSpace.__init__
AddressSpace.__init__ = lambda self, pid: (init(self, pid), spaces.append(self))[0]
stops = 0
go, wait = ptrace.to_system_call, SlotPages._wait_for

def die():
    # The breakpoint itself is another matter: whoever meets that alone ends.
    for space in spaces:
        for site in space.sites.values():
            space.put(site.addr, site.original)
    os.kill(os.getpid(), signal.SIGKILL)

def step():
    global stops
    stops += 1
    if stops == die_at:
        die()

def to_system_call(tid):
    step()
    go(tid)

def wait_for(self, tid):
    status = wait(self, tid)
    step()
    return status

ptrace.to_system_call, SlotPages._wait_for = to_system_call, wait_for
host.register(plan, pid=pid)
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("moment", range(1, 9))
def test_a_tracer_that_is_killed_while_pages_are_mapped(host: Host, targets: Targets, moment: int) -> None:
    """The thread that was to map them comes out right by itself: before, in and after either call."""
    program = full(host, targets)
    with Child([program]) as child:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        argv = [sys.executable, "-c", TRACER, str(child.pid), str(program), str(moment)]
        with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, cwd=ROOT) as tracer:
            assert tracer.stdout is not None
            assert tracer.stdout.readline() == b"ready\n"
            child.ask("call 3")
            assert tracer.wait(30) == -9
        child.ask("call 3")
        assert child.count()["wrong"] == 0
        probe = host.register(host.files.plan(program, "target_slots"), pid=child.pid)
        child.ask("call 3")
        assert (probe.hits, child.count()["wrong"]) == (3, 0)


def test_the_reason_has_a_hint() -> None:
    refusal = pages._no_room(1, "nothing is free")
    assert isinstance(refusal, Unsupported)
    assert refusal.hint
