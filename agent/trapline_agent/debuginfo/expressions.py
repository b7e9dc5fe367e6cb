"""DWARF expressions, made into locations: DWARF 5, sections 2.5 and 2.6.

Straight programs alone: an expression that branches is none that a compiler writes for a variable.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol

from trapline_agent.debuginfo.model import Location, Op

WORD: Final = 8
_MAX_OPS: Final = 256
_ADDR, _DEREF, _CONST1U, _CONSTS = 0x03, 0x06, 0x08, 0x11
_DUP, _DROP, _SWAP, _PLUS_UCONST = 0x12, 0x13, 0x16, 0x23
_LIT0, _LIT31, _REG0, _REG31, _BREG0, _BREG31 = 0x30, 0x4F, 0x50, 0x6F, 0x70, 0x8F
_REGX, _FBREG, _BREGX, _PIECE, _DEREF_SIZE, _NOP = 0x90, 0x91, 0x92, 0x93, 0x94, 0x96
_TLS, _CALL_FRAME_CFA, _BIT_PIECE, _IMPLICIT_VALUE, _STACK_VALUE = 0x9B, 0x9C, 0x9D, 0x9E, 0x9F
_ADDRX, _CONSTX, _GNU_TLS, _GNU_UNINIT = 0xA1, 0xA2, 0xE0, 0xF0
_GNU_ADDR_INDEX, _GNU_CONST_INDEX = 0xFB, 0xFC
_SIGNED_CONSTANTS: Final = frozenset((0x09, 0x0B, 0x0D, 0x0F, 0x11))
_ARITHMETIC: Final = {
    0x1A: "and",
    0x1C: "sub",
    0x1E: "mul",
    0x1F: "neg",
    0x20: "not",
    0x21: "or",
    0x22: "add",
    0x24: "shl",
    0x25: "shr",
    0x26: "shra",
    0x27: "xor",
    _DUP: "dup",
    _DROP: "drop",
    _SWAP: "swap",
}
_GONE: Final = frozenset((0xA0, 0xA3, 0xF2, 0xF3, 0xFA, 0xFD))
"""implicit_pointer, entry_value, the GNU ones of both, GNU_parameter_ref, GNU_variable_value: what they say must be had from
a caller's frame, or is no longer anywhere."""
_TYPED: Final = frozenset((0xA4, 0xA5, 0xA6, 0xA7, 0xA8, 0xA9, 0xF4, 0xF5, 0xF6, 0xF7, 0xF9))

_FS_BASE: Final = 58
"""DWARF's number of the thread pointer: System V ABI, AMD64 supplement, figure 3.36."""

OPTIMISED_OUT: Final = Location("optimised-out")


class Step(Protocol):
    """One operation, decoded."""

    @property
    def atom(self) -> int: ...
    @property
    def number(self) -> int: ...
    @property
    def number2(self) -> int: ...


class Frame(Protocol):
    """What an expression may refer to."""

    def frame_base(self) -> Location:
        """Where DW_OP_fbreg counts from."""

    def cfa(self) -> tuple[Op, ...] | None:
        """The canonical frame address; None where no frame information covers the place."""

    def indexed(self, step: Step) -> int | None:
        """The address or constant of an operation that has its index."""

    def thread_block(self) -> int | None:
        """How far below the thread pointer the file's thread-local variables begin; None where the loader decides it."""

    def implicit(self, step: Step) -> bytes:
        """The bytes of a DW_OP_implicit_value."""


class _Unsupported(Exception):
    pass


class _Gone(Exception):
    pass


def location(steps: Sequence[Step], frame: Frame) -> Location:
    """Returns what an expression says; it never fails: what cannot be told has a kind of its own."""
    if not steps:
        return OPTIMISED_OUT
    if len(steps) > _MAX_OPS:
        return Location("unsupported", reason=f"an expression of {len(steps)} operations")
    try:
        return _Program(frame).run(steps)
    except _Gone:
        return Location("optimised-out", reason="only a caller's frame has it")
    except _Unsupported as e:
        return Location("unsupported", reason=str(e))


def constant(data: bytes) -> Location:
    """Returns the location of bytes that are nowhere: the value itself, in words where it is longer than one."""
    if len(data) <= WORD:
        return Location("value", (("const", int.from_bytes(data, "little")),))
    words = (data[i : i + WORD] for i in range(0, len(data), WORD))
    return Location("pieces", pieces=tuple((constant(word), len(word)) for word in words))


def signed(value: int) -> int:
    """Returns a 64-bit word as the signed number that it stands for."""
    return value - (1 << 64) if value >> 63 else value


class _Program:
    """One run over an expression; ``_ops`` is what has been translated since the last piece."""

    def __init__(self, frame: Frame) -> None:
        self._frame = frame
        self._ops: list[Op] = []
        self._done: Location | None = None
        """What the operations so far make, where they are no address."""
        self._pieces: list[tuple[Location, int]] = []

    def run(self, steps: Sequence[Step]) -> Location:
        for step in steps:
            self._step(step)
        if self._pieces:
            if self._ops or self._done:
                raise _Unsupported("an expression with something behind its last piece")
            return Location("pieces", pieces=tuple(self._pieces))
        return self._take()

    def _take(self) -> Location:
        """Returns what was computed since the last piece."""
        made = self._done or (Location("memory", tuple(self._ops)) if self._ops else OPTIMISED_OUT)
        self._ops, self._done = [], None
        return made

    def _step(self, step: Step) -> None:
        atom, number = step.atom, step.number
        if self._done is not None and atom not in (_PIECE, _BIT_PIECE, _NOP, _GNU_UNINIT):
            raise _Unsupported("an expression that goes on behind its result")
        if atom in _ARITHMETIC:
            self._ops.append((_ARITHMETIC[atom], 0))
        elif _BREG0 <= atom <= _BREG31:
            self._based(("reg", atom - _BREG0), signed(number))
        elif atom == _FBREG:
            self._frame_based(signed(number))
        elif _REG0 <= atom <= _REG31:
            self._register(atom - _REG0)
        elif _LIT0 <= atom <= _LIT31:
            self._ops.append(("const", atom - _LIT0))
        elif _CONST1U <= atom <= _CONSTS:
            self._ops.append(("const", signed(number) if atom in _SIGNED_CONSTANTS else number))
        elif atom in (_PIECE, _BIT_PIECE):
            self._piece(step)
        elif atom in (_NOP, _GNU_UNINIT):
            pass
        else:
            self._other(step)

    def _other(self, step: Step) -> None:
        atom, number = step.atom, step.number
        if atom == _ADDR:
            self._ops.append(("load", number))
        elif atom in (_ADDRX, _GNU_ADDR_INDEX, _CONSTX, _GNU_CONST_INDEX):
            found = self._frame.indexed(step)
            if found is None:
                raise _Unsupported("an address by its index, which leads nowhere")
            self._ops.append(("load" if atom in (_ADDRX, _GNU_ADDR_INDEX) else "const", found))
        elif atom == _DEREF:
            self._ops.append(("deref", WORD))
        elif atom == _DEREF_SIZE:
            if not 1 <= number <= WORD:
                raise _Unsupported(f"a word of {number} bytes")
            self._ops.append(("deref", number))
        elif atom == _PLUS_UCONST:
            self._ops.append(("plus", number))
        elif atom == _REGX:
            self._register(number)
        elif atom == _BREGX:
            self._based(("reg", number), signed(step.number2))
        elif atom == _CALL_FRAME_CFA:
            self._ops.extend(self._cfa())
        elif atom == _STACK_VALUE:
            if not self._ops:
                raise _Unsupported("an expression that is not well-formed")
            self._done = Location("value", tuple(self._ops))
        elif atom == _IMPLICIT_VALUE:
            self._done = constant(self._frame.implicit(step))
        elif atom in (_TLS, _GNU_TLS):
            block = self._frame.thread_block()
            if block is None or not self._ops:
                raise _Unsupported("a thread's own variable of a library")
            self._ops += [("reg", _FS_BASE), ("add", 0), ("plus", -block)]
        elif atom in _GONE:
            raise _Gone
        elif atom in _TYPED:
            raise _Unsupported("an expression with types in it")
        else:
            raise _Unsupported(f"DWARF operation {atom:#04x}")

    def _based(self, base: Op, offset: int) -> None:
        self._ops.append(base)
        if offset:
            self._ops.append(("plus", offset))

    def _register(self, number: int) -> None:
        if self._ops:
            raise _Unsupported("an expression that is not well-formed")
        self._done = Location("register", (("reg", number),))

    def _frame_based(self, offset: int) -> None:
        base = self._frame.frame_base()
        if base.kind == "optimised-out":
            raise _Gone
        if base.kind not in ("memory", "register", "value"):
            raise _Unsupported(base.reason or "a frame base that is split")
        self._ops.extend(base.ops)
        if offset:
            self._ops.append(("plus", offset))

    def _cfa(self) -> tuple[Op, ...]:
        cfa = self._frame.cfa()
        if cfa is None:
            raise _Unsupported("a place on the stack, which no frame information is there for")
        return cfa

    def _piece(self, step: Step) -> None:
        size = step.number
        if step.atom == _BIT_PIECE:
            if size % 8 or step.number2:
                raise _Unsupported("a variable that is split by bits")
            size //= 8
        if self._done is not None and self._done.kind == "pieces":
            raise _Unsupported("a piece of pieces")
        self._pieces.append((self._take(), size))
