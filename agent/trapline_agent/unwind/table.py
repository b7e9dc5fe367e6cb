"""The unwind table of one file: how a caller's registers are found, by file offset; made by ``eh_frame``, used by ``walk``.

A row holds from its offset to the next row's. Few rules serve many rows, so a row is two numbers: 8 bytes, or some 200 kB
for libc. Registers go by DWARF's numbers (System V ABI, AMD64 supplement, figure 3.36); 16 is the return address.

Encoded, all little-endian, for the cache on disk and the way to the tracer::

    4s magic  u32 rows  u32 rules  u32 ints  u32 crc32 of what follows
    u32 starts[rows]  u32 which[rows]  u32 lengths[rules]  i32 ints[ints]: the rules, one after the other
"""

from __future__ import annotations

import struct
import zlib
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from trapline.errors import ProtocolError

MAGIC = b"TLU1"
"""With the format's version: a table of another one is made anew."""
RBP, RSP, RA = 6, 7, 16
MAX_ROWS = 4_000_000
_HEAD = struct.Struct("<4sIIII")
_MAX_RULES = 1 << 20
_MAX_INTS = 1 << 24
_FIXED = 5
_EACH = 4


class Cfa(IntEnum):
    """How the canonical frame address is found: the stack pointer as it is when the function has returned."""

    NONE = 0
    """Nothing is known of this code."""
    REGISTER = 1
    """register + offset"""
    DEREF = 2
    """the word at register + offset, + extra"""
    PLT = 3
    """register + offset + 8 * ((pc & 15) >= extra): an entry of a PLT pushes a number on the way."""
    UNSUPPORTED = 4
    """By an expression that is none of these."""


class At(IntEnum):
    """Where the caller's value of a register is."""

    CFA = 1
    """In the word at CFA + offset."""
    CFA_VALUE = 2
    """It is CFA + offset."""
    REGISTER = 3
    """In the word at (other register) + offset."""
    REGISTER_VALUE = 4
    """It is (other register) + offset."""
    UNDEFINED = 5
    """Nowhere; of the return address: this is the outermost frame."""
    UNSUPPORTED = 6


class Place(NamedTuple):
    """One register's rule; one that has none keeps its value (the stack pointer's is the CFA)."""

    register: int
    at: At
    other: int = 0
    offset: int = 0


class Rule(NamedTuple):
    """What holds for a stretch of code."""

    cfa: Cfa
    register: int = 0
    offset: int = 0
    extra: int = 0
    signal: bool = False
    """The code is a signal's trampoline: its caller was interrupted, not called."""
    places: tuple[Place, ...] = ()


NO_RULE = Rule(Cfa.NONE)


class UnwindTable:
    """Immutable; any thread may ask."""

    def __init__(self, starts: npt.NDArray[np.uint32], which: npt.NDArray[np.uint32], rules: Sequence[Rule]) -> None:
        """
        Args:
            starts: file offsets, strictly ascending.
            which: of each row, the index of its rule.
            rules: different ones.
        """
        self.starts = array("I", starts.astype("=u4").tobytes())  # bisect is several times faster on it than on numpy's
        self.which = array("I", which.astype("=u4").tobytes())
        self.rules = tuple(rules)

    def __len__(self) -> int:
        return len(self.starts)

    def at(self, offset: int) -> Rule:
        """Returns the rule for the instruction at a file offset; ``NO_RULE`` where none is known."""
        i = bisect_right(self.starts, offset) - 1
        return self.rules[self.which[i]] if i >= 0 else NO_RULE

    def encode(self) -> bytes:
        """Returns the table as the module says."""
        flat = [_flatten(rule) for rule in self.rules]
        body = b"".join(
            (
                np.asarray(self.starts, "<u4").tobytes(),
                np.asarray(self.which, "<u4").tobytes(),
                np.asarray([len(f) for f in flat], "<u4").tobytes(),
                np.asarray([n for f in flat for n in f], "<i4").tobytes(),
            )
        )
        ints = sum(map(len, flat))
        return _HEAD.pack(MAGIC, len(self), len(flat), ints, zlib.crc32(body)) + body


EMPTY = UnwindTable(np.empty(0, np.uint32), np.empty(0, np.uint32), ())
"""Of a file that says nothing."""


def decode(data: bytes) -> UnwindTable:
    """Reads an encoded table. Raises ProtocolError where it is none, or contradicts itself."""
    if len(data) < _HEAD.size:
        raise ProtocolError(f"an unwind table of {len(data)} bytes is shorter than its header")
    magic, rows, count, ints, crc = _HEAD.unpack_from(data)
    if magic != MAGIC:
        raise ProtocolError(f"not an unwind table of this release: it begins with {magic!r}")
    if rows > MAX_ROWS or count > _MAX_RULES or ints > _MAX_INTS:
        raise ProtocolError(f"an unwind table of {rows} rows, {count} rules and {ints} numbers is too large")
    if len(data) != _HEAD.size + 8 * rows + 4 * count + 4 * ints or zlib.crc32(data[_HEAD.size :]) != crc:
        raise ProtocolError("an unwind table is cut off or damaged")
    numbers = np.frombuffer(data, "<u4", -1, _HEAD.size)
    starts, which, lengths, rest = np.split(numbers, (rows, 2 * rows, 2 * rows + count))
    if (starts[1:] <= starts[:-1]).any() or (which >= count).any() or int(lengths.sum(dtype=np.uint64)) != ints:
        raise ProtocolError("an unwind table is not in order")
    values = rest.view("<i4").tolist()
    rules, at = [], 0
    for length in lengths.tolist():
        rules.append(_rule(values[at : at + length]))
        at += length
    return UnwindTable(starts, which, rules)


def _flatten(rule: Rule) -> list[int]:
    flat = [int(rule.cfa), rule.register, rule.offset, rule.extra, int(rule.signal)]
    for place in rule.places:
        flat += (place.register, int(place.at), place.other, place.offset)
    return flat


def _rule(flat: Sequence[int]) -> Rule:
    try:
        cfa, register, offset, extra, signal = flat[:_FIXED]
        rest = flat[_FIXED:]
        places = tuple(Place(rest[i], At(rest[i + 1]), rest[i + 2], rest[i + 3]) for i in range(0, len(rest), _EACH))
        rule = Rule(Cfa(cfa), register, offset, extra, bool(signal), places)
    except (ValueError, IndexError) as e:
        raise ProtocolError(f"a rule of an unwind table is malformed: {e}") from e
    if not all(0 <= r <= RA for r in (register, *(p.register for p in places), *(p.other for p in places))):
        raise ProtocolError("a rule of an unwind table names a register that there is not")
    return rule
