"""Where a thread's ``errno`` is: what the C library's ``__errno_location`` computes, read from its few instructions.

They are the C library's promise to every program (LSB core, __errno_location), and have had one of these forms for decades
(glibc's csu/errno-loc.c, musl's src/errno/__errno_location.c, as compilers translate them).
"""

from __future__ import annotations

import re

from trapline_agent.capture.places import Memory, add, entry
from trapline_agent.plans import Here, Load, Op, Register, Value

CODE_BYTES = 32
_ENDBR = rb"(?:\xf3\x0f\x1e\xfa)?"
_THREAD = rb"\x64\x48\x8b\x04\x25\x00{4}"
"""mov %fs:0, %rax"""
_ADDED = rb"\x64\x48\x03\x04\x25\x00{4}\xc3"
"""add %fs:0, %rax; ret"""
_SHARED = re.compile(_ENDBR + rb"\x48\x8b\x05(.{4})" + _ADDED, re.DOTALL)
"""mov SLOT(%rip), %rax: the loader has written the distance there (R_X86_64_TPOFF64)."""
_STATIC = re.compile(_ENDBR + rb"\x48\xc7\xc0(.{4})" + _ADDED, re.DOTALL)
"""mov $DISTANCE, %rax"""
_OWN = re.compile(_ENDBR + _THREAD + rb"(?:\x48\x83\xc0(.)|\x48\x05(.{4}))\xc3", re.DOTALL)
"""add $DISTANCE, %rax"""


def errno_place(code: bytes, vaddr: int, probed: int, *, at_return: bool = False) -> Memory | None:
    """Returns where errno is when a probe of the same file is hit; None where the code is of another form.

    Args:
        code: of ``__errno_location``, ``CODE_BYTES`` or fewer.
        vaddr: its address, in the file.
        probed: the probed instruction's.
        at_return: the probe is one of a return: where the file is mapped is known from the entry's address.
    """
    thread = Register("fs_base")
    if found := _SHARED.match(code):
        slot = vaddr + found.end(1) + int.from_bytes(found[1], "little", signed=True)
        where: Value = Here(slot - probed)
        distance = Load(entry(where) if at_return else where, 0, 8)
        return Memory(Op("address", (Op("add", (thread, distance)),)))
    if found := _STATIC.match(code) or _OWN.match(code):
        digits = next(g for g in found.groups() if g is not None)
        return Memory(add(thread, int.from_bytes(digits, "little", signed=True)))
    return None
