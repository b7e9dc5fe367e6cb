"""Where arguments are at a function's first instruction, and results after it: by the declared types alone.

System V ABI, AMD64 supplement, 3.2.3, for C and C++; Rust's own calling convention as far as it is the same (scalars, and
pairs such as ``&str``); Go's results (go/src/cmd/compile/abi-internal.md). What is passed otherwise is told from debug
information, or not at all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import count

from trapline.protocol.hits import ValueStatus
from trapline_agent.arch.x86_64 import ARGUMENT_REGISTERS, GO_REGISTERS, RESULT_REGISTERS
from trapline_agent.capture.places import WORD_BYTES, Memory, Pieces, Place, missing
from trapline_agent.debuginfo.model import Language, Type, TypeRef
from trapline_agent.plans import Register, Value, Xmm

TypeOf = Callable[[TypeRef], Type]
Leaf = tuple[int, int, bool]
"""A scalar in a value: offset and size in bytes, is it a floating-point number."""
_MAX_LEAVES = 64
_MAX_DEPTH = 16
_MAX_VISITED = 4096
_IN_REGISTERS_BYTES = 16
_SSE_ARGUMENTS = 8
_RETURN_ADDRESS_BYTES = 8


class _NotByRegisters(Exception):
    pass


def leaves(type_: Type, type_of: TypeOf) -> list[Leaf] | None:
    """Returns the scalars that a value is made of; None where it has no such parts, or too many."""
    try:
        found = []
        for leaf in _leaves(type_, type_of, 0, 0, count(_MAX_VISITED, -1)):
            found.append(leaf)
            if len(found) > _MAX_LEAVES:
                return None
        return found
    except _NotByRegisters:
        return None


def _leaves(type_: Type, type_of: TypeOf, at: int, depth: int, left: Iterator[int]) -> Iterator[Leaf]:
    """``left`` counts down what may still be looked at: types that contain one another without end do no harm."""
    if depth > _MAX_DEPTH or not next(left):
        raise _NotByRegisters
    match type_.kind:
        case "base" if type_.encoding == "complex":
            half = type_.size // 2
            yield at, half, True
            yield at + half, half, True
        case "base" if type_.size:
            yield at, type_.size, type_.encoding == "float"
        case "base":
            pass  # Rust's ()
        case "enum":
            yield at, type_.size, False
        case "pointer" | "reference":
            yield at, WORD_BYTES, False
        case "struct" | "class" | "union":
            for member in type_.members:
                yield from _leaves(type_of(member.type), type_of, at + member.offset, depth + 1, left)
        case "array" if type_.target is not None and all(type_.counts):
            element = type_of(type_.target)
            for i in range(min(math.prod(type_.counts), _MAX_LEAVES + 1)):
                yield from _leaves(element, type_of, at + i * element.size, depth + 1, left)
        case "variant" if type_.size == WORD_BYTES and _is_niche(type_, type_of, depth, left):
            yield at, WORD_BYTES, False
        case _:
            raise _NotByRegisters


def _is_niche(type_: Type, type_of: TypeOf, depth: int, left: Iterator[int]) -> bool:
    """Whether a Rust enum is passed as the one pointer that a variant holds: ``Option<&T>``, ``Option<Box<T>>``."""
    parts = [
        list(_leaves(type_of(m.type), type_of, m.offset, depth + 1, left))
        for m in type_.members
        if m.name != "(discriminant)"
    ]
    return [p for p in parts if p] == [[(0, WORD_BYTES, False)]]


def classes(type_: Type, type_of: TypeOf, language: Language) -> list[tuple[int, int, bool]] | None:
    """Returns the words that a value is passed in: (offset, bytes, is it in a floating-point register); None: in memory.

    Rust passes pairs of scalars one by one, where C packs them into eightbytes.
    """
    found = leaves(type_, type_of)
    if found is None or not type_.size:
        return None
    if language == "rust" and len(found) <= 2:
        return found if all(size <= WORD_BYTES for _, size, _ in found) else None
    if type_.size > _IN_REGISTERS_BYTES:
        return None
    words: list[bool | None] = [None] * (-(-type_.size // WORD_BYTES))
    for at, size, is_float in found:
        if at % min(size, WORD_BYTES) or (is_float and size > WORD_BYTES):
            return None  # packed; x87
        for word in range(at // WORD_BYTES, (at + size - 1) // WORD_BYTES + 1):
            words[word] = is_float and words[word] is not False
    return [(i * WORD_BYTES, WORD_BYTES, bool(is_float)) for i, is_float in enumerate(words)]


def arguments(
    types: Sequence[Type | None], type_of: TypeOf, language: Language, by_reference: Sequence[bool], *, hidden: bool
) -> list[Place]:
    """Returns where arguments are at the first instruction.

    Args:
        types: theirs, in order; None where it is not known.
        type_of: reads a type.
        language: of the function.
        by_reference: for each whether a pointer to it is passed in its place (C++ classes that cannot be copied plainly).
        hidden: whether the result is written to memory, whose address comes first.
    """
    general = [Register(r) for r in ARGUMENT_REGISTERS][1 if hidden else 0 :]
    floating = [Xmm(i) for i in range(_SSE_ARGUMENTS)]
    stack = _RETURN_ADDRESS_BYTES
    places: list[Place] = []
    lost = False
    for type_, reference in zip(types, by_reference, strict=True):
        if lost or type_ is None:
            lost = True
            places.append(missing(ValueStatus.UNSUPPORTED))
            continue
        words = [(0, WORD_BYTES, False)] if reference else classes(type_, type_of, language)
        if words is None and language == "rust":
            lost = True  # by a pointer, or not: it depends on more than the type
            places.append(missing(ValueStatus.UNSUPPORTED))
            continue
        n_floating = sum(is_float for _, _, is_float in words or ())
        n_general = len(words or ()) - n_floating
        if words is None or n_general > len(general) or n_floating > len(floating):
            size = WORD_BYTES if reference else type_.size
            if type_.kind == "base" and type_.size == 2 * WORD_BYTES:
                stack += (stack - _RETURN_ADDRESS_BYTES) % (2 * WORD_BYTES)  # aligned, as the stack is before the call
            at = Memory(Register("rsp"), stack)
            places.append(Memory(at.fetch(WORD_BYTES, "u")) if reference else at)
            stack += -(-size // WORD_BYTES) * WORD_BYTES
            continue
        taken = _taken(words, general, floating)
        places.append(Memory(taken.words[0][2]) if reference else taken)
    return places


def _taken(words: Sequence[tuple[int, int, bool]], general: list[Register], floating: list[Xmm]) -> Pieces:
    def take(is_float: bool) -> Value:
        return floating.pop(0) if is_float else general.pop(0)

    return Pieces(tuple((at, size, take(is_float)) for at, size, is_float in words))


def in_memory(type_: Type, type_of: TypeOf, language: Language) -> bool:
    """Whether a result is written to where the caller said."""
    if type_.kind == "base":
        return False
    return classes(type_, type_of, language) is None


def result(type_: Type, type_of: TypeOf, language: Language) -> Place:
    """Returns where a function's result is when it has returned."""
    if language == "go":
        found = leaves(type_, type_of)
        if found is None or len(found) > len(GO_REGISTERS):
            return missing(ValueStatus.UNSUPPORTED)
        return _taken(found, [Register(r) for r in GO_REGISTERS], [Xmm(i) for i in range(15)])
    words = classes(type_, type_of, language)
    if words is None:
        if language == "rust" or type_.kind == "base":
            return missing(ValueStatus.UNSUPPORTED)  # x87 too
        return Memory(Register(RESULT_REGISTERS[0]))
    return _taken(words, [Register(r) for r in RESULT_REGISTERS], [Xmm(0), Xmm(1)])
