from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trapline.errors import ProtocolError
from trapline_agent.plans import FileKey, SitePlan
from trapline_agent.tracer import messages as m


@given(st.binary(max_size=200))
def test_random_bytes_are_refused(payload: bytes) -> None:
    for parse in (m.parse_to_tracer, m.parse_to_agent):
        with pytest.raises(ProtocolError):
            parse(payload)


def test_round_trip() -> None:
    plan = SitePlan(site=1, file=FileKey("fd:01", 7), path="/x", offset=16, code=b"\x55")
    message = m.Register(id=3, probe="p", generation=2, sites=["a", "b"], plans=[plan], where={"pid": "1"})
    frame = m.frame(message)
    length, kind = m.FRAME.unpack_from(frame)
    assert (length, kind) == (len(frame) - m.FRAME.size, m.CONTROL)
    assert m.parse_to_tracer(frame[m.FRAME.size :]) == message


_fields = st.sampled_from(["t", "error", "where", "env", "hooks", "plans", "x"])
_tags = st.sampled_from(["hello", "register", "launch", "renew", "ready", "done", "stats"])
_openings = st.sampled_from([b"\x91", b"\xdc\x00\x01", b"\x81\xa1x", b"\xdf\x00\x00\x00\x01\xa1x"])
"""Arrays and maps of one, short and long."""


@given(_tags, _fields, st.lists(_openings, min_size=1, max_size=8), st.integers(1_000, 20_000))
def test_deep_nesting_is_refused(tag: str, field: str, openings: list[bytes], depth: int) -> None:
    nested = b"".join(openings) * depth + b"\xc0"
    tagged = b"\x82\xa1t" + bytes([0xA0 | len(tag)]) + tag.encode() + bytes([0xA0 | len(field)]) + field.encode()
    for parse in (m.parse_to_tracer, m.parse_to_agent):
        with pytest.raises(ProtocolError):
            parse(nested)
        with contextlib.suppress(ProtocolError):
            # In a field that it does not know it passes over what is not too deep.
            assert isinstance(parse(tagged + nested), m.Message)
