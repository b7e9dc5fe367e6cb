"""The oracle: gdb's own backtrace of a program that it has stopped, and, at that very stop, ours."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.children import run

_SCRIPT = """
import gdb, json
names = "r15 r14 r13 r12 rbp rbx r11 r10 r9 r8 rax rcx rdx rsi rdi rip rsp".split()
frame = gdb.newest_frame()
registers = {n: int(frame.read_register(n)) % (1 << 64) for n in names}
frames = []
while frame is not None and frame.is_valid():
    # What is inlined or was left by a tail call is not on the stack; Go's outermost frame returns to 0.
    if frame.type() not in (gdb.INLINE_FRAME, gdb.TAILCALL_FRAME) and frame.pc():
        frames.append([frame.pc(), frame.name() or "", frame.type() == gdb.SIGTRAMP_FRAME])
    frame = frame.older()
out = {"pid": gdb.selected_inferior().pid, "registers": registers, "gdb": frames, "tables": TABLES}
with open(f"/proc/{out['pid']}/maps") as maps:
    out["maps"] = maps.read()
with open(FILE, "w") as file:
    json.dump(out, file)
"""


@dataclass
class Compared:
    """Two backtraces of one stop, innermost first, as (path, file offset of the instruction or of the call's last byte)."""

    gdb: list[tuple[str, int]]
    names: list[str]
    """gdb's."""
    ours: list[tuple[str, int]]
    end: str
    by_frame_pointer: bool
    raw: dict[str, Any]


def compare(
    tmp: Path,
    program: Path,
    args: Sequence[str],
    stop: str,
    *,
    before: Sequence[str] = (),
    tables: bool = True,
    stdin: str = "",
) -> Compared:
    """Runs a program under gdb up to a breakpoint, and takes both backtraces there.

    Args:
        tmp: a directory.
        program: with its arguments ``args``.
        stop: where: what gdb's ``break`` takes.
        before: further gdb commands at the stop.
        tables: whether ours has unwind tables.
        stdin: what the program reads.
    """
    file, script = tmp / "stack.json", tmp / "stack.py"
    file.unlink(missing_ok=True)
    script.write_text(_SCRIPT.replace("FILE", repr(str(file))).replace("TABLES", str(tables)))
    commands = [
        *("set pagination off", "set confirm off", "set backtrace past-main on", "set backtrace past-entry on"),
        *("set backtrace limit unlimited", "set breakpoint pending on", "set debuginfod enabled off"),
        *("handle SIGUSR1 SIGSEGV SIGURG nostop noprint pass", f"break {stop}", "run"),
        *before,
        *(f"source {script}", f"shell {sys.executable} -m tests.unwind.there {file}", "kill"),
    ]
    says = [x for command in commands for x in ("-ex", command)]
    result = run(["gdb", "-nx", "-q", "-batch", *says, "--args", program, *args], stdin=stdin)
    assert file.exists(), f"gdb made no backtrace: {result.stdout} {result.stderr}"
    raw = json.loads(file.read_text())
    assert "frames" in raw, f"ours failed: {result.stdout} {result.stderr}"
    regions = _regions(raw["maps"])
    theirs: list[tuple[str, int]] = []
    exact = True
    for pc, _, is_signal in raw["gdb"]:
        theirs.append(_place(regions, pc if exact or is_signal else pc - 1))
        exact = is_signal
    names = [name for _, name, _ in raw["gdb"]]
    ours = [(path, offset) for path, offset in raw["frames"]]
    return Compared(theirs, names, ours, raw["end"], raw["by_frame_pointer"], raw)


def _regions(maps: str) -> list[tuple[int, int, int, str]]:
    found = []
    for line in maps.splitlines():
        span, _, offset, _, inode, *path = line.split(None, 5)
        start, end = (int(part, 16) for part in span.split("-"))
        name = path[0] if path else ""
        found.append((start, end, int(offset, 16) if inode != "0" else 0, name))
    return found


def _place(regions: list[tuple[int, int, int, str]], pc: int) -> tuple[str, int]:
    for start, end, offset, path in regions:
        if start <= pc < end:
            return path, pc - start + offset
    return "", pc
