"""``ustack()`` and ``caller`` in a probe's text, and what the tracer is told of them."""

from __future__ import annotations

import pytest

from trapline.errors import SpecError
from trapline.model import CaptureKind, ProbeKind
from trapline.spec import parse_probe
from trapline_agent.capture.program import lower


@pytest.mark.parametrize(
    ("text", "canonical", "depth"),
    [("ustack()", "ustack()", 127), ("ustack(20)", "ustack(20)", 20), ("ustack( 127 )", "ustack()", 127)],
)
def test_a_stack_is_captured(text: str, canonical: str, depth: int) -> None:
    spec = parse_probe(f"libc.so.6:malloc {{{text}}}")
    (capture,) = spec.captures
    assert (capture.text, capture.kind, capture.frames) == (canonical, CaptureKind.STACK, depth)
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
        ("u:app:f {ustack(1, 2)}", "most frames, if anything"),
        ("ur:app:f {entry(ustack())}", "taken where the probe is"),
        ("ur:app:f {entry(caller)}", "returned to"),
    ],
)
def test_what_is_refused(text: str, says: str) -> None:
    with pytest.raises(SpecError, match=says):
        parse_probe(text)
