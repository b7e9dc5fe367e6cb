"""From a probe's captures to what the tracer fetches at the trap."""

from __future__ import annotations

from collections.abc import Iterable

from trapline.errors import Unsupported
from trapline.model import Capture, CaptureKind
from trapline_agent.arch.x86_64 import ARGUMENT_REGISTERS, REGISTERS
from trapline_agent.plans import FetchPlan


def lower(captures: Iterable[Capture]) -> list[FetchPlan]:
    """Returns one fetch for each capture, in order.

    Raises:
        Unsupported: an operand that this processor does not have.
    """
    return [
        FetchPlan(c.name, _register(c), string=c.kind is CaptureKind.STRING, max_bytes=c.max_bytes) for c in captures
    ]


def _register(capture: Capture) -> str:
    operand = capture.operand
    number = operand.removeprefix("arg")
    if number != operand and number.isdecimal() and int(number) < len(ARGUMENT_REGISTERS):
        return ARGUMENT_REGISTERS[int(number)]
    register = operand.removeprefix("reg.")
    if register != operand and register in REGISTERS:
        return register
    raise Unsupported(
        f"`{operand}` cannot be captured on x86-64", reason="Operand", hint="write arg0 to arg5 or reg.NAME"
    )
