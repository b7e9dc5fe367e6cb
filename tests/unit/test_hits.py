"""The hit codec: what was encoded is what is read, and foreign bytes are refused, never believed."""

from __future__ import annotations

import math
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trapline.errors import ProtocolError
from trapline.model import Hit
from trapline.protocol import hits
from trapline.protocol.hits import FIXED, Header, HitBatch, ValueStatus
from trapline.protocol.stacks import BY_FRAME_POINTER, End, StackFile

_WORD = st.integers(0, 2**64 - 1)


@st.composite
def batches(draw: st.DrawFn) -> HitBatch:
    names = draw(st.lists(st.text("abcxyz0()", min_size=1, max_size=8), unique=True, max_size=4))
    captured = [(n, draw(st.sampled_from(sorted(hits.VALUE_TYPES)))) for n in names if n not in dict(FIXED)]
    count = draw(st.integers(1, 9))
    frames = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2**32 - 1)), max_size=9)
    words = st.tuples(st.sampled_from(End), st.sampled_from([0, BY_FRAME_POINTER]), frames)
    packed = words.map(lambda s: struct.pack(f"<{len(s[2]) + 1}Q", s[0] | s[1], *(f << 32 | o for f, o in s[2])))
    texts = packed if any(kind == "stack" for _, kind in captured) else st.binary(max_size=12)
    strings = draw(st.lists(texts, min_size=1, max_size=5))
    columns = hits.schema(captured)
    values = {}
    for c in columns:
        top = {"u64": 2**64 - 1, "u32": 2**32 - 1, "i64": 2**63 - 1, "u8": 6, "bool": 1}.get(c.type, len(strings) - 1)
        bottom = -(2**63) if c.type == "i64" else 0
        value = st.floats() if c.type == "f64" else st.integers(bottom, top)
        values[c.name] = np.array(draw(st.lists(value, min_size=count, max_size=count)), hits.row_dtype([c])[0])
    values["ts"] = values["ts"] % np.uint64(2**60)
    header = Header(
        host="h",
        probe="p",
        source="s",
        seq=draw(st.integers(0, 2**40)),
        count=count,
        t0=0,
        t1=0,
        clock_offset=draw(st.integers(0, 2**60)),
        columns=columns,
        strings=strings,
        files={1: StackFile("/lib/x.so", build_id="ab", file="08:01 7"), 2: StackFile("[vdso]")},
        sites=["lib:f"],
        comms={1: "one"},
        drops=draw(st.dictionaries(st.sampled_from(["tracer-ring", "x"]), st.integers(1, 9))),
    )
    return HitBatch(header, values)


@given(batches())
def test_round_trip(batch: HitBatch) -> None:
    frame = batch.encode()
    assert len(frame) % 8 == 0
    read = hits.decode(frame)
    assert read.header == batch.header
    for name, column in batch.columns.items():
        assert read.columns[name].tobytes() == column.tobytes()
        if read.columns[name].dtype.itemsize == 8:
            assert read.columns[name].ctypes.data % 8 == np.frombuffer(frame, "u1").ctypes.data % 8
    rows = list(read.hits())
    assert [h.seq for h in rows] == list(range(batch.header.seq, batch.header.seq + batch.header.count))
    for i, hit in enumerate(rows):
        for name, value in hit.args.items():
            status = ValueStatus(int(batch.columns[name + "?"][i]))
            assert (value is None) == (status > ValueStatus.TRUNCATED)
            kind = next(c.type for c in batch.header.columns if c.name == name)
            match kind, value:
                case "bytes", str():
                    assert bytes.fromhex(value) == batch.header.strings[batch.columns[name][i]]
                case (("u64" | "i64"), (int() | str())):
                    assert int(value) == int(batch.columns[name][i])
                    assert isinstance(value, str) == (abs(int(value)) > 2**53)
                case "f64", (float() | str()):
                    assert repr(float(value)) == repr(float(batch.columns[name][i]))
                    assert isinstance(value, float) == math.isfinite(float(value))
                case "bool", _:
                    assert value in (None, True, False)
                case _:
                    assert value is None or kind in ("str", "stack")
            assert Hit.model_validate_json(hit.model_dump_json()).args[name] == value


@given(st.binary(max_size=400))
def test_random_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        hits.decode(data)


@given(batches(), st.data())
def test_a_changed_frame_is_refused_or_read_within_its_bounds(batch: HitBatch, data: st.DataObject) -> None:
    frame = bytearray(batch.encode())
    for _ in range(data.draw(st.integers(1, 3))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(frame)))
    for candidate in (bytes(frame), bytes(frame[:cut])):
        try:
            list(hits.decode(candidate).hits())
        except ProtocolError:
            continue


def test_what_is_malformed_is_named() -> None:
    header = Header("h", "p", "s", 0, 1, 0, 0, 0, hits.schema([]))
    good = HitBatch(header, {n: np.zeros(1, hits.row_dtype(hits.schema([]))[n]) for n, _ in FIXED}).encode()
    for frame, says in (
        (b"TLH2" + good[4:], "not a hit batch"),
        (good[:-8], "should have"),
        (good + bytes(8), "should have"),
        (good[:3], "shorter"),
        (good[:4] + b"\xff\xff\xff\x7f" + good[8:], "does not fit"),
    ):
        with pytest.raises(ProtocolError, match=says):
            hits.decode(frame)


def test_a_column_that_is_named_as_a_status_is_one() -> None:
    """The fuzzer's: a text called ``?`` has no status of its own."""
    columns = [*hits.schema([]), hits.Column("?", "str")]
    header = Header(
        host="h", probe="p", source="s", seq=0, count=1, t0=0, t1=0, clock_offset=0, columns=columns, strings=[b"x"]
    )
    rows = np.zeros(1, hits.row_dtype(columns))
    with pytest.raises(ProtocolError, match="named as a status"):
        hits.decode(HitBatch(header, {c.name: rows[c.name] for c in columns}).encode())
