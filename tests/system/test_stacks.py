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
