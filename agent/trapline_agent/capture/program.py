"""From a probe's captures to what the tracer fetches at the trap."""

from __future__ import annotations

from collections.abc import Iterable

from trapline.errors import Unsupported
from trapline.expressions import read_value
from trapline.model import Aggregate, Capture, CaptureKind, ProbeKind
from trapline_agent.arch.x86_64 import ARGUMENT_REGISTERS, REGISTERS, RESULT_REGISTER
from trapline_agent.plans import CONTEXT, LATENCY, AggregatePlan, FetchPlan

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
    return [_fetch(c) for c in captures]


def lower_aggregate(aggregate: Aggregate, kind: ProbeKind, max_keys: int) -> AggregatePlan:
    """Returns what the tracer does with the hits of a probe that has an aggregate.

    Raises:
        Unsupported: an operand that this processor does not have.
        SpecError: an expression that cannot be read.
    """

    def fetch(text: str) -> FetchPlan:
        return _fetch(read_value(text, returns=kind is ProbeKind.RETURN))

    return AggregatePlan(
        function=aggregate.function,
        parameters=tuple(aggregate.parameters),
        value=fetch(aggregate.value) if aggregate.value else None,
        by=tuple(fetch(text) for text in aggregate.by),
        max_keys=max_keys,
    )


def _fetch(capture: Capture) -> FetchPlan:
    return FetchPlan(
        capture.name,
        _register(capture),
        string=capture.kind is CaptureKind.STRING,
        max_bytes=capture.max_bytes,
        entry=capture.entry,
        late=capture.late,
    )


def _register(capture: Capture) -> str:
    operand = capture.operand
    if operand == "retval":
        return RESULT_REGISTER
    if operand == LATENCY or operand in CONTEXT:
        return operand
    number = operand.removeprefix("arg")
    if number != operand and number.isdecimal() and int(number) < len(ARGUMENT_REGISTERS):
        return ARGUMENT_REGISTERS[int(number)]
    register = operand.removeprefix("reg.")
    if register != operand and register in REGISTERS:
        return register
    raise Unsupported(
        f"`{operand}` cannot be captured on x86-64", reason="Operand", hint="write arg0 to arg5 or reg.NAME"
    )
