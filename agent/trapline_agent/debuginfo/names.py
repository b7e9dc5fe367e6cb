"""Names: how they are compared, and how entries are found by bytes that occur in them. See ``reader``."""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from typing import Final

import numpy as np
import numpy.typing as npt

from trapline_agent.debuginfo.libdw import Die, Memory

_MAX_CHAIN: Final = 64
_CHUNK: Final = 4 << 20
_FEW: Final = 8
"""So many numbers are looked for one after the other."""


def find_words(memory: Memory, words: list[int]) -> Iterator[int]:
    """Yields the offsets, ascending, of 4-byte numbers that are among some."""
    if len(words) <= _FEW:
        yield from sorted(at for word in words if word < 1 << 32 for at in memory.find(word.to_bytes(4, "little")))
        return
    wanted = np.array(sorted(w for w in words if w < 1 << 32), np.uint32)
    for start in range(0, memory.size, _CHUNK) if len(wanted) else ():
        data = memory.bytes(start, _CHUNK + 3)
        hits: list[npt.NDArray[np.intp]] = []
        for shift in range(4):
            count = (min(len(data), _CHUNK + shift) - shift) // 4
            numbers = np.frombuffer(data, "<u4", count=count, offset=shift) if count > 0 else wanted[:0]
            near = np.minimum(np.searchsorted(wanted, numbers), len(wanted) - 1)
            hits.append(np.flatnonzero(wanted[near] == numbers) * 4 + shift)
        yield from (np.sort(np.concatenate(hits)) + start).tolist()


def holding(parent: Die, places: list[int], chain: list[Die]) -> Iterator[list[Die]]:
    """Yields the chain of entries that each place is in; all are behind the beginning of ``parent``, ascending."""
    if len(chain) > _MAX_CHAIN:
        return
    child = parent.child()
    at = bisect.bisect_left(places, child.offset) if child is not None else len(places)
    if at:
        yield chain
    while child is not None and at < len(places):
        following = child.sibling()
        end = following.offset if following is not None else places[-1] + 1
        stop = bisect.bisect_left(places, end, at)
        if stop > at:
            yield from holding(child, places[at:stop], [*chain, child])
        at, child = stop, following


def descendants(die: Die, depth: int) -> Iterator[Die]:
    for child in die.children():
        yield child
        if depth < _MAX_CHAIN:
            yield from descendants(child, depth + 1)


def last(name: str) -> str:
    """Returns the last component of a C++ or Rust name; what is in angle brackets or parentheses is no component."""
    depth = 0
    for i in range(len(name) - 1, 0, -1):
        depth += (name[i] in ">)") - (name[i] in "<(")
        if not depth and name[i - 1 : i + 1] == "::":
            return name[i + 1 :]
    return name


def is_called(asked: str, qualified: str, linkage: str) -> bool:
    return any(asked in (name, linkage) or name.endswith("::" + asked) for name in (qualified, plain(qualified)))


def plain(name: str) -> str:
    """Returns a C++ or Rust name without its template arguments."""
    if "operator" in name:
        return name
    depth, kept = 0, []
    for letter in name:
        depth += letter == "<"
        if not depth:
            kept.append(letter)
        depth -= letter == ">" and depth > 0
    return "".join(kept)
