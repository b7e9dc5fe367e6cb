from __future__ import annotations

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
