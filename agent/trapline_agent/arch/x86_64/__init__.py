"""x86-64: registers as ptrace shows them, and how a displaced instruction is run."""

from trapline_agent.arch.x86_64.registers import (
    ARGUMENT_REGISTERS,
    DWARF_REGISTERS,
    GO_REGISTERS,
    REGISTERS,
    RESULT_REGISTER,
    RESULT_REGISTERS,
)

__all__ = [
    "ARGUMENT_REGISTERS",
    "DWARF_REGISTERS",
    "GO_REGISTERS",
    "REGISTERS",
    "RESULT_REGISTER",
    "RESULT_REGISTERS",
]
