"""The walk over stacks of any content, by any table: it ends, raises nothing, and what it remembers changes no answer."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trapline.protocol.stacks import End, numbers_of, unpack
from trapline_agent.arch.x86_64.registers import INDEX
from trapline_agent.plans import FileKey
from trapline_agent.targets import maps
from trapline_agent.unwind.table import NO_RULE, RA, RBP, RSP, At, Cfa, Place, Rule, UnwindTable
from trapline_agent.unwind.walk import NewFile, Stacks

CODE, STACK, WORDS = 0x10000, 0x40000, 64
MAPS = b"00010000-00011000 r-xp 00002000 08:01 7                 /lib/x.so\n"
FILE = FileKey("08:01", 7)
STRIDE = 16
"""Bytes of code that a rule holds for."""

places = st.builds(
    Place,
    st.sampled_from([RBP, RBP, RSP, 3, 12]),
    st.sampled_from(At),
    st.sampled_from([RSP, RBP, 3]),
    st.integers(-6, 2).map(lambda n: 8 * n),
)
back = st.just(Place(RA, At.CFA, 0, -8))
plain = st.builds(
    lambda register, offset, bp: Rule(
        Cfa.REGISTER,
        register,
        8 * offset,
        0,
        False,
        ((Place(RBP, At.CFA, 0, 8 * bp),) if bp else ()) + (Place(RA, At.CFA, 0, -8),),
    ),
    st.sampled_from([RSP, RSP, RSP, RBP]),
    st.integers(1, 5),
    st.integers(-4, 0),
)
rules = st.one_of(
    plain,
    plain,
    plain,
    st.just(NO_RULE),
    st.builds(lambda b: Rule(Cfa.REGISTER, RSP, 8, 0, False, (b._replace(at=At.UNDEFINED),)), back),
    st.builds(
        lambda cfa, register, offset, extra, signal, more, b: Rule(cfa, register, offset, extra, signal, (*more, b)),
        st.sampled_from(Cfa),
        st.sampled_from([RSP, RBP, 3, RA]),
        st.integers(-9, 40),
        st.integers(-9, 40),
        st.booleans(),
        st.lists(places, max_size=3),
        st.one_of(back, places.map(lambda p: p._replace(register=RA))),
    ),
)
words = st.one_of(
    st.integers(CODE, CODE + 10 * STRIDE),
    st.integers(CODE, CODE + 10 * STRIDE),
    st.integers(0, WORDS + 4).map(lambda n: STACK + 8 * n),
    st.integers(0, 2**64 - 1),
    st.just(0),
)


@pytest.fixture(autouse=True, scope="module")
def _mappings() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(maps, "read_maps", lambda pid: MAPS)
        yield


def table_of(known: list[Rule]) -> UnwindTable:
    different = list(dict.fromkeys(known))
    starts = np.arange(len(known), dtype=np.uint32) * STRIDE + 0x2000
    return UnwindTable(starts, np.array([different.index(r) for r in known], np.uint32), different)


def fresh(table: UnwindTable) -> Stacks:
    stacks = Stacks()
    stacks.add(FILE, "aa", table.encode())
    return stacks


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(st.data())
def test_what_is_remembered_changes_no_answer(data: st.DataObject) -> None:
    table = table_of(data.draw(st.lists(rules, min_size=1, max_size=10)))
    content = data.draw(st.lists(words, min_size=WORDS, max_size=WORDS))
    registers = [0] * len(INDEX)
    registers[INDEX["rip"]] = data.draw(st.integers(CODE, CODE + 10 * STRIDE))
    registers[INDEX["rsp"]] = STACK + 8 * data.draw(st.integers(0, 8))
    registers[INDEX["rbp"]] = data.draw(words)
    registers[INDEX["rbx"]] = data.draw(words)
    depth, skip = data.draw(st.integers(1, 20)), data.draw(st.integers(0, 2))
    remembering = fresh(table)
    memory = os.memfd_create("memory")
    try:
        for _ in range(4):
            os.pwrite(memory, struct.pack(f"<{WORDS}Q", *content), STACK)
            for _ in range(2):
                packed = remembering.walk(1, registers, memory, depth, skip)
                assert packed == fresh(table).walk(1, registers, memory, depth, skip)
            stack = unpack(packed, {n: remembering.file(n) for n in numbers_of(packed)})
            assert len(stack.frames) <= depth
            content[data.draw(st.integers(0, WORDS - 1))] = data.draw(words)
    finally:
        os.close(memory)


def test_a_walk_that_is_remembered_reads_the_stack_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rule = Rule(Cfa.REGISTER, RSP, 16, 0, False, (Place(RA, At.CFA, 0, -8),))
    stacks = fresh(table_of([rule]))
    content = [7, CODE + 5] * 20 + [7, 0]
    registers = [0] * len(INDEX)
    registers[INDEX["rip"]], registers[INDEX["rsp"]] = CODE, STACK
    memory = os.memfd_create("memory")
    try:
        os.pwrite(memory, struct.pack(f"<{len(content)}Q", *content), STACK)
        first = stacks.walk(1, registers, memory, 127)
        assert unpack(first, {}).end is End.COMPLETE
        assert len(unpack(first, {}).frames) == 21
        steps: list[object] = []
        monkeypatch.setattr(type(stacks._spaces[1]), "_walk_plain", lambda *args: steps.append(args))
        assert stacks.walk(1, registers, memory, 127) == first
        assert not steps
    finally:
        os.close(memory)


def test_a_changed_mapping_is_met_with_another_table(monkeypatch: pytest.MonkeyPatch) -> None:
    rule = Rule(Cfa.REGISTER, RSP, 8, 0, False, (Place(RA, At.CFA, 0, -8),))
    stacks = fresh(table_of([rule]))
    wanted: list[NewFile] = []
    stacks.want = wanted.append
    registers = [0] * len(INDEX)
    registers[INDEX["rip"]], registers[INDEX["rsp"]] = CODE, STACK
    memory = os.memfd_create("memory")
    try:
        os.pwrite(memory, struct.pack("<4Q", CODE + 5, CODE + 5, 0, 0), STACK)
        assert [f.file.path for f in _walk(stacks, registers, memory)] == ["/lib/x.so"] * 3
        monkeypatch.setattr(maps, "read_maps", lambda pid: MAPS.replace(b" 7 ", b" 8 ").replace(b"x.so", b"y.so"))
        assert [f.file.path for f in _walk(stacks, registers, memory)] == ["/lib/x.so"] * 3
        stacks.changed(1)
        assert _walk(stacks, registers, memory)[0].file.path == "/lib/y.so"
        assert [w.path for w in wanted] == ["/lib/x.so", "/lib/y.so"]
        stacks.ask_again()
        _walk(stacks, registers, memory)
        assert [w.path for w in wanted] == ["/lib/x.so", "/lib/y.so", "/lib/y.so"]
        stacks.gone(1)
        assert stacks._spaces == {}
    finally:
        os.close(memory)


def _walk(stacks: Stacks, registers: list[int], memory: int):  # type: ignore[no-untyped-def]
    packed = stacks.walk(1, registers, memory, 127)
    return unpack(packed, {n: stacks.file(n) for n in numbers_of(packed)}).frames


def test_a_frame_pointer_that_changed_is_noticed() -> None:
    """The words of the remembered walk are all as they were, but for the saved rbp, which leads elsewhere now."""
    saves = Rule(Cfa.REGISTER, RSP, 16, 0, False, (Place(RBP, At.CFA, 0, -16), Place(RA, At.CFA, 0, -8)))
    framed = Rule(Cfa.REGISTER, RBP, 16, 0, False, (Place(RA, At.CFA, 0, -8),))
    stacks = fresh(table_of([saves, framed]))
    registers = [0] * len(INDEX)
    registers[INDEX["rip"]], registers[INDEX["rsp"]] = CODE, STACK
    content = [0] * 16
    content[0:2] = [STACK + 4 * 8, CODE + STRIDE + 1]
    content[5], content[9] = 0, CODE + STRIDE + 2
    memory = os.memfd_create("memory")
    try:
        os.pwrite(memory, struct.pack("<16Q", *content), STACK)
        assert len(_walk(stacks, registers, memory)) == 2
        os.pwrite(memory, struct.pack("<Q", STACK + 8 * 8), STACK)
        assert len(_walk(stacks, registers, memory)) == 3
    finally:
        os.close(memory)
