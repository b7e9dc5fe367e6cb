"""Where slot pages may go."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trapline_agent.targets import layout
from trapline_agent.targets.layout import CLEAR, Span

SIZE = 1 << 16
REACH = 2**31 - 2**20
MIB = 1 << 20
TEXT = 0x5555_5555_5000


def places(mapped: list[Span], near: int, *, start_brk: int = 0, stack_limit: int = 8 * MIB) -> list[int]:
    return layout.places(mapped, near, SIZE, REACH, start_brk=start_brk, stack_limit=stack_limit)


def span(start: int, length: int, name: bytes = b"") -> Span:
    return Span(start, start + length, "r-xp", 0, name)


def test_reads_a_maps_text() -> None:
    text = (
        b"55e40c3f6000-55e40c3f7000 r-xp 00001000 fe:00 2359308                    /a file\\012 (deleted)\n"
        b"7f30-8f30 r-xp 00000000 00:00 0 \n"
        b"ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]\n"
    )
    first, second, third = layout.spans(text)
    assert first == (0x55E40C3F6000, 0x55E40C3F7000, "r-xp", 2359308, b"/a file\\012 (deleted)")
    assert second == (0x7F30, 0x8F30, "r-xp", 0, b"")
    assert third.name == b"[vsyscall]"


def test_the_nearest_gap_comes_first_and_stays_clear() -> None:
    mapped = [span(TEXT, 4 * MIB), span(TEXT + 8 * MIB, MIB)]
    assert places(mapped, TEXT + 3 * MIB) == [TEXT + 5 * MIB, TEXT - MIB - SIZE, TEXT + 10 * MIB]


def test_a_gap_that_is_too_small_is_left() -> None:
    mapped = [span(TEXT, MIB), span(TEXT + MIB + 2 * CLEAR + SIZE - 4096, MIB)]
    assert all(not TEXT < at < TEXT + 4 * MIB for at in places(mapped, TEXT))
    mapped = [span(TEXT, MIB), span(TEXT + MIB + 2 * CLEAR + SIZE, MIB)]
    assert TEXT + 2 * MIB in places(mapped, TEXT)


@pytest.mark.parametrize("began", [True, False])
def test_the_way_of_the_heap_is_left(began: bool) -> None:
    brk = TEXT + 2 * MIB
    mapped = [span(TEXT, MIB), *([span(brk, MIB, b"[heap]")] if began else [])]
    found = places(mapped, TEXT + MIB, start_brk=brk)
    assert found == [TEXT - MIB - SIZE]
    far = brk + (1 << 41)
    assert places([*mapped, span(far, MIB)], far, start_brk=brk) != []


@pytest.mark.parametrize("limit", [8 * MIB, 600 * MIB, -1])
def test_the_way_of_the_stack_is_left(limit: int) -> None:
    stack = 0x7FFF_FFF0_0000
    library = stack - 1024 * MIB
    mapped = [span(library - (1 << 42), (1 << 42) + MIB), span(stack, 2 * CLEAR - 4096, b"[stack]")]
    found = places(mapped, library, stack_limit=limit)
    assert found == ([library + 2 * MIB] if limit > 0 else [])
    for at in places(mapped, stack, stack_limit=limit):
        assert at + SIZE + CLEAR <= stack - max(limit, 128 * MIB) + 2 * CLEAR


def test_a_program_at_low_addresses() -> None:
    assert places([span(0x400000, MIB)], 0x400000, start_brk=0x500000) == [0x2F0000]
    assert places([span(0x200000, MIB)], 0x200000, start_brk=0x300000) == []


@given(
    st.lists(st.tuples(st.integers(0, 1 << 21), st.integers(1, 1 << 10)), max_size=20),
    st.integers(0, (1 << 34) - 1),
    st.integers(0, 1 << 34),
)
def test_what_is_found_is_free_and_in_reach(mappings: list[tuple[int, int]], near: int, brk: int) -> None:
    mapped = sorted({span(start << 12, pages << 12) for start, pages in mappings})
    for at in places(mapped, near, start_brk=brk):
        assert at % 4096 == 0
        assert at >= CLEAR
        assert near - REACH <= at <= near + REACH - SIZE
        assert all(m.end + CLEAR <= at or at + SIZE + CLEAR <= m.start for m in mapped)
        assert not brk or at + SIZE + CLEAR <= brk
