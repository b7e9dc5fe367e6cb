"""Calls and returns: where a call comes back to, and where a Go function's body begins."""

from __future__ import annotations

from typing import Final

from iced_x86 import Code, Decoder, FlowControl, Instruction, Mnemonic, OpKind, Register

MAX_CALL_BYTES: Final = 9
"""A call through memory: prefix, REX, opcode, ModRM, SIB, displacement of 4."""
_FUNCTION_ALIGNMENT: Final = 16
_NOP: Final = 0x90
GO_CHECK_BYTES: Final = 64
"""More than a Go function's stack check takes."""
_MORE_STACK: Final = 6
"""Instructions of the longest stack check: mov, sub, jb, lea, cmp, jbe."""
_STACK_GUARD: Final = 0x10
"""Offset of ``stackguard0`` in Go's ``g`` (runtime/runtime2.go, since 1.2)."""


def may_be_returned_to(before: bytes, addr: int) -> bool:
    """Says whether a word on the stack can be a return address, so that an instruction surely begins there.

    It is where a call ends before it, or the beginning of a function that was pushed by hand: the kernel's and makecontext's
    (signal trampolines and Go's ``goexit`` have a nop before them, for unwinders that look at the address less one).

    Args:
        before: the bytes of code that end at the address, ``MAX_CALL_BYTES`` or fewer.
        addr: the address.
    """
    for length in range(2, min(len(before), MAX_CALL_BYTES) + 1):
        call = Decoder(64, before[-length:]).decode()
        if call.len == length and call.flow_control in (FlowControl.CALL, FlowControl.INDIRECT_CALL):
            return True
    return before[-1:] == bytes((_NOP,)) or addr % _FUNCTION_ALIGNMENT == 0


def go_body(code: bytes) -> int:
    """Returns how far behind its first instruction a Go function's body begins: behind its stack check.

    That compares the stack pointer with ``stackguard0`` of the goroutine in r14, and where the stack is too small (or the
    scheduler wants the goroutine) has it grow and begins anew at the first instruction (cmd/internal/obj/x86/obj6.go,
    stacksplit). The stack pointer is unchanged by it.

    Args:
        code: the function's bytes, ``GO_CHECK_BYTES`` or to its end.

    Returns:
        0 where it has no such check.
    """
    decoder = Decoder(64, code)
    compared = False
    for _ in range(_MORE_STACK):
        if not decoder.can_decode:
            return 0
        insn = decoder.decode()
        if insn.mnemonic == Mnemonic.CMP and insn.memory_base == Register.R14:
            compared = insn.op1_kind == OpKind.MEMORY and insn.memory_displacement == _STACK_GUARD
        elif compared:
            return insn.next_ip if insn.code in (Code.JBE_REL8_64, Code.JBE_REL32_64) else 0
        elif insn.mnemonic != Mnemonic.JB and not _is_r12(insn):
            return 0
    return 0


def _is_r12(insn: Instruction) -> bool:
    """Whether it works out how large a stack the function needs, in r12."""
    return insn.mnemonic in (Mnemonic.LEA, Mnemonic.MOV, Mnemonic.SUB) and insn.op0_register == Register.R12
