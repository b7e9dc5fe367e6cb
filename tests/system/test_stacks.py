"""Stacks, from a probe's text to names on a screen."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

from tests.engines.host import untouched
from tests.support import needs
from tests.support.children import Child, run
from tests.support.targets import Targets
from tests.system.stack import Stack
from trapline.model import StackFrame

pytestmark = [needs.gcc, needs.ptrace_any, needs.x86_64]


def test_folded_stacks_of_a_command_from_its_first_call_on(targets: Targets, tmp_path: Path) -> None:
    """Tables are there before the command runs: no stack of it is cut off. The program itself says how often."""
    program = targets.build("stacks")
    command = [program, "deep 3", "sort", "deep 3", "signal", "count"]
    probe = f"{program}:target_here {{ustack()}}"
    result = run(
        [sys.executable, "-m", "trapline", "trace", "--folded", "-o", tmp_path / "folded", probe, "--", *command],
        env={"TRAPLINE_STATE_DIR": str(tmp_path / "state")},
    )
    assert result.returncode == 0, result.stderr
    (count,) = (line for line in result.stdout.splitlines() if line.startswith("count"))
    found: Counter[str] = Counter()
    for line in (tmp_path / "folded").read_text().splitlines():
        stack, _, hits = line.rpartition(" ")
        found[stack] += int(hits)
    assert f"here={found.total()} " in count
    assert not any("[" in stack for stack in found), found
    deep = [s for s in found if s.endswith("main;obey;target_down;target_down;target_down;target_here")]
    assert [found[s] for s in deep] == [2]
    assert all(stack.startswith("stacks;") for stack in found)
    assert any(s.endswith(";handler;target_here") and ";target_raise;" in s for s in found)
    assert list((tmp_path / "state" / "unwind").iterdir())


def test_folding_without_a_stack_is_refused() -> None:
    result = run([sys.executable, "-m", "trapline", "trace", "--folded", "libc.so.6:getppid"])
    assert result.returncode != 0
    assert "captures none" in result.stderr


@needs.root
def test_a_stack_over_the_service_is_named_when_it_is_read(targets: Targets) -> None:
    program = targets.build("stacks")
    with Stack() as stack, Child([program]) as child, untouched(child.pid):
        probe = stack.arm(f"{program}:target_here @ pid={child.pid} {{ustack(), caller, n=arg0}}")
        stack.armed(probe.id, child.pid)
        child.ask("deep 2")
        (hit,) = stack.recorded(probe.id, 1)
        frames = hit.stacks["ustack()"]
        names = stack.client.symbolize(hit.host, frames)
        assert [n for (n,) in names][:5] == ["target_here", "target_down", "target_down", "obey", "main"]
        assert hit.status == {}
        assert frames[0].path == str(program)
        assert frames[0].build_id
        assert hit.stacks["caller"] == frames[1:2]
        shown = stack.cli("hits", probe.name).stdout.splitlines()
        assert "caller=target_down" in shown[0]
        assert [line.strip() for line in shown[1:6]] == ["target_here", "target_down", "target_down", "obey", "main"]
        (as_json,) = (json.loads(line) for line in stack.cli("hits", probe.name, "--json").stdout.splitlines())
        assert as_json["stacks"]["caller"][0]["path"] == str(program)
        unknown = [StackFrame(path="/nowhere/lib.so", offset=16), StackFrame(path="", offset=3)]
        assert stack.client.symbolize(hit.host, unknown) == [["lib.so+0x10"], ["0x3"]]
        stack.client.delete_probe(probe.id)


BACKTRACES = """
import gdb, json
found = []
while gdb.selected_inferior().pid:
    frame, names = gdb.newest_frame(), []
    while frame is not None:
        at = frame.find_sal()
        inlined = " (inlined)" if frame.type() == gdb.INLINE_FRAME else ""
        names.append([frame.function().name.partition("(")[0] + inlined, f"{at.symtab.filename.split('/')[-1]}:{at.line}"])
        frame = frame.older()
    found.append(names)
    gdb.execute("continue")
print("FOUND " + json.dumps(found))
"""


def _gdbs(program: Path, script: Path) -> list[list[tuple[str, str]]]:
    """Returns the functions and lines of each stop at ``target_leaf``, up to main, as gdb has them."""
    script.write_text(BACKTRACES)
    says = ["set pagination off", "set debuginfod enabled off", "break target_leaf", "run", f"source {script}"]
    done = run(["gdb", "-nx", "-q", "-batch", *(x for say in says for x in ("-ex", say)), "--args", program, "x"])
    (found,) = (line for line in done.stdout.splitlines() if line.startswith("FOUND "))
    assert len(found) > 10, f"gdb made no backtrace: {done.stdout} {done.stderr}"
    return [[(name, at) for name, at in stop] for stop in json.loads(found.removeprefix("FOUND "))]


def _without_spaces(name: str) -> str:
    """``total<long int>`` as DWARF has it is ``total<long>`` at gdb."""
    return name.replace("<long int>", "<long>")


@needs.gdb
@needs.gxx
@needs.binutils
def test_inlined_functions_and_lines_are_gdbs(targets: Targets, tmp_path: Path) -> None:
    """In the file itself, and in a debug file beside a stripped one; names of C++ are demangled."""
    whole = targets.build_cxx("inlines")
    gdbs = _gdbs(whole, tmp_path / "backtraces.py")
    assert [len(stop) for stop in gdbs] == [5, 3], gdbs
    stripped = targets.copy(whole)
    for command in (
        ["objcopy", "--only-keep-debug", stripped, f"{stripped}.debug"],
        ["strip", "--strip-debug", stripped],
        ["objcopy", f"--add-gnu-debuglink={stripped}.debug", stripped],
    ):
        assert run(command).returncode == 0
    bare = targets.copy(whole)
    assert run(["strip", "--strip-debug", "--remove-section=.note.gnu.build-id", bare]).returncode == 0
    state = {"TRAPLINE_STATE_DIR": str(tmp_path / "state")}
    for program in (whole, stripped, bare):
        argv = [sys.executable, "-m", "trapline", "trace"]
        traced = run([*argv, f"{program}:target_leaf {{ustack()}}", "--", program, "x"], env=state)
        assert traced.returncode == 0, traced.stderr
        ours: list[list[tuple[str, str]]] = []
        for line in traced.stdout.splitlines():
            if not line.startswith(" "):
                ours.append([])
                continue
            name, _, at = _without_spaces(line.strip()).partition(" at ")
            if ("main", "") not in [(n, "") for n, _ in ours[-1]]:
                ours[-1].append((name, at))
        if program is bare:
            assert ours == [[(n, "") for n, _ in stop if "inlined" not in n] for stop in gdbs]
            continue
        for mine, theirs in zip(ours, gdbs, strict=True):
            assert [n for n, _ in mine] == [n for n, _ in theirs]
            # A place has one line, the innermost function's. The probe is at the first instruction, gdb stops behind it.
            assert {at for _, at in mine[1:] if at} <= {at for _, at in theirs}
            assert all(at for (n, at), (before, _) in zip(mine[1:], mine, strict=False) if "inlined" not in before)
        counted = run([*argv, f"{program}:target_leaf -> count() by (ustack(4))", "--", program, "x"], env=state)
        assert "    shop::twice (inlined)\n    shop::pay\n" in counted.stdout
