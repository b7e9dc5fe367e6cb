"""Where instructions begin: found by decoding from a place that is known to be a beginning."""

from __future__ import annotations

from typing import NamedTuple

from iced_x86 import Decoder, Formatter, FormatterSyntax

MAX_DECODED = 8 << 20
"""Bytes that are decoded to reach an offset: half a second; no function is as long."""


class Instruction(NamedTuple):
    addr: int
    length: int
    text: str
    """Intel syntax."""


def instruction_over(code: bytes, start: int, addr: int) -> Instruction | None:
    """Returns the instruction that has an address in it.

    Args:
        code: bytes from ``start`` on, to a few bytes beyond ``addr``.
        start: address where an instruction begins.
        addr: address inside ``code``.

    Returns:
        The instruction, which begins at ``addr`` or before it; None where the code ends before it.
    """
    decoder = Decoder(64, code, ip=start)
    for instruction in decoder:
        if instruction.next_ip > addr:
            formatter = Formatter(FormatterSyntax.INTEL)
            formatter.hex_prefix, formatter.hex_suffix = "0x", ""
            formatter.space_after_operand_separator = True
            text = str(formatter.format(instruction))
            return Instruction(instruction.ip, instruction.len, text)
    return None
