"""Where a typed value is when a probe is hit: in memory, or in pieces in registers; and how parts of it are fetched."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from trapline.errors import Unsupported
from trapline.protocol.hits import ValueStatus
from trapline_agent.arch.x86_64 import DWARF_REGISTERS
from trapline_agent.debuginfo.model import Location
from trapline_agent.plans import Bits, Const, Entry, Here, Load, Missing, Op, Register, Value, Xmm

WORD_BYTES = 8
_FIRST_XMM, _LAST_XMM = 17, 32
"""DWARF's numbers of xmm0 and xmm15: System V ABI, AMD64 supplement, figure 3.36."""
_FS_BASE = 58
"""The thread pointer, likewise."""
_ALL = 1 << 40
"""Bytes: more than any value has."""


@dataclass(frozen=True)
class Memory:
    """At ``base`` plus ``offset``."""

    base: Value
    offset: int = 0

    def part(self, offset: int) -> Memory:
        return replace(self, offset=self.offset + offset)

    def fetch(self, size: int, as_: str) -> Value:
        """Returns the fetch of a scalar of 1 to 8 bytes; ``as_`` as in ``plans.Load``."""
        return Load(self.base, self.offset, size, as_)

    def bits(self, shift: int, width: int, as_: str) -> Value:
        """Returns the fetch of a bit-field, ``shift`` bits above the lowest one."""
        skip, shift = divmod(shift, 8)
        size = (shift + width + 7) // 8
        if size > WORD_BYTES:
            raise Unsupported("a bit-field over nine bytes cannot be captured", reason="NotInThisRelease")
        return Bits(Load(self.base, self.offset + skip, size), shift, width, as_)

    def address(self) -> Value:
        """Returns where it is."""
        return add(self.base, self.offset)


@dataclass(frozen=True)
class Pieces:
    """In words: (byte of the value that it begins at, its bytes, the word)."""

    words: tuple[tuple[int, int, Value], ...]
    offset: int = 0

    def part(self, offset: int) -> Pieces:
        return replace(self, offset=self.offset + offset)

    def fetch(self, size: int, as_: str) -> Value:
        return self.bits(0, 8 * size, as_)

    def bits(self, shift: int, width: int, as_: str) -> Value:
        first = 8 * self.offset + shift
        for at, size, word in self.words:
            if 8 * at <= first and first + width <= 8 * (at + size):
                if isinstance(word, Missing) or (width == 64 and as_ == "u" and isinstance(word, Register | Load)):
                    return word
                return Bits(word, first - 8 * at, width, as_)
        return Missing(ValueStatus.UNSUPPORTED)

    def address(self) -> Value | None:
        return None


Place = Memory | Pieces


def in_word(word: Value) -> Pieces:
    """Returns the place of a scalar that a word holds."""
    return Pieces(((0, WORD_BYTES, word),))


def missing(status: ValueStatus) -> Pieces:
    """Returns the place of what cannot be had, and why."""
    return Pieces(((0, _ALL, Missing(status)),))


def entered(place: Place) -> Place:
    """Returns a place as it was known when the function was entered; what is in memory is read later."""
    if isinstance(place, Memory):
        return Memory(entry(place.base), place.offset)
    return Pieces(tuple((at, size, entry(word)) for at, size, word in place.words), place.offset)


def entry(value: Value) -> Value:
    """Returns a value as it was at the entry."""
    return value if isinstance(value, Const | Missing | Entry) else Entry(value)


def add(base: Value, distance: int) -> Value:
    """Returns an address and a distance from it."""
    if not distance:
        return base
    if isinstance(base, Here):
        return Here(base.distance + distance)
    return Op("address", (Op("add", (base, Const(distance))),))


def split(address: Value) -> tuple[Value, int]:
    """Undoes ``add``, so that reads around one address are seen to be such."""
    match address:
        case Op("address", (Op("add", (base, Const(distance))),)) | Op("add", (base, Const(distance))) if isinstance(
            distance, int
        ):
            return base, distance
    return address, 0


def register(number: int) -> Value:
    """Returns the register of DWARF's number."""
    if number < len(DWARF_REGISTERS):
        return Register(DWARF_REGISTERS[number])
    if number == _FS_BASE:
        return Register("fs_base")
    if _FIRST_XMM <= number <= _LAST_XMM:
        return Xmm(number - _FIRST_XMM)
    raise Unsupported(f"DWARF's register {number} cannot be captured", reason="NotInThisRelease")


def of_location(location: Location, vaddr: int) -> Place:
    """Returns the place that debug information tells of.

    Args:
        location: it.
        vaddr: the probed instruction's, in its file.
    """
    match location.kind:
        case "memory":
            return Memory(*split(_computed(location.ops, vaddr)))
        case "register":
            return in_word(register(location.ops[0][1]))
        case "value":
            return in_word(_computed(location.ops, vaddr))
        case "optimised-out":
            return missing(ValueStatus.OPTIMISED_OUT)
        case "unsupported":
            return missing(ValueStatus.UNSUPPORTED)
    return Pieces(tuple(_words(location.pieces, vaddr)))


def _words(pieces: Iterable[tuple[Location, int]], vaddr: int) -> Iterable[tuple[int, int, Value]]:
    at = 0
    for location, size in pieces:
        place = of_location(location, vaddr)
        if isinstance(place, Memory):
            for part in range(0, size, WORD_BYTES):
                length = min(WORD_BYTES, size - part)
                yield at + part, length, place.part(part).fetch(length, "u")
        else:
            yield at, size, place.words[0][2]
        at += size


_MAX_OPS = 64


def _computed(ops: Iterable[tuple[str, int]], vaddr: int) -> Value:
    """Returns what a postfix program computes (``debuginfo.model.Op``). Raises Unsupported where it is none."""
    stack: list[Value] = []
    try:
        for i, (op, n) in enumerate(ops):
            if i >= _MAX_OPS:
                raise Unsupported("the place of a variable takes too long to compute", reason="NotInThisRelease")
            match op:
                case "reg":
                    stack.append(register(n))
                case "const":
                    stack.append(Const(n))
                case "load":
                    stack.append(Here(n - vaddr))
                case "plus":
                    base, distance = split(stack.pop())
                    stack.append(add(base, distance + n))
                case "deref":
                    stack.append(Load(*split(stack.pop()), n))
                case "dup":
                    stack.append(stack[-1])
                case "drop":
                    stack.pop()
                case "swap":
                    stack[-1], stack[-2] = stack[-2], stack[-1]
                case "neg" | "not":
                    one = Op("neg" if op == "neg" else "invert", (stack.pop(),))
                    stack.append(Op("address", (one,)))
                case "add" | "sub" | "mul" | "and" | "or" | "xor" | "shl" | "shr" | "shra":
                    right, left = stack.pop(), stack.pop()
                    if op == "shra":
                        op, left = "shr", Bits(left, 0, 64, "i")
                    stack.append(Op("address", (Op(op, (left, right)),)))
                case _:
                    raise Unsupported(f"DWARF's operation `{op}` cannot be computed", reason="NotInThisRelease")
        return stack[-1]
    except IndexError:
        raise Unsupported(
            "the place of a variable is malformed in the debug information", reason="BadDebugInfo"
        ) from None
