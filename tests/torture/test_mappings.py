"""Mappings that come, go and are used again while probes do (R2, R10, R12, R18): munmap and mremap tell nobody."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.engines.host import Host, altered_bytes, mapped_files
from tests.support import needs
from tests.support.children import TIMEOUT_S, Child
from tests.support.targets import Targets
from tests.torture.faults import Call, Faults
from trapline_agent.arch.x86_64.stepping import plan_step
from trapline_agent.kernel import procfs
from trapline_agent.plans import SitePlan
from trapline_agent.targets import maps

pytestmark = [needs.gcc, needs.binutils, needs.ptrace_any, needs.x86_64]


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Faults:
    return Faults(monkeypatch)


def code_of(library: Path) -> tuple[int, int]:
    """Returns (file offset, length) of a library's executable segment, as readelf has it, in whole pages and one more."""
    text = subprocess.check_output(["readelf", "-lW", library], text=True)
    (line,) = (row for row in text.splitlines() if row.split()[:1] == ["LOAD"] and " R E " in row)
    offset, length = int(line.split()[1], 16), int(line.split()[4], 16)
    return offset & ~4095, ((offset % 4096 + length + 4095) & ~4095) + 4096


@contextlib.contextmanager
def remapping(host: Host, targets: Targets) -> Iterator[tuple[Child, SitePlan]]:
    library = targets.library()
    plan = host.files.plan(library, "dlfn")
    with targets.run("remap", library, *(hex(n) for n in (*code_of(library), plan.offset))) as child:
        yield child, plan


def during(
    faults: Faults, act: Callable[[], object], name: str = "pwrite 1"
) -> contextlib.AbstractContextManager[list[Call]]:
    """Has something happen right before a write: that is where a race can be lost."""
    return faults.before(Call("pwrite", name, 1), act)


def test_r12_a_file_that_is_mapped_anew_is_armed_anew(host: Host, targets: Targets) -> None:
    with remapping(host, targets) as (child, plan):
        child.ask("map")
        probe = host.register(plan, pid=child.pid)
        for command in ("call 5", "again"):
            child.ask(command)
        host.reconcile(child.pid)
        child.ask("call 5")
        assert (probe.hits, child.count()["wrong"]) == (10, 0)
        assert probe.states()["armed"] == 1
        for command in ("unmap", "zeros", "other", "map"):
            child.ask(command)
        host.reconcile(child.pid)
        child.ask("call 5")
        assert (probe.hits, child.count()["wrong"]) == (15, 0)
        probe.unregister()
        host.engine.close()
        assert altered_bytes(child.pid, mapped_files(child.pid)) == {}


def test_r12_slots_that_went_with_their_mapping(host: Host, targets: Targets) -> None:
    """Another probe keeps the process followed; the library's slot was written in a mapping that is no more."""
    with remapping(host, targets) as (child, plan):
        host.register(host.files.plan(targets.build("remap"), "main"), probe="other", pid=child.pid)
        child.ask("map")
        for cycle in range(3):
            probe = host.register(plan, probe=f"p{cycle}", pid=child.pid)
            child.ask("call 5")
            probe.unregister()
            child.ask("again")
            assert (probe.hits, child.count()["wrong"]) == (5, 0)


@pytest.mark.parametrize("command", ["tail", "move", "unmap", "zeros", "other"])
def test_r12_part_of_a_mapping_goes_while_it_is_armed(host: Host, targets: Targets, command: str) -> None:
    with remapping(host, targets) as (child, plan):
        child.ask("map")
        probe = host.register(plan, pid=child.pid)
        child.ask("call 5")
        child.ask(command)
        if command == "move":
            child.ask("call 5")  # the byte moved along with its page, and so did the slot
            host.reconcile(child.pid)
            assert probe.hits == 10
        child.ask("count")
        probe.unregister()
        host.engine.close()
        assert altered_bytes(child.pid, mapped_files(child.pid)) == {}
        if command in ("zeros", "other"):
            assert child.ask(f"stray {command}") == "stray=0"
        child.ask("map")
        child.ask("call 5")
        count = child.count()
        assert (count["wrong"], count["stray"]) == (0, 0)


@pytest.mark.slack
@pytest.mark.parametrize("becomes", ["zeros", "other", "unmap"])
@pytest.mark.parametrize("write", ["arm", "slot", "disarm"])
def test_r18_no_byte_is_left_in_an_address_that_is_used_again(
    host: Host, targets: Targets, faults: Faults, becomes: str, write: str
) -> None:
    """The mapping changes between the look and the write."""
    with remapping(host, targets) as (child, plan):
        host.register(host.files.plan(targets.build("remap"), "main"), probe="other", pid=child.pid)
        child.ask("map")
        probe = host.register(plan, pid=child.pid) if write == "disarm" else None
        kind = "pwrite 1" if write != "slot" else f"pwrite {slot_bytes(host, child, plan)}"
        with during(faults, lambda: child.ask(becomes), kind):
            if probe is not None:
                probe.unregister()
            else:
                probe = host.register(plan, pid=child.pid)
        assert faults.calls
        assert child.ask(f"stray {becomes}") == "stray=0"
        assert altered_bytes(child.pid, [targets.library()]) == {}
        assert write == "disarm" or not probe.states()["armed"]
        child.ask("map")
        child.ask("call 3")
        assert child.count()["wrong"] == 0


def test_r18_a_place_that_is_mapped_anew_while_a_byte_is_taken_back(
    host: Host, targets: Targets, faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was there a moment ago would be written into the midst of code."""
    content_at = maps.content_at

    def then_mapped_anew(*args: int) -> bytes | None:
        content = content_at(*args)
        child.send("map")
        deadline = time.monotonic() + TIMEOUT_S
        while procfs.stat_fields(child.pid)[0] != b"t" and str(targets.library()) not in map(
            str, mapped_files(child.pid)
        ):
            assert time.monotonic() < deadline
        return content

    with remapping(host, targets) as (child, plan):
        child.ask("map")
        monkeypatch.setattr(maps, "content_at", then_mapped_anew)
        with during(faults, lambda: child.ask("zeros")):
            host.register(plan, pid=child.pid)
        child.wait_for("mapped")
        child.ask("call 3")
        assert child.count()["wrong"] == 0
        assert altered_bytes(child.pid, [targets.library()]) == {}


def slot_bytes(host: Host, child: Child, plan: SitePlan) -> int:
    """Returns the length of the displaced copy of a plan's instruction."""
    probe = host.register(plan, probe="length", pid=child.pid)
    child.ask("call 1")
    probe.unregister()
    changed = altered_bytes(child.pid, [Path(plan.path)])
    child.ask("again")
    return len(plan_step(plan.code).slot(0, min(offset for _, offset in changed) - plan.offset & 2**64 - 1).code)


def test_r2_a_library_that_is_opened_while_the_first_look_is_on_its_way(
    host: Host, targets: Targets, faults: Faults
) -> None:
    """After the mappings were read, before the loader's hook is there: the one has not seen it, the other not caught it."""
    library = targets.library()
    with targets.run("dl", library) as child:
        with during(faults, lambda: child.ask("open")):
            probe = host.register(host.files.plan(library, "dlfn"), pid=child.pid)
        child.ask("call 10")
        assert probe.hits == 10
