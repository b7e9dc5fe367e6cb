"""How the instruction under a breakpoint is run without ever taking the breakpoint out.

Restoring the byte, single-stepping and putting it back lets other threads run through, and costs two stops. Instead:

*emulated*: the instruction's whole effect is a new instruction pointer (nops, endbr, jumps), so that is all that is set.
*boosted*: a displaced copy runs natively in a *slot* near the code, followed by a jump back: one stop per hit. Operands
relative to the instruction pointer and branches are relocated (iced-x86's BlockEncoder); a call becomes ``push`` of the
original return address and a jump, so that the callee and every unwinder see the original.

Where there is no room for a slot, some common first instructions of functions can be *computed* by writing registers.
Everything else is refused by name.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Final, Literal, Protocol

from iced_x86 import (
    BlockEncoder,
    Code,
    Decoder,
    DecoderError,
    FlowControl,
    Formatter,
    FormatterSyntax,
    Instruction,
    Mnemonic,
    OpKind,
    Register,
)

from trapline.errors import Unsupported
from trapline_agent.arch.x86_64.registers import EFLAGS, INDEX

SLOT_BYTES: Final = 48
"""Room of one slot: 15 bytes of instruction grow to at most 30 by relocation, and 5 or 14 of jump follow."""

_MASK: Final = 2**64 - 1
_NEAR: Final = 2**31 - SLOT_BYTES


class Registers(Protocol):
    """The words of ``user_regs_struct``, by ``registers.INDEX``; a memoryview of format Q serves."""

    def __getitem__(self, index: int, /) -> int: ...
    def __setitem__(self, index: int, value: int, /) -> None: ...


Computed = Callable[[Registers], None]
"""Runs an instruction on registers alone. The instruction pointer is left to the caller."""


@dataclass(frozen=True)
class Slot:
    """A displaced copy ready to be written at the address it was made for."""

    code: bytes
    starts: dict[int, tuple[int, int]]
    """Offset in the slot -> (original address that state corresponds to, what to add to rsp to get there). An offset that
    is not named is in the middle of a sequence and has to be stepped out of."""


@dataclass(frozen=True)
class StepPlan:
    """What is known of one instruction: ``length`` in bytes, ``text`` in Intel syntax, and how it will be run."""

    code: bytes
    length: int
    text: str
    method: Literal["emulated", "boosted"]
    _insn: Instruction = field(repr=False, compare=False)
    _vaddr: int = field(repr=False, compare=False)

    def next_ip(self, addr: int) -> Callable[[Registers], int] | None:
        """Returns the function that gives the new instruction pointer of an emulated instruction at ``addr``; None for a
        boosted one."""
        if self.method != "emulated":
            return None
        after = addr + self.length
        insn = self._insn
        if insn.flow_control == FlowControl.NEXT:
            return lambda regs: after
        target = (insn.near_branch_target - self._vaddr + addr) & _MASK
        if insn.flow_control == FlowControl.UNCONDITIONAL_BRANCH:
            return lambda regs: target
        taken = _CONDITIONS[insn.condition_code]
        return lambda regs: target if taken(regs[EFLAGS]) else after

    def slot(self, addr: int, slot: int) -> Slot:
        """Returns the displaced copy of the instruction at ``addr`` for a slot at address ``slot``.

        Raises:
            Unsupported: ``OutOfReach``, the slot is more than 2 GB away.
        """
        if abs(addr - slot) > _NEAR:
            raise Unsupported(f"slot at {slot:#x} is out of reach of {addr:#x}", reason="OutOfReach")
        insn = self._at(addr)
        after = addr + self.length
        if insn.flow_control == FlowControl.CALL:
            # push [rip+5]; jmp target; .quad return address
            head = b"\xff\x35" + struct.pack("<i", 5)
            return Slot(
                head + _jmp(slot + 6, insn.near_branch_target) + struct.pack("<Q", after),
                {0: (addr, 0), 6: (addr, 8)},
            )
        if insn.flow_control == FlowControl.INDIRECT_CALL:
            jump = self._at(addr)
            jump.code = Code.JMP_RM64
            tail = _encode(jump, slot + 6)
            head = b"\xff\x35" + struct.pack("<i", len(tail))
            return Slot(head + tail + struct.pack("<Q", after), {0: (addr, 0), 6: (addr, 8)})
        copy = _encode(insn, slot)
        back = _jmp(slot + len(copy), after)
        return Slot(copy + back, {0: (addr, 0), len(copy): (after, 0)})

    @cached_property
    def computed(self) -> Computed | None:
        """How to run it by writing registers, for want of a slot; None where that is not known.

        What touches memory is not computed: a push may have to grow the stack or to fault, and neither happens to a
        tracer's write.
        """
        return _computed(self._insn)

    def _at(self, addr: int) -> Instruction:
        return Decoder(64, self.code, ip=addr).decode()


@lru_cache(maxsize=4096)
def plan_step(code: bytes, vaddr: int = 0) -> StepPlan:
    """Decides how the instruction at the start of ``code`` will be run from elsewhere.

    Args:
        code: the file's bytes from the instruction on, up to 15.
        vaddr: any address to take it to be at; only the text depends on it.

    Raises:
        Unsupported: ``InvalidInstruction``, or ``CannotDisplace`` with the reason.
    """
    decoder = Decoder(64, code, ip=vaddr)
    insn = decoder.decode()
    if decoder.last_error != DecoderError.NONE or insn.code == Code.INVALID:
        raise Unsupported(
            f"the bytes {code[:8].hex(' ')} are not an x86-64 instruction",
            reason="InvalidInstruction",
            hint="probe a function's first instruction, or an offset where one begins",
        )
    text = _format(insn)
    used = bytes(code[: insn.len])
    flow = insn.flow_control
    why = ""
    if insn.mnemonic in (Mnemonic.INT3, Mnemonic.INT1):
        why = "a breakpoint is there already"
    elif flow in (FlowControl.INTERRUPT, FlowControl.EXCEPTION, FlowControl.XBEGIN_XABORT_XEND):
        why = "it enters the kernel or a transaction from its own address"
    elif insn.mnemonic in (Mnemonic.SYSCALL, Mnemonic.SYSENTER):
        why = "it enters the kernel from its own address"
    elif insn.is_privileged:
        why = "it is privileged"
    elif flow in (FlowControl.CALL, FlowControl.INDIRECT_CALL, FlowControl.INDIRECT_BRANCH, FlowControl.RETURN):
        why = _odd_transfer(insn)
    elif flow == FlowControl.UNCONDITIONAL_BRANCH and insn.op0_kind != OpKind.NEAR_BRANCH64:
        why = "its operand size is odd"
    if why:
        raise Unsupported(
            f"`{text}` cannot be run from another place: {why}",
            reason="CannotDisplace",
            hint="probe the instruction after it",
        )
    return StepPlan(used, insn.len, text, _method(insn), insn, vaddr)


def _method(insn: Instruction) -> Literal["emulated", "boosted"]:
    if insn.mnemonic in (Mnemonic.NOP, Mnemonic.ENDBR64, Mnemonic.ENDBR32) and insn.flow_control == FlowControl.NEXT:
        return "emulated"
    if insn.flow_control == FlowControl.UNCONDITIONAL_BRANCH:
        return "emulated"
    if insn.flow_control == FlowControl.CONDITIONAL_BRANCH and insn.is_jcc_short_or_near:
        return "emulated"
    return "boosted"


def _odd_transfer(insn: Instruction) -> str:
    if insn.code in (Code.CALL_REL32_64, Code.JMP_RM64, Code.RETNQ, Code.RETNQ_IMM16):
        return ""
    if insn.code == Code.CALL_RM64:
        if insn.op0_kind == OpKind.MEMORY and Register.RSP in (insn.memory_base, insn.memory_index):
            return "its operand is on the stack that a displaced call changes first"
        if insn.op0_kind == OpKind.REGISTER and insn.op0_register == Register.RSP:
            return "it calls through the stack pointer"
        return ""
    return "it is a far or 16-bit transfer"


def _encode(insn: Instruction, at: int) -> bytes:
    # A branch to its own address leads back to the breakpoint, not to the copy: the block must not take it for its own.
    insn = insn.copy()
    insn.ip = 0
    block = BlockEncoder(64)
    block.add(insn)
    try:
        return bytes(block.encode(at))
    except ValueError as e:
        raise Unsupported(f"`{_format(insn)}` cannot be run at {at:#x}: {e}", reason="OutOfReach") from e


def _jmp(at: int, target: int) -> bytes:
    return b"\xe9" + struct.pack("<i", target - (at + 5))


def _format(insn: Instruction) -> str:
    formatter = Formatter(FormatterSyntax.INTEL)
    formatter.hex_prefix = "0x"
    formatter.hex_suffix = ""
    formatter.space_after_operand_separator = True
    formatter.branch_leading_zeros = False
    return str(formatter.format(insn))


_CF, _PF, _ZF, _SF, _OF = 1, 4, 0x40, 0x80, 0x800


def _sf_ne_of(flags: int) -> bool:
    return bool(flags & _SF) != bool(flags & _OF)


# Indexed by iced's ConditionCode: None o no b ae e ne be a s ns p np l ge le g (Intel SDM 2, appendix B, table B-1).
_CONDITIONS: Final[tuple[Callable[[int], bool], ...]] = (
    lambda f: True,
    lambda f: bool(f & _OF),
    lambda f: not f & _OF,
    lambda f: bool(f & _CF),
    lambda f: not f & _CF,
    lambda f: bool(f & _ZF),
    lambda f: not f & _ZF,
    lambda f: bool(f & (_CF | _ZF)),
    lambda f: not f & (_CF | _ZF),
    lambda f: bool(f & _SF),
    lambda f: not f & _SF,
    lambda f: bool(f & _PF),
    lambda f: not f & _PF,
    _sf_ne_of,
    lambda f: not _sf_ne_of(f),
    lambda f: bool(f & _ZF) or _sf_ne_of(f),
    lambda f: not f & _ZF and not _sf_ne_of(f),
)

_REGISTER_INDEX: Final[dict[int, int]] = {
    getattr(Register, name.upper()): i for name, i in INDEX.items() if hasattr(Register, name.upper())
}
_LOW_INDEX: Final[dict[int, int]] = {
    getattr(Register, low): INDEX[full]
    for low, full in {
        **{f"E{n.upper()}": f"r{n}" for n in ("ax", "bx", "cx", "dx", "si", "di", "bp", "sp")},
        **{f"R{n}D": f"r{n}" for n in range(8, 16)},
    }.items()
}


def _computed(insn: Instruction) -> Computed | None:
    code = insn.code
    if code in (Code.MOV_RM64_R64, Code.MOV_R64_RM64) and insn.op0_kind == insn.op1_kind == OpKind.REGISTER:
        return _move(_REGISTER_INDEX[insn.op0_register], _REGISTER_INDEX[insn.op1_register], _MASK)
    if code in (Code.MOV_RM32_R32, Code.MOV_R32_RM32) and insn.op0_kind == insn.op1_kind == OpKind.REGISTER:
        return _move(_LOW_INDEX[insn.op0_register], _LOW_INDEX[insn.op1_register], 2**32 - 1)
    if code == Code.MOV_R32_IMM32:
        return _constant(_LOW_INDEX[insn.op0_register], insn.immediate32)
    if code in (Code.XOR_RM32_R32, Code.XOR_R32_RM32) and insn.op0_kind == OpKind.REGISTER:
        if insn.op0_register == insn.op1_register and insn.op1_kind == OpKind.REGISTER:
            return _zero(_LOW_INDEX[insn.op0_register])
        return None
    if code in (Code.SUB_RM64_IMM8, Code.SUB_RM64_IMM32) and insn.op0_kind == OpKind.REGISTER:
        return _subtract(_REGISTER_INDEX[insn.op0_register], insn.immediate(1) & _MASK)
    return None


def _move(target: int, source: int, mask: int) -> Computed:
    def run(regs: Registers) -> None:
        regs[target] = regs[source] & mask

    return run


def _constant(target: int, value: int) -> Computed:
    def run(regs: Registers) -> None:
        regs[target] = value

    return run


def _zero(target: int) -> Computed:
    def run(regs: Registers) -> None:
        regs[target] = 0
        # xor clears CF and OF, and of a zero result sets ZF and PF and clears SF; AF is undefined (Intel SDM 2, XOR)
        regs[EFLAGS] = regs[EFLAGS] & ~(_CF | _OF | _SF | 0x10) | _ZF | _PF

    return run


def _subtract(target: int, value: int) -> Computed:
    def run(regs: Registers) -> None:
        a = regs[target]
        result = (a - value) & _MASK
        flags = regs[EFLAGS] & ~(_CF | _PF | 0x10 | _ZF | _SF | _OF)
        flags |= _CF if a < value else 0
        flags |= 0 if (result & 0xFF).bit_count() & 1 else _PF
        flags |= (a ^ value ^ result) & 0x10
        flags |= 0 if result else _ZF
        flags |= _SF if result >> 63 else 0
        flags |= _OF if (a ^ value) & (a ^ result) & 2**63 else 0
        regs[target] = result
        regs[EFLAGS] = flags

    return run
