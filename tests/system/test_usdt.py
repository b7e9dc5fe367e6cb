"""USDT probes of Debian's python3, whose places are skipped unless their semaphores are raised: by the program's own word,
and as bpftrace has them."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

from tests.support import needs
from tests.support.children import Child, run
from tests.system.stack import TRAPLINE, line_with

PYTHON = str(Path(needs.SYSTEM_PYTHON).resolve())
GENERATORS = """
def seven():
    yield 7
for _ in range(5):
    seven().close()
    sum(seven())
"""
AUDITED = "import sys\nfor i in range(7): sys.audit('shop.sold', i)"
ASKED = """
import os, sys
print('ready', flush=True)
for line in sys.stdin:
    for i in range(int(line)):
        sys.audit('shop.asked', i)
    print('called', flush=True)
"""


def traced(state: Path, probe: str, *argv: str) -> list[dict[str, object]]:
    """Traces a command, and returns the rows that are printed."""
    env = {"TRAPLINE_STATE_DIR": str(state)}
    done = run([*TRAPLINE, "trace", "--json", probe, "--", *argv], env=env, timeout=60)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@needs.ptrace
@needs.python_usdt
def test_r19_python_tells_of_its_audit_events(tmp_path: Path) -> None:
    rows = traced(tmp_path, f"usdt:{PYTHON}:python:audit {{event=str(arg0)}}", PYTHON, "-c", AUDITED)
    events = [row["args"]["event"] for row in rows if "args" in row]  # type: ignore[index]
    assert events.count("shop.sold") == 7
    assert {"compile", "exec"} <= set(events), "the interpreter's own"


@needs.ptrace
@needs.bpftrace
@needs.python_usdt
def test_r19_python_s_functions_are_those_that_bpftrace_sees(tmp_path: Path) -> None:
    """(Python 3.11 tells of few: of generators that are begun by being closed, for example.)"""
    script = tmp_path / "script.py"
    script.write_text(GENERATORS)
    program = f"usdt:{PYTHON}:python:function__entry {{ @[str(arg1), arg2] = count(); }}"
    theirs = run(["bpftrace", "-e", program, "-c", f"{PYTHON} {script}"], timeout=60).stdout
    seen = {(name, int(line)): int(n) for name, line, n in re.findall(r"@\[(.+), (\d+)\]: (\d+)", theirs)}
    probe = f"usdt:{PYTHON}:python:function__entry -> count() by (str(arg1), arg2)"
    (table,) = [row for row in traced(tmp_path / "state", probe, PYTHON, str(script)) if "rows" in row]
    ours = {tuple(row["key"]): row["count"] for row in table["rows"]}  # type: ignore[attr-defined]
    assert ours == seen
    assert ours["seven", 2] == 5


@needs.ptrace_any
@needs.python_usdt
def test_r19_a_python_that_runs_is_looked_at_and_left(tmp_path: Path) -> None:
    """Its semaphore is 0 again in the end: bpftrace and we would see nothing of its calls, and the program skips them."""
    with Child([PYTHON, "-c", ASKED]) as target:
        probe = f"usdt:{PYTHON}:python:audit @ pid={target.pid} if startswith(str(arg0), 'shop') {{event=str(arg0)}}"
        argv = [*TRAPLINE, "trace", "--json", "-n", "40", probe]
        with Child(argv, env={"TRAPLINE_STATE_DIR": str(tmp_path)}, ready=None, stderr=subprocess.STDOUT) as tracer:
            assert "armed in 1 process" in line_with(tracer, "armed")
            assert semaphore_of(target.pid, "audit") > 0
            target.ask("100")
            rows = [line_with(tracer, "shop.asked") for _ in range(40)]
            assert all('"event":"shop.asked"' in row for row in rows)
            tracer.wait()
        assert semaphore_of(target.pid, "audit") == 0
        target.ask("100")


def semaphore_of(pid: int, name: str) -> int:
    """Returns the semaphore of a probe in a process of Debian's Python, which is at the address that readelf says."""
    notes = subprocess.run(["readelf", "-n", PYTHON], capture_output=True, text=True, check=True).stdout
    found = re.search(rf"Name: {name}\s+Location: \w+, Base: \w+, Semaphore: (\w+)", notes)
    assert found is not None
    with open(f"/proc/{pid}/mem", "rb", 0) as memory:
        memory.seek(int(found[1], 16))
        return int.from_bytes(memory.read(2), "little")
