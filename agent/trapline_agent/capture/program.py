"""From a probe's captures and condition to what the tracer computes at one site."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from trapline.errors import SpecError, Unsupported
from trapline.expressions import ARGUMENT
from trapline.model import Aggregate, Capture, ProbeKind, ProbeSpec
from trapline.tree import Call, Field, Name, parse, walk
from trapline_agent.capture.compiler import Compiler, Site, unified
from trapline_agent.capture.compute import fits
from trapline_agent.plans import (
    CONTEXT,
    LATENCY,
    AggregatePlan,
    Context,
    Entry,
    FetchPlan,
    Frames,
    Program,
    Register,
    Text,
    Value,
)

_OF_A_RETURN = (Capture(text="retval", name="retval"), Capture(text=LATENCY, name=LATENCY))
"""What a return probe fetches that asks for nothing."""
_ANYWHERE = Site()


def lower(captures: Iterable[Capture], kind: ProbeKind = ProbeKind.ENTRY, site: Site = _ANYWHERE) -> list[FetchPlan]:
    """Returns a probe's columns where they are plain fetches, of registers and of strings that these point to.

    Raises:
        Unsupported: they are more than that: ``compiled`` has them.
        TraplineError: one of them means nothing there.
    """
    fetches, program = compiled(captures, "", replace(site, kind=kind))
    if program is not None:
        raise Unsupported("these captures are more than plain fetches")
    return fetches


def columns_of(spec: ProbeSpec) -> list[Capture]:
    """Returns what is computed of each hit: what it captures, or of an aggregate what it is grouped by, then what it is
    of."""
    if spec.aggregate is None:
        return spec.captures
    texts = [*spec.aggregate.by, *([spec.aggregate.value] if spec.aggregate.value else [])]
    return [Capture(text=text, name=text) for text in texts]


def lower_aggregate(aggregate: Aggregate, max_keys: int) -> AggregatePlan:
    """Returns what the tracer does with the columns of a probe that has an aggregate."""
    return AggregatePlan(aggregate.function, tuple(aggregate.parameters), len(aggregate.by), max_keys)


def require_numbers(aggregate: Aggregate, columns: Sequence[FetchPlan]) -> None:
    """Refuses an aggregate of numbers whose value is none, and any of a stack. Raises SpecError."""
    if aggregate.value and columns[-1].column == "stack":
        raise SpecError(
            f"{aggregate.function} is of a value, and `{aggregate.value}` is a stack",
            hint=f"how often each was met: `-> count() by ({aggregate.value})`",
            text=aggregate.value,
            position=0,
        )
    if aggregate.value and aggregate.function not in ("topk", "distinct") and columns[-1].column in ("str", "bytes"):
        raise SpecError(
            f"{aggregate.function} is of a number, and `{aggregate.value}` is a text",
            hint="texts can be counted with topk(...), distinct(...), or count() by (...)",
            text=aggregate.value,
            position=0,
        )


def compiled(
    captures: Iterable[Capture], condition: str, site: Site, *, aggregate: bool = False
) -> tuple[list[FetchPlan], Program | None]:
    """Compiles what a probe computes at a site.

    Args:
        captures: its columns; of a return probe none means the result and the time.
        condition: an expression; empty where there is none.
        site: the place.
        aggregate: they are an aggregate's: no columns mean none, and pid, tid and comm are plain fetches too.

    Returns:
        The columns, and the site's program; None where the columns are plain fetches, which need none.

    Raises:
        TraplineError: an expression means nothing there; has its text and the place in it.
    """
    captures = list(captures)
    if site.kind is ProbeKind.RETURN and not aggregate:
        captures = captures or list(_OF_A_RETURN)
    compiler = Compiler(site)
    columns = [(c.name, *compiler.column(c.text, c.name)) for c in captures]
    holds = compiler.condition(condition) if condition else None
    roots = [value for _, _, value in columns] + ([] if holds is None else [holds])
    if not fits(*roots):
        raise SpecError("what the probe would compute at each hit is too much", hint="capture less, or in two probes")
    plain = [_plain(*column) or (_context(*column) if aggregate else None) for column in columns]
    if holds is None and all(plain):
        return [p for p in plain if p], None
    program = Program(tuple(value for _, _, value in columns), holds)
    return [FetchPlan(name, type=kind) for name, kind, _ in columns], program


def needs_scope(captures: Iterable[Capture], condition: str, kind: ProbeKind, *, aggregate: bool = False) -> bool:
    """Whether debug information has a say in what a probe computes."""
    captures = list(captures)
    if kind is ProbeKind.RETURN and not captures and not aggregate:
        return True
    texts = [c.text for c in captures] + ([condition] if condition else [])
    for text in texts:
        nodes = list(walk(parse(text)))
        spaces = {
            id(n.of) for n in nodes if isinstance(n, Field) and isinstance(n.of, Name) and n.of.id in ("reg", "ctx")
        }
        for node in nodes:
            if (
                isinstance(node, Name)
                and id(node) not in spaces
                and not ARGUMENT.fullmatch(node.id)
                and node.id != LATENCY
            ):
                return True
            if isinstance(node, Call) and node.function == "cast":
                return True
    return False


def compile_values(expressions: Sequence[str], site: Site) -> list[tuple[str, Value]]:
    """Compiles expressions alone: returns (column type, value) of each; ``evaluate.Values`` computes them.

    Raises:
        TraplineError: as ``compiled``.
    """
    compiler = Compiler(site)
    return [compiler.column(text) for text in expressions]


def merged(columns: Sequence[FetchPlan], others: Sequence[FetchPlan]) -> list[FetchPlan]:
    """Returns columns that hold the values of two sites of one probe.

    Raises:
        Unsupported: one value is of another type at the other site.
    """
    both: list[FetchPlan] = []
    for one, other in zip(columns, others, strict=True):
        if one == other:
            both.append(one)
            continue
        kind = unified(one.column, other.column)
        if kind is None or (kind == "f64" and one.column != other.column):  # a double does not hold every integer
            raise Unsupported(
                f"`{one.name}` is {_of_type(other.column)} here, and {_of_type(one.column)} at another place of the probe",
                hint="probe these places apart",
                reason="CaptureType",
            )
        both.append(FetchPlan(one.name, type=kind))
    return both


def explicit(fetches: Sequence[FetchPlan]) -> Program:
    """Returns the program of plain fetches, for a probe whose other sites have programs."""
    return Program(tuple(_value(f) for f in fetches))


def _of_type(column: str) -> str:
    return {"str": "a text", "bytes": "bytes", "f64": "a floating-point number", "stack": "a stack"}.get(
        column, "a number"
    )


def _plain(name: str, kind: str, value: Value) -> FetchPlan | None:
    """Returns the plain fetch that a value is, if it is one."""
    match kind, value:
        case "u64", Register(name=register):
            return FetchPlan(name, register)
        case "u64", Entry(of=Register(name=register)):
            return FetchPlan(name, register, entry=True)
        case "stack", Frames(depth=depth, skip=skip):
            return FetchPlan(name, "rip", stack=depth, skip=skip)
        case "u64", Context(name="latency"):
            return FetchPlan(name, LATENCY)
        case "str", Text(address=Register(name=register), limit=limit):
            return FetchPlan(name, register, string=True, max_bytes=limit)
        case "str", Entry(of=Text(address=Register(name=register), limit=limit)):
            return FetchPlan(name, register, string=True, max_bytes=limit, entry=True)
        case "str", Text(address=Entry(of=Register(name=register)), limit=limit):
            return FetchPlan(name, register, string=True, max_bytes=limit, entry=True, late=True)
    return None


def _context(name: str, kind: str, value: Value) -> FetchPlan | None:
    """Returns the fetch of an aggregate that needs neither registers nor memory."""
    if isinstance(value, Context) and value.name in CONTEXT:
        return FetchPlan(name, value.name, type=kind)
    return None


def _value(fetch: FetchPlan) -> Value:
    """The other way round."""
    if fetch.stack:
        return Frames(fetch.stack, fetch.skip)
    known = fetch.register == LATENCY or fetch.register in CONTEXT
    word: Value = Context(fetch.register) if known else Register(fetch.register)
    if fetch.string:
        late = fetch.entry and fetch.late
        string = Text(Entry(word) if late else word, fetch.max_bytes)
        return Entry(string) if fetch.entry and not late else string
    return Entry(word) if fetch.entry else word
