from __future__ import annotations

import contextlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trapline.errors import ProtocolError
from trapline_agent.unwind.table import EMPTY, NO_RULE, RA, At, Cfa, Place, Rule, UnwindTable, decode

registers = st.integers(0, RA)
offsets = st.integers(-(2**31), 2**31 - 1)
places = st.builds(Place, registers, st.sampled_from(At), registers, offsets)
rules = st.builds(
    Rule, st.sampled_from(Cfa), registers, offsets, offsets, st.booleans(), st.lists(places, max_size=17).map(tuple)
)


@st.composite
def tables(draw: st.DrawFn) -> UnwindTable:
    known = draw(st.lists(rules, min_size=1, max_size=8))
    starts = sorted(draw(st.sets(st.integers(0, 2**32 - 1), max_size=40)))
    which = draw(st.lists(st.integers(0, len(known) - 1), min_size=len(starts), max_size=len(starts)))
    return UnwindTable(np.array(starts, np.uint32), np.array(which, np.uint32), known)


@given(tables())
def test_what_is_encoded_is_decoded(table: UnwindTable) -> None:
    again = decode(table.encode())
    assert (again.starts, again.which, again.rules) == (table.starts, table.which, table.rules)


@given(tables(), st.integers(0, 2**32 - 1))
def test_a_row_holds_up_to_the_next(table: UnwindTable, offset: int) -> None:
    before = [i for i, start in enumerate(table.starts) if start <= offset]
    assert table.at(offset) == (table.rules[table.which[before[-1]]] if before else NO_RULE)


@given(tables(), st.data())
def test_what_was_damaged_is_refused(table: UnwindTable, data: st.DataObject) -> None:
    encoded = bytearray(table.encode())
    at = data.draw(st.integers(0, len(encoded) - 1))
    encoded[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(ProtocolError):
        decode(bytes(encoded))
    with pytest.raises(ProtocolError):
        decode(table.encode()[: data.draw(st.integers(0, len(encoded) - 1))])


@given(st.binary(max_size=200))
def test_any_bytes(data: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        decode(b"TLU1" + data)


def test_an_empty_one_knows_nothing() -> None:
    assert decode(EMPTY.encode()).at(0) == NO_RULE
