"""Walks the stack of a thread that somebody else has stopped: ``python -m tests.unwind.there FILE``.

FILE is JSON: ``pid`` and ``registers``; the walker's frames go into it, as [path, offset] pairs.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path

from trapline.protocol.stacks import MAX_DEPTH, numbers_of, unpack
from trapline_agent.arch.x86_64.registers import REGISTERS
from trapline_agent.unwind.tables import Tables
from trapline_agent.unwind.walk import NewFile, Stacks


def provide(stacks: Stacks, wanted: list[NewFile], maker: Tables) -> None:
    """Makes what is asked for, and hands it over."""
    while wanted:
        new = wanted.pop()
        made = maker.make(new)
        assert made is not None, new
        stacks.add(new.file, made.build_id, made.data)


def main(path: Path) -> None:
    given = json.loads(path.read_text())
    wanted: list[NewFile] = []
    stacks, maker = Stacks(wanted.append), Tables()
    words = [int(given["registers"].get(name, 0)) for name in REGISTERS]
    memory = os.open(f"/proc/{given['pid']}/mem", os.O_RDONLY)
    with contextlib.closing(os.fdopen(memory, "rb")):
        if given.get("tables", True):
            stacks.walk(given["pid"], words, memory, 1)
            provide(stacks, wanted, maker)
        packed = stacks.walk(given["pid"], words, memory, MAX_DEPTH)
    stack = unpack(packed, {n: stacks.file(n) for n in numbers_of(packed)})
    given["frames"] = [[f.file.path, f.offset] for f in stack.frames]
    given["end"] = stack.end.text
    given["by_frame_pointer"] = stack.by_frame_pointer
    path.write_text(json.dumps(given))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
