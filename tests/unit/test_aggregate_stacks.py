"""Stacks as keys of aggregates: files have other numbers at each source, and are the same by build-id or path."""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Mapping
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trapline.aggregates import Cell, Key, Table
from trapline.errors import ProtocolError, SpecError
from trapline.model import Aggregate
from trapline.protocol import aggregates as wire
from trapline.protocol.stacks import End, Files, Frame, StackFile, unpack
from trapline.spec import parse_probe
from trapline.tables import FrameList, table_of

FILES = [StackFile(f"/lib/{n}.so", f"{n:040x}", f"fe:00 {n}") for n in range(4)] + [
    StackFile("/app", "", "fe:00 77"),
    StackFile("[anon]"),
    StackFile(""),
]
Stack = tuple[int, tuple[tuple[int, int], ...]]
"""A stack by index in ``FILES``: its end, and frames."""
a_stack: st.SearchStrategy[Stack] = st.tuples(
    st.sampled_from([0, 1, 4, 0x103]),
    st.lists(st.tuples(st.integers(0, len(FILES) - 1), st.integers(0, 3)), max_size=4).map(tuple),
)
some_hits = st.lists(st.tuples(a_stack, st.integers(0, 1)), max_size=12)


class Source:
    """A tracer of some host, which numbers files as it meets them."""

    def __init__(self, name: str, order: list[int], rename: str = "") -> None:
        self.name = name
        self._numbers = {file: number for number, file in enumerate(order, 1)}
        self._files = {
            number: msgspec.structs.replace(FILES[file], path=rename + FILES[file].path, file=f"{name} {file}")
            if FILES[file].build_id
            else FILES[file]
            for file, number in self._numbers.items()
        }
        self.seq = 0

    def packed(self, stack: Stack) -> bytes:
        end, frames = stack
        return struct.pack(f"<{1 + len(frames)}Q", end, *(self._numbers[f] << 32 | at for f, at in frames))

    def frames(self, hits: list[tuple[Stack, int]], max_bytes: int = wire.FRAME_BYTES) -> list[bytes]:
        table = Table(1000)
        for stack, number in hits:
            table.cell(((number, 0), (self.packed(stack), int(stack[0] > 1)))).count += 1
        sent = wire.split(
            table.cells.items(), None, host="h", probe="p", source=self.name, seq=self.seq, begin_ns=1, end_ns=2,
            max_bytes=max_bytes, of_stacks=[1], file=self._files.__getitem__,
        )  # fmt: skip
        self.seq += sum(count for count, _ in sent)
        return [frame for _, frame in sent]


def known(table: Table) -> Counter[tuple[Any, ...]]:
    """Returns hits by what a key means, whatever its files' numbers are."""
    counts: Counter[tuple[Any, ...]] = Counter()
    for (number, (packed, _)), cell in table.cells.items():
        assert isinstance(packed, bytes)
        found = unpack(packed, table.files.by_number)
        where = tuple((f.file.build_id or f.file.path, f.offset) for f in found.frames)
        counts[number[0], found.end, found.by_frame_pointer, where] += cell.count
    assert len(counts) == len(table.cells), "one row of each key"
    return counts


def meant(hits: list[tuple[Stack, int]]) -> Counter[tuple[Any, ...]]:
    counts: Counter[tuple[Any, ...]] = Counter()
    for (end, frames), number in hits:
        where = tuple((FILES[f].build_id or FILES[f].path, at) for f, at in frames)
        counts[number, End(end & 0xFF), bool(end & 0x100), where] += 1
    return counts


def added(*frames: bytes) -> Table:
    table = Table(10_000)
    for frame in frames:
        wire.decode(frame).add_to(table)
    return table


orders = st.permutations(range(len(FILES)))


@given(some_hits, some_hits, some_hits, st.tuples(orders, orders, orders))
def test_sources_add_up_in_any_order(
    a: list[tuple[Stack, int]], b: list[tuple[Stack, int]], c: list[tuple[Stack, int]], numbering: tuple[list[int], ...]
) -> None:
    """Three hosts, each with its own numbers, paths and inodes."""
    sources = [Source(f"s{i}", order, rename=f"/mnt/{i}") for i, order in enumerate(numbering)]
    x, y, z = (s.frames(hits, max_bytes=200) for s, hits in zip(sources, (a, b, c), strict=True))
    wanted = meant(a + b + c)
    for frames in ([*x, *y, *z], [*z, *y, *x], [*y, *z, *x]):
        assert known(added(*frames)) == wanted
    # And in parts, which have been kept in between: (x + y) + z, x + (y + z)
    for first, second in (([*x, *y], z), (x, [*y, *z])):
        whole = Table(10_000)
        for part in (first, second):
            wire.unpack(wire.pack(added(*part)), whole)
        assert known(whole) == wanted


@given(st.lists(some_hits.filter(bool), min_size=2, max_size=4), orders)
def test_what_waits_in_an_outbox_is_one_frame(rounds: list[list[tuple[Stack, int]]], order: list[int]) -> None:
    source = Source("s", order)
    merged: bytes | None = None
    for hits in rounds:
        (frame,) = source.frames(hits)
        merged = frame if merged is None else wire.merged(merged, frame)
        assert merged is not None
    assert merged is not None
    delta = wire.decode(merged)
    assert (delta.seq, delta.count) == (0, sum(map(len, rounds)))
    assert known(added(merged)) == meant([hit for hits in rounds for hit in hits])
    assert set(delta.files) == {n for e in delta.entries for n in _numbers(e.key)}


def _numbers(key: Key) -> set[int]:
    packed = key[1][0]
    assert isinstance(packed, bytes)
    return {word >> 32 for word in struct.unpack(f"<{len(packed) // 8}Q", packed)[1:]} - {0}


def test_a_frame_stays_within_its_bytes() -> None:
    """Many deep stacks through many files with long names: the files count too."""
    files = {n: StackFile(f"/{'x' * 300}/{n}", f"{n:040x}") for n in range(1, 2001)}
    rows = [((struct.pack("<21Q", 0, *((n + i) << 32 | i for i in range(20))), 0),) for n in range(1, 1900)]
    sent = wire.split(
        ((key, Cell(count=3)) for key in rows), None, host="h", probe="p", source="s", seq=0, begin_ns=1, end_ns=2,
        of_stacks=[0], file=files.__getitem__,
    )  # fmt: skip
    assert len(sent) > 1
    assert all(len(frame) < wire.FRAME_BYTES + 10_000 for _, frame in sent)
    table = added(*(frame for _, frame in sent))
    assert (table.count, len(table.cells)) == (3 * len(rows), len(rows))


def test_a_row_that_no_frame_holds_counts_as_other_keys() -> None:
    packed = struct.pack("<1001Q", 0, *(n << 32 for n in range(1, 1001)))
    sent = wire.split(
        [(((packed, 0),), Cell(count=5)), (((b"\0" * 8, 0),), Cell(count=2))], Cell(count=1), host="h", probe="p",
        source="s", seq=0, begin_ns=1, end_ns=2, of_stacks=[0], file=lambda n: StackFile(f"{n}" + "y" * 9000),
    )  # fmt: skip
    ((count, frame),) = sent
    delta = wire.decode(frame)
    assert (count, delta.other and delta.other.cell.count, len(delta.entries)) == (8, 6, 1)


def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trapline.aggregates.MAX_STACK_BYTES", 40)
    source = Source("s", list(range(len(FILES))))
    stacks: list[Stack] = [(0, ((i, 1),)) for i in range(4)]
    table = added(*source.frames([(s, 0) for s in stacks] * 3))
    assert len(table.cells) == 2
    assert (table.other and table.other.count, table.count) == (6, 12)
    monkeypatch.setattr("trapline.protocol.stacks.MAX_FILES", 2)
    files = Files()
    assert [files.number(StackFile(p)) for p in "abca"] == [1, 2, 0, 1]


def test_rows_of_another_key_count_and_no_more() -> None:
    """A probe that was changed, or an agent that sends nonsense."""
    (stacks,) = Source("s", list(range(len(FILES)))).frames([((0, ((0, 1),)), 0)] * 3)
    plain = Table(9)
    plain.cell(((1, 0), (b"x", 0))).count = 4
    ((_, other),) = wire.split(
        plain.cells.items(), Cell(count=2), host="h", probe="p", source="t", seq=0, begin_ns=1, end_ns=2
    )  # fmt: skip
    for first, second, rows in ((stacks, other, (1, 6)), (other, stacks, (1, 5))):
        table = added(first, second)
        assert (len(table.cells), table.other and table.other.count, table.count) == (*rows, 9)
    with pytest.raises(ProtocolError, match="another key"):
        wire.unpack(wire.pack(added(stacks)), added(other))


def frame(change: Mapping[str, object] | None = None) -> bytes:
    packed = struct.pack("<3Q", 1, 1 << 32 | 5, 2 << 32 | 6)
    sound: dict[str, object] = {
        "host": "h", "probe": "p", "source": "s", "seq": 0, "count": 2, "begin_ns": 1, "end_ns": 2,
        "entries": [[[[7, 0], [packed, 0]], {"count": 2}]], "stacks": [1],
        "files": {1: {"path": "/a"}, 2: {"path": "/b", "build_id": "00"}},
    }  # fmt: skip
    return wire.MAGIC + msgspec.msgpack.encode(sound | (change or {}))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"files": {1: {"path": "/a"}}}, "file 2, which is not told"),
        ({"stacks": [1, 1]}, "at \\[1, 1\\]"),
        ({"stacks": [1, 99]}, "at \\[1, 99\\]"),
        ({"stacks": [-1]}, "at \\[-1\\]"),
        ({"stacks": [1, 2]}, "number 2 is a stack"),
        ({"stacks": [0, 1]}, "a stack that is none"),
        ({"files": {1: {"path": "/" * 5000}, 2: {"path": ""}}}, "longer than any"),
        ({"entries": [[[[7, 0], [b"x" * 7, 0]], {"count": 2}]]}, "7 bytes"),
        ({"entries": [[[[7, 0], [b"x" * 8, 0]], {"count": 2}]]}, "ends for the reason"),
        ({"entries": [[[[7, 0], [b"\0" * 8 * 1026, 0]], {"count": 2}]]}, "8208 bytes"),
        ({"entries": [[[[7, 0], [b"\0" * 8, 999]], {"count": 2}]]}, "status"),
        ({"entries": [[[[7, 0], [None, 999]], {"count": 2}]]}, "status"),
        ({"entries": [[[[7, 0], [None, 0]], {"count": 2}]]}, "a stack that is none"),
    ],
)
def test_frames_that_contradict_themselves_are_refused(change: dict[str, object], says: str) -> None:
    wire.decode(frame())
    with pytest.raises(ProtocolError, match=says):
        wire.decode(frame(change))


@given(st.data())
def test_foreign_bytes_are_shown_or_an_error(data: st.DataObject) -> None:
    """Whatever passes can be added, kept, and shown."""
    bytes_ = bytearray(frame())
    for _ in range(data.draw(st.integers(1, 4))):
        bytes_[data.draw(st.integers(4, len(bytes_) - 1))] = data.draw(st.integers(0, 255))
    try:
        table = added(bytes(bytes_))
    except ProtocolError:
        return
    again = Table(10)
    wire.unpack(wire.pack(table), again)
    assert again.count == table.count
    table_of(Aggregate(text="", function="count", by=["pid", "ustack()"]), table).model_dump_json()
    table_of(Aggregate(text="", function="count"), table).model_dump_json()


def test_rows_have_places_and_frames() -> None:
    one, other = (Source(s, order) for s, order in (("a", list(range(7))), ("b", list(reversed(range(7))))))
    down: Stack = (0, ((0, 16), (4, 32), (0, 64)))
    cut: Stack = (4, ((0, 16), (6, 3)))
    table = added(*one.frames([(down, 0)] * 2 + [(cut, 0)]), *other.frames([(down, 0)] * 5))
    said = table_of(Aggregate(text="", function="count", by=["pid", "ustack()"]), table)
    assert [(r.key, r.key_status, r.count) for r in said.rows] == [
        ([0, "0.so+0x10 <- app+0x20 <- 0.so+0x40"], ["", ""], 7),
        ([0, "0.so+0x10 <- 0x3 <- [fault]"], ["", "truncated"], 1),
    ]
    assert [[(said.frames[i].path, said.frames[i].offset) for i in r.stacks["ustack()"]] for r in said.rows] == [
        [("/lib/0.so", 16), ("/app", 32), ("/lib/0.so", 64)],
        [("/lib/0.so", 16), ("", 3)],
    ]
    assert said.frames[0].build_id == FILES[0].build_id
    assert len(said.frames) == 4
    frames = FrameList()
    assert [frames.index(Frame(f, 1)) for f in (FILES[0], FILES[1], FILES[0])] == [0, 1, 0]


def test_a_stack_is_no_value() -> None:
    for text in ("topk(ustack(), 5)", "distinct(ctx.caller)", "sum(ustack(3))"):
        with pytest.raises(SpecError, match="a stack is grouped by") as e:
            parse_probe(f"app:f -> {text} by (pid)")
        assert "count() by (" in e.value.hint
    assert parse_probe("app:f -> count() by (ustack(5), caller)").aggregate == Aggregate(
        text="count() by (ustack(5), caller)", function="count", value="", by=["ustack(5)", "caller"]
    )
