"""Names of frames: the symbol's, and what debug information adds, as far as it answers."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

from tests.support import needs
from tests.support.targets import Targets
from trapline.errors import NoDebugInfo, ResolveError
from trapline.protocol.stacks import Frame, StackFile
from trapline_agent.debuginfo.model import Function, Scope
from trapline_agent.objects import FoundFile, on_disk
from trapline_agent.symbols.index import IndexCache
from trapline_agent.unwind.names import Named, Names

pytestmark = [needs.gxx]


class Info:
    """Debug information that is asked, and says what it is told to."""

    def __init__(self, scope: Callable[[int], Scope | None]) -> None:
        self.scope = scope

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"{name} is not asked for")


@pytest.fixture
def pay(targets: Targets) -> Frame:
    """A frame in ``shop::pay(shop::Order const*, int)``."""
    program = targets.build_cxx("inlines")
    fd = os.open(program, os.O_RDONLY)
    try:
        (symbol,) = IndexCache().get(fd, str(program)).find("_ZN4shop3payEPKNS_5OrderEi")
    finally:
        os.close(fd)
    key = on_disk(str(program)).key
    return Frame(StackFile(str(program), file=f"{key.dev} {key.inode}"), symbol.offset + 3)


def of(info: Info | None) -> Callable[[FoundFile], Any]:
    return lambda file: info


def test_a_symbol_is_demangled_without_its_parameters(pay: Frame) -> None:
    assert Names()(pay) == ("shop::pay",)
    assert Names(None, of(Info(lambda offset: None))).named(pay) == Named(("shop::pay",))


def test_debug_information_adds_what_is_inlined_and_the_line(pay: Frame) -> None:
    scope = Scope(Function("a::leaf"), inlined_into=("a::mid", "a::outer"), file="/src/a.cpp", line=7)
    names = Names(None, of(Info(lambda offset: scope if offset == pay.offset else None)))
    assert names.named(pay) == Named(("a::leaf (inlined)", "a::mid (inlined)", "shop::pay"), "a.cpp:7")
    assert names.described(pay) == ("a::leaf (inlined) at a.cpp:7", "a::mid (inlined)", "shop::pay")
    assert names(pay) == ("a::leaf (inlined)", "a::mid (inlined)", "shop::pay")


def test_without_a_symbol_it_is_the_debug_informations_or_the_place(pay: Frame) -> None:
    nowhere = Frame(pay.file, 1 << 30)
    assert Names()(nowhere) == (f"inlines+{1 << 30:#x}",)
    assert Names(None, of(Info(lambda offset: Scope(Function("known")))))(nowhere) == ("known",)
    gone = Frame(StackFile("/nowhere/lib.so", "00"), 5)
    assert Names(None, of(Info(lambda offset: Scope(Function("known")))))(gone) == ("lib.so+0x5",)


@pytest.mark.parametrize("error", [ResolveError("malformed"), NoDebugInfo("none")])
def test_debug_information_that_is_wrong_is_not_asked_again(pay: Frame, error: Exception) -> None:
    asked = []

    def scope(offset: int) -> Scope | None:
        asked.append(offset)
        raise error

    names = Names(None, of(Info(scope)))
    frames = [Frame(pay.file, pay.offset + i) for i in range(4)]
    assert {names(frame) for frame in frames} == {("shop::pay",)}
    assert asked == [pay.offset]


def test_many_are_named_in_bounded_time(pay: Frame) -> None:
    """Beyond it by symbols alone; what was left out is there the next time."""
    asked: list[int] = []

    def scope(offset: int) -> Scope | None:
        asked.append(offset)
        return Scope(Function("a::leaf"), inlined_into=("pay",))

    names = Names(None, of(Info(scope)))
    frames = [Frame(pay.file, pay.offset + i % 3) for i in range(6)]
    assert [n.names for n in names.many(frames, seconds=0)] == [("shop::pay",)] * 6
    assert asked == []
    full = [("a::leaf (inlined)", "shop::pay")] * 6
    assert [n.names for n in names.many(frames)] == full
    assert len(asked) == 3
    assert [n.names for n in names.many(frames, seconds=0)] == full
