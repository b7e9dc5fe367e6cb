"""From a probe's captures to what the tracer fetches at the trap."""

from __future__ import annotations

from collections.abc import Iterable

from trapline.errors import Unsupported
from trapline.expressions import CALLER
from trapline.model import Capture, CaptureKind, ProbeKind
from trapline_agent.arch.x86_64 import ARGUMENT_REGISTERS, REGISTERS, RESULT_REGISTER
from trapline_agent.plans import LATENCY, FetchPlan

_OF_A_RETURN = (
    Capture(text="retval", name="retval", operand="retval"),
    Capture(text=LATENCY, name=LATENCY, operand=LATENCY),
)
"""What a return probe fetches that asks for nothing."""


def lower(captures: Iterable[Capture], kind: ProbeKind = ProbeKind.ENTRY) -> list[FetchPlan]:
    """Returns one fetch for each capture, in order.

    Raises:
        Unsupported: an operand that this processor does not have.
    """
    captures = list(captures)
    if kind is ProbeKind.RETURN:
        captures = captures or list(_OF_A_RETURN)
    return [
        FetchPlan(
            c.name,
            _register(c),
            string=c.kind is CaptureKind.STRING,
            max_bytes=c.max_bytes,
            entry=c.entry,
            late=c.late,
            stack=c.frames,
            skip=int(c.operand == CALLER and kind is ProbeKind.ENTRY),
        )
        for c in captures
    ]


def _register(capture: Capture) -> str:
    operand = capture.operand
    if capture.kind is CaptureKind.STACK:
        return "rip"
    if operand == "retval":
        return RESULT_REGISTER
    if operand == LATENCY:
        return LATENCY
    number = operand.removeprefix("arg")
    if number != operand and number.isdecimal() and int(number) < len(ARGUMENT_REGISTERS):
        return ARGUMENT_REGISTERS[int(number)]
    register = operand.removeprefix("reg.")
    if register != operand and register in REGISTERS:
        return register
    raise Unsupported(
        f"`{operand}` cannot be captured on x86-64", reason="Operand", hint="write arg0 to arg5 or reg.NAME"
    )
