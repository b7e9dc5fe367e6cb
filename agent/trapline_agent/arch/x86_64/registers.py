"""The general registers, in the order of ``struct user_regs_struct`` (sys/user.h), and the ABI's use of them."""

from __future__ import annotations

from typing import Final

REGISTERS: Final = (
    *("r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx", "rsi", "rdi"),
    *("orig_rax", "rip", "cs", "eflags", "rsp", "ss", "fs_base", "gs_base", "ds", "es", "fs", "gs"),
)
"""Word i of what PTRACE_GETREGS fills is the register ``REGISTERS[i]``."""

ARGUMENT_REGISTERS: Final = ("rdi", "rsi", "rdx", "rcx", "r8", "r9")
"""Integer arguments 0 to 5 (System V ABI, AMD64 supplement, 3.2.3)."""

RESULT_REGISTER: Final = "rax"
"""The first integer or pointer result: System V ABI, 3.2.3; of Go's ABIInternal too."""

RESULT_REGISTERS: Final = ("rax", "rdx")
GO_REGISTERS: Final = ("rax", "rbx", "rcx", "rdi", "rsi", "r8", "r9", "r10", "r11")
"""Integer arguments, and results, of Go's ABIInternal (go/src/cmd/compile/abi-internal.md)."""

DWARF_REGISTERS: Final = (
    *("rax", "rdx", "rcx", "rbx", "rsi", "rdi", "rbp", "rsp"),
    *("r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rip"),
)
"""By DWARF's number: System V ABI, AMD64 supplement, figure 3.36."""

INDEX: Final = {name: i for i, name in enumerate(REGISTERS)}
RIP: Final = INDEX["rip"]
RSP: Final = INDEX["rsp"]
R8: Final = INDEX["r8"]
R10: Final = INDEX["r10"]
R14: Final = INDEX["r14"]
RDX: Final = INDEX["rdx"]
RDI: Final = INDEX["rdi"]
FS_BASE: Final = INDEX["fs_base"]
EFLAGS: Final = INDEX["eflags"]
RAX: Final = INDEX["rax"]
ORIG_RAX: Final = INDEX["orig_rax"]
USER_CS_64: Final = 0x33
"""Code segment of 64-bit user code on Linux (arch/x86/include/asm/segment.h, __USER_CS)."""

BREAKPOINT: Final = b"\xcc"
"""int3: one byte, so that it can be written into running code (Intel SDM 3A, 8.1.3)."""
MAX_INSTRUCTION_BYTES: Final = 15
