"""DWARF expressions and line table headers: what is known is translated, everything else is a value that says so."""

from __future__ import annotations

from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trapline_agent.debuginfo import lineheader
from trapline_agent.debuginfo.expressions import constant, location
from trapline_agent.debuginfo.model import Location, Op


class Step(NamedTuple):
    atom: int
    number: int = 0
    number2: int = 0


class Frame:
    def __init__(self, base: Location | None = None, cfa: tuple[Op, ...] | None = (("reg", 7), ("plus", 8))) -> None:
        self._base = base or Location("register", (("reg", 6),))
        self._cfa = cfa

    def frame_base(self) -> Location:
        return self._base

    def cfa(self) -> tuple[Op, ...] | None:
        return self._cfa

    def indexed(self, step: Step) -> int | None:  # type: ignore[override]
        return 0x4000 if step.number < 10 else None

    def thread_block(self) -> int | None:
        return None

    def implicit(self, step: Step) -> bytes:  # type: ignore[override]
        return bytes(range(step.number))


NEGATIVE = (1 << 64) - 16


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([Step(0x55)], Location("register", (("reg", 5),))),  # reg5
        ([Step(0x90, 17)], Location("register", (("reg", 17),))),  # regx
        ([Step(0x91, NEGATIVE)], Location("memory", (("reg", 6), ("plus", -16)))),  # fbreg -16
        ([Step(0x77, 8)], Location("memory", (("reg", 7), ("plus", 8)))),  # breg7 8
        ([Step(0x92, 12, NEGATIVE)], Location("memory", (("reg", 12), ("plus", -16)))),  # bregx
        ([Step(0x9C)], Location("memory", (("reg", 7), ("plus", 8)))),  # call_frame_cfa
        ([Step(0x03, 0x5000)], Location("memory", (("load", 0x5000),))),  # addr
        ([Step(0xA1, 3)], Location("memory", (("load", 0x4000),))),  # addrx
        ([Step(0x77), Step(0x06), Step(0x23, 4)], Location("memory", (("reg", 7), ("deref", 8), ("plus", 4)))),
        ([Step(0x33), Step(0x9F)], Location("value", (("const", 3),))),  # lit3, stack_value
        ([Step(0x9E, 4)], Location("value", (("const", 0x03020100),))),  # implicit_value
        ([Step(0x50), Step(0x93, 8), Step(0x93, 4)], Location("pieces", pieces=(
            (Location("register", (("reg", 0),)), 8), (Location("optimised-out"), 4)))),
        ([], Location("optimised-out")),
    ],
)  # fmt: skip
def test_what_is_known(steps: list[Step], expected: Location) -> None:
    assert location(steps, Frame()) == expected


@pytest.mark.parametrize(
    ("steps", "reason"),
    [
        ([Step(0x0E, 0), Step(0xE0)], "thread"),  # const8u, GNU_push_tls_address
        ([Step(0x0E, 0), Step(0x9B)], "thread"),
        ([Step(0x28, 3)], "0x28"),  # bra
        ([Step(0x77), Step(0xF7, 1)], "types"),  # convert
        ([Step(0x9D, 3, 0)], "bits"),  # bit_piece
        ([Step(0xA1, 99)], "index"),
        ([Step(0x94, 9)], "9 bytes"),  # deref_size
        ([Step(0x50), Step(0x22)], "behind its result"),
        ([Step(0x9F)], "well-formed"),
        ([Step(0x96)] * 1000, "1000"),
    ],
)
def test_what_is_refused_by_name(steps: list[Step], reason: str) -> None:
    found = location(steps, Frame())
    assert found.kind == "unsupported"
    assert reason in found.reason


def test_what_a_caller_had_is_optimised_out() -> None:
    for atom in (0xA3, 0xF3, 0xF2, 0xFA):
        found = location([Step(atom), Step(0x9F)], Frame())
        assert (found.kind, bool(found.reason)) == ("optimised-out", True)


def test_a_place_on_a_stack_that_nothing_describes() -> None:
    assert location([Step(0x9C)], Frame(cfa=None)).kind == "unsupported"
    assert location([Step(0x91, 8)], Frame(Location("optimised-out"))).kind == "optimised-out"


def test_long_constants_are_pieces() -> None:
    found = constant(bytes(range(20)))
    assert [size for _, size in found.pieces] == [8, 8, 4]
    assert found.pieces[2][0].ops == (("const", 0x13121110),)


_NUMBER = st.integers(0, (1 << 64) - 1)


@given(st.lists(st.builds(Step, st.integers(0, 255), _NUMBER | st.integers(0, 64), _NUMBER), max_size=20))
def test_any_program_has_an_answer(steps: list[Step]) -> None:
    class Small(Frame):
        def implicit(self, step: Step) -> bytes:  # type: ignore[override]
            return b"abc"

    found = location(steps, Small())
    assert found.kind in ("memory", "register", "value", "optimised-out", "unsupported", "pieces")
    assert (found.kind != "pieces") == (not found.pieces)
    assert found.kind != "register" or len(found.ops) == 1
    assert found.kind not in ("memory", "value") or found.ops


HEADER_4 = (
    b"\x60\0\0\0\x04\0\x40\0\0\0\x01\x01\x01\xfb\x0e\x0d\0\1\1\1\1\0\0\0\1\0\0\1"
    b"include\0/abs\0\0a.c\0\0\0\0b.h\0\1\0\0c.h\0\2\0\0\0"
)


def test_the_files_of_a_header() -> None:
    def string(_: int, __: bool) -> str:
        raise AssertionError

    assert lineheader.file_names(HEADER_4, string, "/src") == ["", "/src/a.c", "/src/include/b.h", "/abs/c.h"]
    for size in range(len(HEADER_4) - 1):
        with pytest.raises(lineheader.Malformed):
            lineheader.file_names(HEADER_4[:size], string, "/src")


@given(st.binary(max_size=200), st.sampled_from([2, 4, 5]))
def test_any_header_has_an_answer(data: bytes, version: int) -> None:
    header = len(data).to_bytes(4, "little") + version.to_bytes(2, "little") + data
    try:
        assert all(isinstance(name, str) for name in lineheader.file_names(header, lambda at, _: str(at), "/src"))
    except lineheader.Malformed:
        pass
