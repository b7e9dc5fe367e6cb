"""Processes and mappings out of the ordinary: each is probed with exact counts and unharmed, or refused by a reason of its
own. docs/architecture/odd-targets.md is the list.
"""

from __future__ import annotations

import os

import pytest

from tests.engines.host import Host, untouched
from tests.support import needs
from tests.support.children import Child
from tests.support.targets import Targets
from trapline.errors import Unsupported
from trapline.spec import parse_probe
from trapline_agent.resolve import Resolver

pytestmark = [needs.gcc, needs.ptrace_any, needs.x86_64]

STATIC = [
    pytest.param("gcc", ("-static",), id="glibc-static"),
    pytest.param("gcc", ("-static-pie",), id="glibc-static-pie"),
    pytest.param("musl-gcc", (), id="musl", marks=needs.musl),
    pytest.param("musl-gcc", ("-static",), id="musl-static", marks=needs.musl),
]


def refusals(probe: object) -> set[tuple[str, str]]:
    return {(t.state, t.reason) for t in probe.targets}  # type: ignore[attr-defined]


# --- other kinds of programs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("compiler", "flags"), STATIC)
def test_other_libraries_and_none(host: Host, targets: Targets, compiler: str, flags: tuple[str, ...]) -> None:
    program = targets.build("hot", *flags, compiler=compiler)
    with Child([program, "4"]) as child, untouched(child.pid):
        probe = host.register(host.files.plan(program, "target_hot"), pid=child.pid)
        child.ask("call 100")
        child.ask("start")
        while probe.hits < 1000:
            pass
        child.ask("stop")
        count = child.count()
        assert probe.hits == count["done"] == count["begun"]
        assert count["wrong"] == 0
        probe.unregister()
        host.engine.close()


@needs.musl
def test_a_library_that_musl_opens_is_armed_before_it_runs(host: Host, targets: Targets) -> None:
    library = targets.build("dlfn", "-shared", "-fPIC", compiler="musl-gcc")
    program = targets.build("dl", compiler="musl-gcc")
    host.table.set_loaders(Resolver("h", "h", {os.getpid()}, 0).loaders())
    with Child([program, library]) as child:
        probe = host.register(host.files.plan(library, "dlfn"), pid=child.pid)
        child.ask("open")
        child.ask("call 10")
        assert probe.hits == child.count()["done"] == 10
        assert not any(t.may_have_missed for t in probe.targets)


def test_a_32_bit_process_is_refused(host: Host, targets: Targets) -> None:
    """It maps 64-bit code all the same: as data, which is the only way."""
    flags = ("-m32", "-nostdlib", "-static", "-ffreestanding", "-fno-pic", "-no-pie", "-fno-stack-protector")
    mapped = targets.build("hot")
    program = targets.build("thirty_two", *flags)
    with Child([program, mapped]) as child, untouched(child.pid):
        by_name = host.register(host.files.plan(mapped, "target_hot"), comm="thirty_two")
        assert refusals(by_name) == {("refused", "ThirtyTwoBit")}
        assert host.engine.processes() == [], "nobody needs to attach to it"
        by_number = host.register(host.files.plan(mapped, "target_hot"), probe="q", pid=child.pid)
        assert refusals(by_number) == {("refused", "ThirtyTwoBit")}
        assert child.ask("") == "right"
        by_name.unregister()
        by_number.unregister()
        host.engine.close()
        assert child.ask("") == "right"


# --- odd mappings -----------------------------------------------------------------------------------------------------


def test_first_and_last_byte_of_a_mapping_that_is_split(host: Host, targets: Targets) -> None:
    program = targets.build("mappings")
    plans = [host.files.plan(program, s, i) for i, s in enumerate(("page_first", "page_last"))]
    with targets.run("mappings") as child:
        child.ask("split")
        with untouched(child.pid):
            probe = host.register(plans, pid=child.pid)
            assert probe.states() == {"armed": 2}
            child.ask("first 10")
            child.ask("last 5")
            assert probe.hits == 15
            assert child.count()["wrong"] == 0
            probe.unregister()
            host.engine.close()


@pytest.mark.parametrize("before", [True, False])
def test_a_file_that_is_mapped_twice(host: Host, targets: Targets, before: bool) -> None:
    program = targets.build("mappings")
    with targets.run("mappings") as child, untouched(child.pid):
        if before:
            child.ask("alias private")
        probe = host.register(host.files.plan(program, "page_first"), pid=child.pid)
        if not before:
            child.ask("alias private")
            host.reconcile(child.pid)
        assert probe.states() == {"armed": 2}
        child.ask("first 10")
        child.ask("again 20")
        count = child.count()
        assert (probe.hits, count["first"], count["wrong"]) == (30, 30, 0)
        probe.unregister()
        host.engine.close()


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize(("how", "reason"), [("writable", "WritableMapping"), ("shared", "SharedMapping")])
def test_writable_and_shared_mappings_are_refused(
    host: Host, targets: Targets, how: str, reason: str, before: bool
) -> None:
    """Those that come later too (semantics R15), and beside one that is armed."""
    program = targets.build("mappings")
    content = program.read_bytes()
    with targets.run("mappings") as child:
        if before:
            child.ask(f"alias {how}")
        probe = host.register(host.files.plan(program, "page_first"), pid=child.pid)
        if not before:
            child.ask(f"alias {how}")
            host.reconcile(child.pid)
        assert refusals(probe) == {("armed", ""), ("refused", reason)}
        (refused,) = (t for t in probe.targets if t.state == "refused")
        assert "mapped" in refused.message
        child.ask("first 5")
        child.ask("again 5")
        assert (probe.hits, child.count()["wrong"]) == (5, 0)
    assert program.read_bytes() == content


def test_a_page_that_is_unmapped_and_mapped_again(host: Host, targets: Targets) -> None:
    """Nobody tells of it: what is armed is what memory says, not what was written once (semantics R12)."""
    program = targets.build("mappings")
    with targets.run("mappings") as child:
        probe = host.register(host.files.plan(program, "page_first"), pid=child.pid)
        child.ask("first 5")
        child.ask("unmap")
        host.reconcile(child.pid)
        assert probe.states() == {"gone": 1}
        child.ask("map")
        host.reconcile(child.pid)
        assert probe.states() == {"armed": 1}
        child.ask("first 5")
        child.ask("map")  # over the other: the breakpoint went with that
        child.ask("first 7")
        host.reconcile(child.pid)
        child.ask("first 5")
        assert (probe.hits, child.count()["wrong"]) == (15, 0)
        with untouched(child.pid):
            probe.unregister()
            host.engine.close()


@pytest.mark.parametrize("told", [True, False])
def test_other_code_at_the_address_is_not_written_to(host: Host, targets: Targets, told: bool) -> None:
    program = targets.build("mappings")
    with targets.run("mappings") as child:
        probe = host.register(host.files.plan(program, "page_first"), pid=child.pid)
        child.ask("first 5")
        child.ask("other")
        if told:
            host.reconcile(child.pid)
            assert probe.states() == {"gone": 1}
        child.ask("first 5")
        probe.unregister()
        host.engine.close()
        child.ask("first 5")
        assert (probe.hits, child.count()["wrong"]) == (5, 0)


@pytest.mark.parametrize("told", [True, False])
def test_code_that_moves_takes_the_breakpoint_along(host: Host, targets: Targets, told: bool) -> None:
    program = targets.build("mappings")
    with targets.run("mappings") as child:
        probe = host.register(host.files.plan(program, "page_first"), pid=child.pid)
        child.ask("first 5")
        child.ask("move")
        if told:
            host.reconcile(child.pid)
        child.ask("first 5")
        assert (probe.hits, child.count()["wrong"]) == (10, 0)
        with untouched(child.pid):
            probe.unregister()
            host.engine.close()
        child.ask("first 5")


def test_code_that_moves_and_is_left_before_it_runs(host: Host, targets: Targets) -> None:
    program = targets.build("mappings")
    with targets.run("mappings") as child:
        probe = host.register(host.files.plan(program, "page_first"), pid=child.pid)
        child.ask("move")
        with untouched(child.pid):
            probe.unregister()
            host.engine.close()
        child.ask("first 5")
        assert (probe.hits, child.count()["wrong"]) == (0, 0)


def test_code_that_the_loader_changes_is_refused(host: Host, targets: Targets) -> None:
    """The bytes are the file's when they are looked at, and changed afterwards: the loader reports before it relocates."""
    library = targets.build("textrel", "-shared", "-fno-pic", "-Wl,-z,notext")
    resolver = Resolver("h", "h", {os.getpid()}, 0)
    with pytest.raises(Unsupported) as refused:
        resolver.resolve(parse_probe(f"{library}:dlfn"))
    assert refused.value.reason == "TextRelocation"
    (plan,) = resolver.resolve(parse_probe(f"{library}:inner")).plans
    with targets.run("dl", library) as child:
        probe = host.register(plan, pid=child.pid)
        child.ask("open")
        child.ask("call 10")
        assert (probe.hits, child.count()["wrong"]) == (10, 0)
