"""``ustack()`` and ``caller`` in a probe's text, and what the tracer is told of them."""

from __future__ import annotations

import pytest

from trapline.errors import SpecError
from trapline.expressions import is_stack
from trapline.model import ProbeKind
from trapline.spec import parse_probe
from trapline_agent.capture.compiler import Site
from trapline_agent.capture.program import compiled, lower
from trapline_agent.plans import Frames


@pytest.mark.parametrize(
    ("text", "canonical", "depth"),
    [("ustack()", "ustack()", 127), ("ustack(20)", "ustack(20)", 20), ("ustack( 127 )", "ustack(127)", 127)],
)
def test_a_stack_is_captured(text: str, canonical: str, depth: int) -> None:
    spec = parse_probe(f"libc.so.6:malloc {{{text}}}")
    (capture,) = spec.captures
    assert capture.text == canonical
    assert is_stack(capture.text)
    assert parse_probe(spec.text) == spec
    (fetch,) = lower(spec.captures)
    assert (fetch.column, fetch.stack, fetch.skip) == ("stack", depth, 0)


def test_the_caller_is_the_frame_behind_the_entry_or_where_the_return_arrives() -> None:
    captures = parse_probe("libc.so.6:malloc {who=caller}").captures
    (fetch,) = lower(captures)
    assert (fetch.name, fetch.stack, fetch.skip) == ("who", 1, 1)
    (fetch,) = lower(parse_probe("ur:libc.so.6:malloc {caller}").captures, ProbeKind.RETURN)
    assert (fetch.stack, fetch.skip) == (1, 0)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("u:app:f {ustack(0)}", "1 to 1024 frames"),
        ("u:app:f {ustack(1025)}", "1 to 1024 frames"),
        ("u:app:f {ustack(arg0)}", "1 to 1024 frames"),
        ("u:app:f {ustack(1, 2)}", "ustack takes the most frames"),
        ("ur:app:f {entry(ustack())}", "taken where the probe is"),
    ],
)
def test_what_is_refused(text: str, says: str) -> None:
    with pytest.raises(SpecError, match=says):
        parse_probe(text)


def test_beside_what_is_computed_it_is_a_part_of_the_program() -> None:
    spec = parse_probe("app:f if arg0 > 4 {ustack(9), n=u32(arg1), ctx.caller}")
    columns, program = compiled(spec.captures, spec.condition, Site())
    assert [c.column for c in columns] == ["stack", "u64", "stack"]
    assert program is not None
    assert (program.values[0], program.values[2]) == (Frames(9), Frames(1, 1))


@pytest.mark.parametrize("text", ["ustack() + 1", "len(ustack())", "str(caller)", "caller == 4", "ustack()[0]"])
def test_nothing_can_be_computed_of_it(text: str) -> None:
    spec = parse_probe(f"app:f {{x={text}}}")
    with pytest.raises(SpecError, match="captured whole"):
        compiled(spec.captures, "", Site())


def test_a_condition_on_it_is_refused() -> None:
    with pytest.raises(SpecError, match="captured whole"):
        compiled((), "ustack()", Site())
