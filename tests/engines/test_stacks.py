"""Stacks of hits: what a probe's own trap sees, in boosted and emulated instructions, at returns, in signal handlers."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from msgspec import structs

from tests.engines.host import Host, Probe
from tests.support import needs
from tests.support.targets import Targets
from tests.unwind.there import provide
from trapline.protocol.hits import ValueStatus
from trapline.protocol.stacks import End, Stack, numbers_of, unpack
from trapline.spec import parse_probe
from trapline_agent.capture.compiler import Site
from trapline_agent.capture.evaluate import Evaluator
from trapline_agent.capture.program import compiled
from trapline_agent.engines import ring
from trapline_agent.plans import FetchPlan
from trapline_agent.targets import maps
from trapline_agent.unwind.names import Names
from trapline_agent.unwind.tables import Tables
from trapline_agent.unwind.walk import NewFile, Stacks

pytestmark = [needs.gcc, needs.ptrace_any, needs.x86_64]

STACK = FetchPlan(name="stack", register="rip", stack=127)
CALLER = FetchPlan(name="caller", register="rip", stack=1, skip=1)
LIBC = Path("/lib/x86_64-linux-gnu/libc.so.6")


def stacks_of(probe: Probe, column: str = "stack") -> list[Stack]:
    return [
        unpack(batch.header.strings[i], batch.header.files)
        for batch in probe.batches()
        for i in batch.columns[column].tolist()
    ]


def named(stack: Stack) -> list[str]:
    """The functions up to ``main``; what is behind it is libc's, most of it without a symbol."""
    names = [name for frame in stack.frames for name in _names(frame)]
    return names[: names.index("main") + 1] if "main" in names else names


_names = Names()


def with_tables(host: Host) -> list[NewFile]:
    wanted: list[NewFile] = []
    host.table.stacks.want = wanted.append
    return wanted


def test_a_stack_at_a_functions_first_instruction(host: Host, targets: Targets) -> None:
    program = targets.build("stacks")
    wanted = with_tables(host)
    with targets.run("stacks") as child, host.untouched(child.pid):
        probe = host.register(host.files.plan(program, "target_here"), fetches=[STACK, CALLER], pid=child.pid)
        assert {Path(w.path).name for w in wanted} >= {"stacks", "libc.so.6", "[vdso]"}
        provide(host.table.stacks, wanted, Tables())
        child.ask("deep 3")
        (batch,) = probe.batches()
        stack, caller = (
            unpack(batch.header.strings[batch.columns[c][0]], batch.header.files) for c in ("stack", "caller")
        )
        assert named(stack) == ["target_here", *["target_down"] * 3, "obey", "main"]
        assert stack.end is End.COMPLETE
        assert not stack.by_frame_pointer
        assert named(caller) == ["target_down"]
        assert batch.columns["stack?"].tolist() == [ValueStatus.OK]
        assert stack.frames[0].offset == host.files.plan(program, "target_here").offset
        assert {f.path for f in batch.header.files.values()} >= {str(program)}
        assert all(f.build_id for f in batch.header.files.values())
        probe.unregister()
        host.engine.close()


@pytest.mark.parametrize("offset", ["first", "second", "third", "fourth"])
def test_a_stack_at_each_instruction_of_a_prologue(host: Host, targets: Targets, offset: str) -> None:
    """Emulated pushes, displaced moves: what the walk sees is the thread before the instruction."""
    program = targets.build("stacks", "-O0", "-fno-omit-frame-pointer", "-fcf-protection=none")
    # push %rbp; mov %rsp, %rbp; push %rbx or sub; ...: -O0 prologues begin so
    at = {"first": 0, "second": 1, "third": 4, "fourth": 8}[offset]
    wanted = with_tables(host)
    run = targets.run("stacks", flags=("-O0", "-fno-omit-frame-pointer", "-fcf-protection=none"))
    with run as child, host.untouched(child.pid):
        probe = host.register(host.files.plan(program, "target_down", offset=at), fetches=[STACK], pid=child.pid)
        provide(host.table.stacks, wanted, Tables())
        child.ask("deep 2")
        assert [named(s) for s in stacks_of(probe)] == [
            ["target_down", "obey", "main"],
            ["target_down", "target_down", "obey", "main"],
        ]
        probe.unregister()
        host.engine.close()


def test_through_libc_and_signal_frames(host: Host, targets: Targets) -> None:
    program = targets.build("stacks")
    wanted = with_tables(host)
    with targets.run("stacks") as child:
        probe = host.register(host.files.plan(program, "target_here"), fetches=[STACK], pid=child.pid)
        provide(host.table.stacks, wanted, Tables())
        child.ask("sort")
        sorts = [named(s) for s in stacks_of(probe)]
        assert all(s[:2] == ["target_here", "compare"] and s[-3:] == ["target_sort", "obey", "main"] for s in sorts)
        for way, last in (("signal", "target_raise"), ("other", "target_raise"), ("fault", "target_fault")):
            child.ask(way)
            (stack,) = stacks_of(probe)
            assert named(stack)[:2] == ["target_here", "handler"]
            assert named(stack)[-3:] == [last, "obey", "main"]
            assert stack.end is End.COMPLETE
        child.ask("thread")
        (stack,) = stacks_of(probe)
        assert named(stack)[:2] == ["target_here", "run"]
        assert stack.end is End.COMPLETE


def test_a_stack_at_a_return(host: Host, targets: Targets) -> None:
    program = targets.build("stacks")
    wanted = with_tables(host)
    with targets.run("stacks") as child:
        fetches = [STACK, FetchPlan(name="caller", register="rip", stack=1)]
        probe = host.register(host.files.plan(program, "target_here"), fetches=fetches, returns=True, pid=child.pid)
        provide(host.table.stacks, wanted, Tables())
        child.ask("deep 2")
        (batch,) = probe.batches()
        stack, caller = (
            unpack(batch.header.strings[batch.columns[c][0]], batch.header.files) for c in ("stack", "caller")
        )
        assert named(stack) == ["target_down", "target_down", "obey", "main"]
        assert named(caller) == ["target_down"]


def test_a_stack_beside_what_a_program_computes(host: Host, targets: Targets) -> None:
    """With a condition: of what it leaves out no stack is taken."""
    program = targets.build("stacks")
    wanted = with_tables(host)
    with targets.run("stacks") as child:
        plan = host.files.plan(program, "target_down")
        spec = parse_probe(f"{program}:target_down if arg0 == 2 {{ustack(2), twice=arg0 * 2, caller}}")
        columns, computed = compiled(spec.captures, spec.condition, Site())
        probe = host.register(structs.replace(plan, program=computed), fetches=columns, pid=child.pid)
        provide(host.table.stacks, wanted, Tables())
        child.ask("deep 3")
        (batch,) = probe.batches()
        assert batch.columns["twice"].tolist() == [4]
        assert batch.columns["ustack(2)?"].tolist() == [ValueStatus.OK]
        stack, caller = (
            unpack(batch.header.strings[batch.columns[c][0]], batch.header.files) for c in ("ustack(2)", "caller")
        )
        assert (named(stack), stack.end) == (["target_down"] * 2, End.LIMIT)
        assert named(caller) == ["target_down"]


def test_depth_and_interning(host: Host, targets: Targets) -> None:
    program = targets.build("stacks")
    wanted = with_tables(host)
    with targets.run("stacks") as child:
        ten = FetchPlan(name="stack", register="rip", stack=10)
        probe = host.register(host.files.plan(program, "target_here"), fetches=[ten], pid=child.pid)
        provide(host.table.stacks, wanted, Tables())
        for _ in range(3):
            child.ask("deep 1000")
        (batch,) = probe.batches()
        assert len(set(batch.columns["stack"].tolist())) == len(batch.header.strings) == 1
        stack = unpack(batch.header.strings[0], batch.header.files)
        assert len(stack.frames) == 10
        assert stack.end is End.LIMIT
        assert batch.columns["stack?"].tolist() == [ValueStatus.OK] * 3


def test_many_different_stacks_fit_their_batches(host: Host, targets: Targets, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ring, "_TEXT_BYTES", 4096)
    program = targets.build("stacks")
    wanted = with_tables(host)
    with targets.run("stacks") as child:
        probe = host.register(host.files.plan(program, "target_here"), fetches=[STACK], pid=child.pid)
        provide(host.table.stacks, wanted, Tables())
        for depth in range(1, 51):
            child.ask(f"deep {depth}")
        batches = probe.batches()
        assert len(batches) > 1
        assert all(sum(map(len, b.header.strings[:-1])) < 4096 for b in batches)
        assert [b.header.seq for b in batches] == [
            sum(b.header.count for b in batches[:i]) for i in range(len(batches))
        ]
        lengths = [len(unpack(s, b.header.files).frames) for b in batches for s in b.header.strings]
        assert lengths == list(range(lengths[0], lengths[0] + 50))


def test_without_a_table_the_stack_says_so_until_it_comes(host: Host, targets: Targets) -> None:
    program = targets.build("stacks")
    wanted = with_tables(host)
    with targets.run("stacks") as child:
        probe = host.register(host.files.plan(program, "target_here"), fetches=[STACK], pid=child.pid)
        child.ask("sort")
        before = stacks_of(probe)
        assert {s.end for s in before} == {End.NO_TABLE_YET}
        assert named(before[0])[:2] == ["target_here", "compare"]  # the return address is where the stack pointer is
        provide(host.table.stacks, wanted, Tables())
        child.ask("sort")
        assert {s.end for s in stacks_of(probe)} == {End.COMPLETE}


def test_a_library_that_is_opened_later(host: Host, targets: Targets) -> None:
    """Its loader tells of it; its code is in the next stack with its own name."""
    program, library = targets.build("dl"), targets.library()
    wanted = with_tables(host)
    with targets.run("dl", library) as child:
        probe = host.register(host.files.plan(library, "dlfn"), fetches=[STACK], pid=child.pid)
        child.ask("open")
        provide(host.table.stacks, wanted, Tables())
        child.ask("call 2")
        found = stacks_of(probe)
        assert [named(s)[0] for s in found] == ["dlfn", "dlfn"]
        assert found[0].frames[0].file.path == str(library)
        assert found[0].end is End.COMPLETE
        assert program


class TestHostileStacks:
    """Registers that lead anywhere: a stack that ends, in bounded time, and nothing raised."""

    @pytest.mark.parametrize("sp", [0, 8, 3, 2**47 - 8, 2**63, 2**64 - 8])
    @pytest.mark.parametrize("ip", [0, 1, 2**47, 2**64 - 1])
    def test_wild_registers(self, sp: int, ip: int) -> None:
        words = [sp] * 27
        words[16] = ip
        fd = os.open("/proc/self/mem", os.O_RDONLY)
        try:
            packed = Stacks().walk(os.getpid(), words, fd, 127)
        finally:
            os.close(fd)
        stack = unpack(packed, dict.fromkeys(numbers_of(packed), None))  # type: ignore[arg-type]
        assert stack.end is not End.COMPLETE
        assert len(stack.frames) <= 2

    def test_a_return_to_the_vsyscall_page(self, caplog: pytest.LogCaptureFixture) -> None:
        """It is in /proc/PID/maps, and cannot be read at its address."""
        here = np.array([0xFFFF_FFFF_FF60_0005, 0], np.uint64)
        words = [0] * 27
        words[16] = words[16] or int(maps.executable_mappings(os.getpid())[0].start)
        words[19] = here.ctypes.data
        fd = os.open("/proc/self/mem", os.O_RDONLY)
        try:
            packed = Stacks().walk(os.getpid(), words, fd, 127)
        finally:
            os.close(fd)
        assert unpack(packed, {}).end is End.NO_TABLE_YET
        assert not caplog.records

    def test_what_goes_wrong_costs_the_stack_not_the_hit(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("trapline_agent.unwind.walk.maps.read_maps", lambda pid: 1 / 0)
        assert unpack(Stacks().walk(1, [0] * 27, -1, 127), {}).frames == ()

    def test_a_process_that_is_gone(self) -> None:
        packed = Stacks().walk(2**22 + 1, [4096] * 27, -1, 127)
        assert unpack(packed, {}).end is End.BAD_PC

    def test_an_evaluator_without_stacks(self) -> None:
        assert Evaluator([]).words([]) == ()
