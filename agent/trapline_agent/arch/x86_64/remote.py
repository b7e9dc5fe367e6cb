"""Code by which a stopped thread makes one system call for us and then goes on as if nothing had been.

The registers that the call takes or changes are put back by the code itself, from constants: whoever started it may be
killed at any moment, and the thread still comes out right. Nothing is pushed, so that no stack has to grow.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final

from trapline_agent.arch.x86_64.registers import INDEX

_MASK: Final = 2**64 - 1
_MOV_IMM64: Final = {
    **{
        name: bytes((0x48, 0xB8 + i)) for i, name in enumerate(("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi"))
    },
    **{f"r{i}": bytes((0x49, 0xB0 + i)) for i in range(8, 16)},
}
"""mov r64, imm64: REX.W + B8 + number (Intel SDM 2, MOV)."""
_SYSCALL: Final = b"\x0f\x05"
_ARGUMENTS: Final = ("rdi", "rsi", "rdx", "r10", "r8", "r9")
"""Of a system call (syscall(2), x86-64)."""
_CHANGED: Final = ("rax", "rcx", "r11", *_ARGUMENTS)
"""The call itself leaves its result in rax, and in rcx and r11 what SYSCALL puts there (Intel SDM 2, SYSCALL); the flags are
as before."""

STUB_BYTES: Final = 10 * (1 + len(_ARGUMENTS)) + len(_SYSCALL) + 10 * len(_CHANGED) + 14


def call_stub(number: int, args: Sequence[int], registers: Sequence[int], back: int) -> bytes:
    """Returns code that can run anywhere.

    Args:
        number: of the system call.
        args: at most six; the others are 0.
        registers: what the thread has (``registers.INDEX``), which it has again afterwards.
        back: where it goes on.
    """
    values = (*args, *(0,) * (len(_ARGUMENTS) - len(args)))
    return (
        _load("rax", number)
        + b"".join(_load(name, value) for name, value in zip(_ARGUMENTS, values, strict=True))
        + _SYSCALL
        + b"".join(_load(name, registers[INDEX[name]]) for name in _CHANGED)
        + b"\xff\x25\0\0\0\0"  # jmp [rip+0]
        + struct.pack("<Q", back)
    )


def _load(name: str, value: int) -> bytes:
    return _MOV_IMM64[name] + struct.pack("<Q", value & _MASK)
