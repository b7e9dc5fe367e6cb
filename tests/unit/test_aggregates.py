"""Cells, their addition, and what they promise: against numpy, plain Python, and others' sketches."""

from __future__ import annotations

import collections
import copy
import math
import random
from typing import get_args

import ddsketch
import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trapline.aggregates import (
    ACCURACY,
    Cell,
    Function,
    Key,
    Part,
    Table,
    bounds,
    capacity_of,
    distinct,
    quantile,
    recorder,
    values,
)
from trapline.errors import ProtocolError
from trapline.expressions import AGGREGATES as PARSED
from trapline.model import Aggregate
from trapline.protocol import aggregates as wire
from trapline.tables import row_of, table_of

FORMS: dict[Function, tuple[int, ...]] = {
    "count": (), "sum": (), "min": (), "max": (), "avg": (), "hist": (), "lhist": (-50, 1000, 7),
    "quantiles": (), "topk": (10,), "distinct": (),
}  # fmt: skip
functions = st.sampled_from(sorted(FORMS))
numbers = st.integers(-(1 << 63), (1 << 64) - 1)
parts = st.tuples(numbers, st.sampled_from([0, 0, 0, 2, 3]))


def test_the_parser_knows_the_same_functions() -> None:
    assert set(get_args(Function)) == set(PARSED) == set(FORMS)


def filled(function: Function, given_parts: list[Part]) -> Cell:
    record = recorder(function, FORMS[function])
    cell = Cell()
    for part in given_parts:
        cell.count += 1
        record(cell, part)
    return cell


def added(*cells: Cell) -> Cell:
    whole = Cell()
    for cell in cells:
        whole.add(copy.deepcopy(cell))
    return whole


@given(functions, st.lists(parts, max_size=60), st.lists(parts, max_size=60), st.lists(parts, max_size=60))
def test_cells_add_up_in_any_order(function: Function, a: list[Part], b: list[Part], c: list[Part]) -> None:
    x, y, z = (filled(function, part) for part in (a, b, c))
    whole = filled(function, a + b + c)
    assert added(added(x, y), z) == added(x, added(y, z)) == added(z, y, x) == whole
    assert added(whole, Cell()) == added(Cell(), whole) == whole
    assert whole.count == len(a + b + c)
    assert function == "count" or values(whole) == sum(status <= 1 for _, status in a + b + c)


@given(st.lists(parts, min_size=1, max_size=200))
def test_sums_and_extremes_are_exact(all_parts: list[Part]) -> None:
    good = [value for value, status in all_parts if status <= 1]
    assert filled("sum", all_parts).sum == sum(good)  # type: ignore[arg-type]
    assert filled("min", all_parts).min == min(good, default=None)  # type: ignore[type-var]
    assert filled("max", all_parts).max == max(good, default=None)  # type: ignore[type-var]


@given(st.sampled_from(["hist", "lhist"]), numbers)
def test_a_value_is_in_its_bucket(function: Function, value: int) -> None:
    (bin,) = filled(function, [(value, 0)]).bins
    low, high = bounds(function, list(FORMS[function]), bin)
    assert low is None or low <= value
    assert high is None or value < high


def test_buckets_of_hist_are_those_of_bpftrace() -> None:
    cell = filled("hist", [(v, 0) for v in (0, 1, 2, 3, 4, 7, 8, 1023, 1024)])
    said = [(b.low, b.high, b.count) for b in row_of(Aggregate(text="", function="hist"), (), cell).buckets if b.count]
    assert said == [(0, 1, 1), (1, 2, 1), (2, 4, 2), (4, 8, 2), (8, 16, 1), (512, 1024, 1), (1024, 2048, 1)]


samples = st.one_of(
    st.lists(st.integers(0, 1 << 64).map(lambda v: v - 1) | st.integers(-(1 << 63), 100), min_size=1, max_size=300),
    st.lists(st.floats(1e-8, 1e18) | st.floats(-1e18, -1e-8), min_size=1, max_size=300),
)


@given(samples, st.sampled_from([0.0, 0.5, 0.9, 0.99, 1.0]) | st.floats(0, 1))
def test_quantiles_are_within_the_promise(sample: list[int | float], q: float) -> None:
    cell = filled("quantiles", [(value, 0) for value in sample])
    true = float(sorted(sample)[math.floor(q * (len(sample) - 1))])
    found = quantile(cell, q)
    assert found is not None
    assert abs(found - true) <= abs(true) * ACCURACY * (1 + 1e-9)


@pytest.mark.parametrize("q", [0.01, 0.25, 0.5, 0.9, 0.99, 0.999])
def test_quantiles_against_numpy_and_ddsketch(q: float) -> None:
    """Latencies as they are: many short, few long. Added up from a hundred parts."""
    sample = np.random.default_rng(7).lognormal(9, 2, 50_000).astype(np.int64) + 1
    whole = added(*(filled("quantiles", [(v, 0) for v in part.tolist()]) for part in np.array_split(sample, 100)))
    found = quantile(whole, q)
    assert found is not None
    true = np.quantile(sample, q, method="lower")
    assert abs(found - true) <= true * ACCURACY
    theirs = ddsketch.DDSketch(ACCURACY)
    for value in sample.tolist():
        theirs.add(value)
    assert found == pytest.approx(theirs.get_quantile_value(q), rel=1e-9)


@pytest.mark.parametrize("n", [0, 1, 10, 1000, 5_000, 20_000, 200_000])
def test_distinct_is_within_its_standard_error(n: int) -> None:
    whole = added(
        filled("distinct", [(v, 0) for v in range(0, n, 2)]),
        filled("distinct", [(v, 0) for v in range(1, n, 2)]),
        filled("distinct", [(v, 0) for v in range(n)]),  # again: nothing new
    )
    assert abs(distinct(whole) - n) <= 3 * 1.04 / 64 * n


def test_distinct_is_unbiased() -> None:
    """Over many sets of each size, also where the estimators of HyperLogLog's first paper meet."""
    rng = random.Random(3)
    for n in (100, 4_000, 12_000, 30_000):
        errors = []
        for _ in range(12):
            salt = rng.getrandbits(64).to_bytes(8, "little")
            errors.append(distinct(filled("distinct", [(salt + i.to_bytes(4, "little"), 0) for i in range(n)])) / n - 1)
        assert abs(sum(errors) / len(errors)) < 0.012


items = st.lists(st.integers(0, 400), max_size=1500)


@given(st.lists(items, min_size=1, max_size=4), st.randoms(use_true_random=False))
def test_frequent_items_keep_their_promise(streams: list[list[int]], order: random.Random) -> None:
    """Whatever comes in whatever order: no count too large, none too small by more than is said."""
    true = collections.Counter(v for stream in streams for v in stream)
    cells = [filled("topk", [(v, 0) for v in stream]) for stream in streams]
    order.shuffle(cells)
    whole = added(*cells)
    for value, count in true.items():
        assert count - whole.error <= whole.items.get((value, 0), 0) <= count
    assert whole.error * (capacity_of("topk", (10,)) + 1) <= whole.count
    if len(true) <= 2 * capacity_of("topk", (10,)):
        assert whole.error == 0


def test_frequent_items_among_very_many() -> None:
    """More different values than are kept, some of them frequent: these are found, and no count is off by more than said."""
    rng = random.Random(5)
    streams = [[int(rng.paretovariate(0.6)) for _ in range(8_000)] for _ in range(5)]
    true = collections.Counter(v for stream in streams for v in stream)
    whole = added(*(filled("topk", [(v, 0) for v in stream]) for stream in streams))
    assert len(true) > 5 * len(whole.items)
    assert whole.error > 0
    for value, count in true.items():
        assert count - whole.error <= whole.items.get((value, 0), 0) <= count
    assert whole.error * (capacity_of("topk", (10,)) + 1) <= whole.count
    top = [item[0] for item in sorted(whole.items, key=lambda item: -whole.items[item])[:5]]
    assert top == [value for value, _ in true.most_common(5)]


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(1, 5)), max_size=80))
def test_a_full_table_counts_on(hits: list[tuple[int, int]]) -> None:
    table = Table(5)
    for key, count in hits:
        table.cell(((key, 0),)).count += count
    assert table.count == sum(count for _, count in hits)
    assert len(table.cells) == min(5, len({key for key, _ in hits}))
    assert (table.other is not None) == (len({key for key, _ in hits}) > 5)
    again = Table(3)
    again.add(table.cells.items(), table.other)
    assert again.count == table.count


# --- frames ----------------------------------------------------------------------------------------------------------


def frames(table: Table, **more: int) -> list[tuple[int, bytes]]:
    return wire.split(
        table.cells.items(), table.other, host="h", probe="p", source="s", seq=7, begin_ns=1, end_ns=2,
        drops={"tracer-socket": 3}, max_bytes=more.get("max_bytes", wire.FRAME_BYTES),
    )  # fmt: skip


keys = st.lists(parts | st.tuples(st.binary(max_size=20), st.integers(0, 6)), max_size=3).map(tuple)


@given(functions, st.dictionaries(keys, st.lists(parts, min_size=1, max_size=20), min_size=1, max_size=12))
def test_what_is_sent_arrives(function: Function, rows: dict[Key, list[Part]]) -> None:
    table = Table(8)
    for key, row in rows.items():
        table.cell(key).add(filled(function, row))
    wanted = copy.deepcopy(table)
    arrived = Table(8)
    seq = 7
    for number, (count, frame) in enumerate(frames(table, max_bytes=200)):
        delta = wire.decode(frame)
        head = wire.peek(frame)
        assert (head.host, head.probe, head.source, head.seq, head.count) == ("h", "p", "s", seq, count)
        assert head.drops == delta.drops == ({} if number else {"tracer-socket": 3})
        arrived.add(delta.cells(), delta.other.cell if delta.other else None)
        seq += count
    assert seq - 7 == wanted.count
    assert (arrived.cells, arrived.other) == (wanted.cells, wanted.other)


def test_a_sum_beyond_64_bits_is_exact() -> None:
    for value in (1 << 117, -(1 << 117), (1 << 62) - 1, -(1 << 62)):
        table = Table(1)
        table.add([((), Cell(count=1, sum=value))])
        ((_, frame),) = frames(table)
        assert wire.decode(frame).entries[0].cell.sum == value


def _sound() -> bytes:
    table = Table(2)
    for i in range(4):
        table.cell(((b"key", 0), (i, 3))).add(filled("quantiles", [(5, 0), (-7, 0), (0, 2)]))
        table.cell(((b"key", 0), (i, 3))).add(filled("topk", [(5, 0), (b"abc", 1)]))
        table.cell(((b"key", 0), (i, 3))).add(filled("distinct", [(5, 0), (b"abc", 1)]))
    return frames(table)[0][1]


@given(st.data())
def test_foreign_bytes_are_a_frame_or_an_error(data: st.DataObject) -> None:
    frame = bytearray(_sound())
    for _ in range(data.draw(st.integers(1, 4))):
        frame[data.draw(st.integers(4, len(frame) - 1))] = data.draw(st.integers(0, 255))
    frame = frame[: data.draw(st.integers(4, len(frame)))]
    for read in (wire.decode, wire.peek, wire.head):
        try:
            read(bytes(frame))
        except ProtocolError:
            continue


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"count": 0}, "count 0"),
        ({"count": 99}, "another number"),
        ({"seq": -1}, "sequence -1"),
        ({"drops": {"x": -1}}, "drops"),
        ({"begin_ns": 3, "end_ns": 2}, "times"),
        ({"entries": [[[], {"count": 2, "bins": {0: 3}}]]}, "counts more"),
        ({"entries": [[[], {"count": 2, "bins": {0: -1}}]]}, "counts more"),
        ({"entries": [[[], {"count": -2}]]}, "less than nothing"),
        ({"entries": [[[], {"count": 2, "bins": {1 << 40: 1}}]]}, "bucket"),
        ({"entries": [[[], {"count": 2, "registers": {4096: 1}}]]}, "register"),
        ({"entries": [[[], {"count": 2, "registers": {1: 99}}]]}, "register"),
        ({"entries": [[[], {"count": 2, "sum": math.inf}]]}, "no number"),
        ({"entries": [[[[1, 999]], {"count": 2}]]}, "status"),
        ({"entries": [[[[b"x" * 5000, 0]], {"count": 2}]]}, "5000 bytes"),
        ({"entries": [[[[1, 0]] * 17, {"count": 2}]]}, "17 values"),
        ({"entries": [[[], {"count": 2, "sum": 0.5}, 1]]}, "half a sum"),
    ],
)
def test_frames_that_contradict_themselves_are_refused(change: dict[str, object], says: str) -> None:
    sound: dict[str, object] = {
        "host": "h", "probe": "p", "source": "s", "seq": 0, "count": 2, "begin_ns": 1, "end_ns": 2,
        "entries": [[[], {"count": 2}]],
    }  # fmt: skip
    wire.decode(wire.MAGIC + msgspec.msgpack.encode(sound))
    with pytest.raises(ProtocolError, match=says):
        wire.decode(wire.MAGIC + msgspec.msgpack.encode(sound | change))


# --- rows ------------------------------------------------------------------------------------------------------------


def test_rows_say_what_cells_know() -> None:
    table = Table(2)
    for key, part in [((b"a\xff", 0), (1 << 60, 0)), ((None, 3), (5, 0)), ((b"a\xff", 0), (0, 2)), ((9, 0), (7, 0))]:
        cell = table.cell((key,))
        cell.count += 1
        recorder("sum", ())(cell, part)
    said = table_of(Aggregate(text="sum(arg0) by (str(arg1))", function="sum"), table, probe="p")
    assert (said.count, said.keys) == (4, 2)
    assert [(r.key, r.key_status, r.count, r.value, r.bad) for r in said.rows] == [
        (["a\\xff"], [""], 2, str(1 << 60), {"null": 1}),
        ([None], ["fault"], 1, 5, {}),
    ]
    assert said.other is not None
    assert said.other.value == 7
    assert len(table_of(said.aggregate, table, top=1).rows) == 1


def test_a_bucket_that_there_is_not_is_left_out() -> None:
    """An agent may send anything."""
    for function in ("hist", "lhist"):
        aggregate = Aggregate(text="", function=function, parameters=list(FORMS[function]))
        cell = Cell(count=9, bins={16384: 4, -16384: 4, 2: 1})
        assert [b.count for b in row_of(aggregate, (), cell).buckets] == [1]


def test_rows_of_each_function() -> None:
    def row(function: Function) -> object:
        aggregate = Aggregate(text="", function=function, parameters=list(FORMS[function]))
        cell = filled(function, [(v, 0) for v in (3, 3, 90)] + [(0, 3)])
        assert row_of(aggregate, (), Cell()).model_dump_json()
        return row_of(aggregate, (), cell)

    assert [row(f).value for f in ("count", "sum", "min", "max", "avg", "distinct")] == [4, 96, 3, 90, 32.0, 2]  # type: ignore[attr-defined]
    assert [(i.value, i.count) for i in row("topk").items] == [(3, 2), (90, 1)]  # type: ignore[attr-defined]
    assert row("quantiles").quantiles == pytest.approx(  # type: ignore[attr-defined]
        {"0": 3, "0.5": 3, "0.9": 3, "0.95": 3, "0.99": 3, "0.999": 3, "1": 90}, rel=0.01
    )
    assert [(b.low, b.high, b.count) for b in row("lhist").buckets][:2] == [(-1, 6, 2), (6, 13, 0)]  # type: ignore[attr-defined]
