"""Stacks against gdb's, at the same stop: the same frames, to the byte."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tests.support import needs
from tests.support.children import run
from tests.support.targets import Targets
from tests.unwind.gdb import Compared, compare

pytestmark = [needs.gcc, needs.gdb, needs.x86_64]

LEVELS = [("-O0",), ("-O2",), ("-O3", "-fomit-frame-pointer")]
WAYS = ["deep 5", "sort", "signal", "fault", "other", "realign", "thread"]


def same(found: Compared) -> None:
    assert found.ours == found.gdb, found.names
    assert found.end == "complete"
    assert not found.by_frame_pointer


@pytest.mark.parametrize("flags", LEVELS, ids=" ".join)
@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_a_function(targets: Targets, tmp_path: Path, way: str, flags: tuple[str, ...]) -> None:
    found = compare(tmp_path, targets.build("stacks", *flags), [way], "target_here")
    same(found)
    assert found.names[0] == "target_here"
    if way in ("signal", "fault", "other"):
        assert any(is_signal for _, _, is_signal in found.raw["gdb"])


def test_deep_recursion(targets: Targets, tmp_path: Path) -> None:
    found = compare(tmp_path, targets.build("stacks"), ["deep 1000"], "target_here")
    same(found)
    assert found.names.count("target_down") == 1000


@pytest.mark.parametrize("way", ["sort", "signal", "thread"])
def test_a_static_program(targets: Targets, tmp_path: Path, way: str) -> None:
    """It has no PT_GNU_EH_FRAME, and a C library of its own."""
    same(compare(tmp_path, targets.build("stacks", "-static"), [way], "target_here"))


@needs.musl
def test_musl(targets: Targets, tmp_path: Path) -> None:
    """Its own code says nothing of its callers, its signal trampoline neither: that one is known by its code, and the
    system call that was interrupted is the last frame. (gdb guesses on, by disassembling.)"""
    program = targets.build("stacks", "-static", "-fno-pie", "-no-pie", compiler="musl-gcc")
    found = compare(tmp_path, program, ["deep 3"], "target_here")
    count = found.names.index("main") + 1
    assert found.ours[:count] == found.gdb[:count]
    found = compare(tmp_path, program, ["signal"], "target_here")
    assert found.names[:4] == ["target_here", "handler", "__restore_rt", "__restore_sigs"]
    assert found.ours == found.gdb[:4]
    assert found.end == "no-unwind-info"


@pytest.mark.parametrize("stop", ["__vdso_clock_gettime", "clock_gettime"])
def test_in_the_vdso_and_before_it(targets: Targets, tmp_path: Path, stop: str) -> None:
    found = compare(tmp_path, targets.build("stacks"), ["clock"], "target_here", before=[f"break {stop}", "continue"])
    same(found)
    assert "clock_gettime" in found.names[0]
    assert (found.ours[0][0] == "[vdso]") == stop.startswith("__vdso")


@needs.binutils
@pytest.mark.parametrize("steps", [0, 1, 2, 3, 4, 8, 14])
def test_through_the_plt_and_the_lazy_resolver(targets: Targets, tmp_path: Path, steps: int) -> None:
    program = targets.build("stacks", "-Wl,-z,lazy", "-no-pie", "-fcf-protection=none")
    code = run(["objdump", "-d", "-j", ".plt", program]).stdout
    entry = re.search("^([0-9a-f]+) <qsort@plt>:", code, re.MULTILINE)
    assert entry is not None
    found = compare(tmp_path, program, ["sort"], f"*0x{entry[1]}", before=["stepi"] * steps)
    same(found)
    assert "target_sort" in found.names[1:4]


@pytest.mark.parametrize("steps", range(0, 40, 6))
def test_at_any_instruction_of_a_prologue_and_behind(targets: Targets, tmp_path: Path, steps: int) -> None:
    found = compare(tmp_path, targets.build("stacks", "-O2"), ["realign"], "*target_realign", before=["stepi"] * steps)
    same(found)


@needs.gxx
@pytest.mark.parametrize("stop", ["target_cleanup", "target_caught", "__cxa_throw", "_Unwind_RaiseException"])
def test_while_an_exception_is_on_its_way(targets: Targets, tmp_path: Path, stop: str) -> None:
    same(compare(tmp_path, targets.build_cxx("throwing"), [], stop))


@needs.binutils
@pytest.mark.parametrize("way", ["deep 3", "sort", "signal"])
def test_a_stripped_program(targets: Targets, tmp_path: Path, way: str) -> None:
    """gdb's has the symbols, to find the place by; ours is made of a copy that is stripped of all that may go."""
    whole = targets.build("stacks", "-O2", "-rdynamic")
    stripped = Path(shutil.copy(whole, tmp_path / "stacks"))
    assert run(["strip", "-s", "-R", ".comment", stripped]).returncode == 0
    expected = compare(tmp_path, whole, [way], "target_here")
    found = compare(tmp_path, stripped, [way], "target_here")  # of .dynsym, as it is exported
    assert [o for p, o in found.ours if p == str(stripped)] == [o for p, o in expected.gdb if p == str(whole)]
    same(found)


@needs.go
def test_go_by_frame_pointers(targets: Targets, tmp_path: Path) -> None:
    program = targets.build_go("gotarget")
    for stop in ("main.deep", "*'main.deep'"):
        found = compare(tmp_path, program, [], stop, before=["ignore 1 3", "continue"], stdin="deep 5\n")
        assert found.names[:4] == ["main.deep"] * 4  # (a stack that grows begins again)
        assert found.ours == found.gdb
        assert found.by_frame_pointer
        assert found.end in ("complete", "no-unwind-info")


def test_without_tables_it_says_so(targets: Targets, tmp_path: Path) -> None:
    """By frame pointers as far as they go: through the program's, not through libc, which has none."""
    program = targets.build("stacks", "-O0", "-fno-omit-frame-pointer")
    found = compare(tmp_path, program, ["deep 5"], "*target_here", tables=False)
    own = [f for f in found.gdb if f[0] == str(program) and f != found.gdb[-1]]
    assert found.ours[: len(own)] == own
    assert found.by_frame_pointer
    assert found.end == "no-table-yet"
