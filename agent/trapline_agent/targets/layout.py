"""Where in a process' address space there is room that nobody else is likely to want, from /proc/PID/maps.

What must stay free: the way of the heap up (brk(2)), that of a stack down as far as its limit lets it go
(arch/x86/mm/mmap.c keeps the same for it: mmap_base), some room beside every mapping (mremap grows in place, a
MAP_GROWSDOWN stack keeps 256 pages of guard, mm/mmap.c: stack_guard_gap), and the first page and what follows it.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from typing import Final, NamedTuple

CLEAR: Final = 1 << 20
"""Bytes that stay free on both sides."""
_HEAP_ROOM: Final = 1 << 40
_STACK_ROOM: Final = 128 << 20
"""At least; the kernel's own MIN_GAP."""
_LOWEST: Final = 1 << 16
"""vm.mmap_min_addr as it usually is."""
_TASK_END: Final = 0x7FFF_FFFF_F000
_PAGE: Final = 4096
_LINE = re.compile(rb"^([0-9a-f]+)-([0-9a-f]+) (....) [0-9a-f]+ [0-9a-f]+:[0-9a-f]+ ([0-9]+)[ ]*(.*)$", re.MULTILINE)


class Span(NamedTuple):
    start: int
    end: int
    prot: str
    inode: int
    name: bytes


def spans(text: bytes) -> list[Span]:
    """Returns all mappings of a maps text, by address."""
    return [
        Span(int(start, 16), int(end, 16), prot.decode(), int(inode), name)
        for start, end, prot, inode, name in (m.groups() for m in _LINE.finditer(text))
    ]


def places(mapped: list[Span], near: int, size: int, reach: int, *, start_brk: int, stack_limit: int) -> list[int]:
    """Returns addresses where ``size`` bytes could be mapped, the nearest first.

    Args:
        mapped: all mappings.
        near: the address that they are for.
        size: bytes, whole pages.
        reach: how far from ``near`` either end may be.
        start_brk: where the heap begins or will (proc_pid_stat(5), field 47); 0 where that is not known.
        stack_limit: RLIMIT_STACK, bytes; below 0 for none.
    """
    found = []
    for start, end in _gaps(mapped, start_brk, stack_limit):
        first, last = start + CLEAR, (end - CLEAR - size) // _PAGE * _PAGE
        at = min(max(near // _PAGE * _PAGE, first), last)
        if first <= at <= last and near - reach <= at and at + size <= near + reach:
            found.append(at)
    return sorted(found, key=lambda at: abs(at - near))


def _gaps(mapped: list[Span], start_brk: int, stack_limit: int) -> Iterator[tuple[int, int]]:
    taken = [(0, _LOWEST), *((s.start, s.end) for s in mapped), (_TASK_END, _TASK_END)]
    if start_brk:
        taken.append((start_brk, start_brk + _HEAP_ROOM))
    for span in mapped:
        if span.name == b"[heap]":
            taken.append((span.start, span.end + _HEAP_ROOM))
        elif span.name == b"[stack]":
            room = _HEAP_ROOM if stack_limit < 0 else min(max(stack_limit, _STACK_ROOM), _HEAP_ROOM)
            taken.append((max(span.end - room, 0), span.end))
    taken.sort()
    ends = itertools.accumulate((end for _, end in taken), max)
    for end, (start, _) in zip(ends, taken[1:], strict=False):
        if end < start <= _TASK_END:
            yield end, start
