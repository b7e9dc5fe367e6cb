"""Packed stacks, and how they are shown."""

from __future__ import annotations

import contextlib
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trapline.cli.folded import OTHER, Folded
from trapline.cli.rows import Lines
from trapline.errors import ProtocolError
from trapline.protocol.hits import Header, HitBatch, decode, row_dtype, schema
from trapline.protocol.stacks import (
    BY_FRAME_POINTER,
    MAX_DEPTH,
    End,
    Frame,
    StackFile,
    folded,
    numbers_of,
    place,
    text,
    unpack,
)

FILES = {1: StackFile("/usr/bin/app", build_id="aa"), 2: StackFile("/lib/libc.so.6")}


def pack(end: int, *frames: tuple[int, int]) -> bytes:
    return struct.pack(f"<{len(frames) + 1}Q", end, *(file << 32 | offset for file, offset in frames))


def test_unpacking() -> None:
    packed = pack(End.NO_TABLE_YET | BY_FRAME_POINTER, (1, 0x40), (2, 0xFFFF_FFFF), (9, 1))
    stack = unpack(packed, FILES)
    assert stack.frames == (Frame(FILES[1], 0x40), Frame(FILES[2], 0xFFFF_FFFF), Frame(StackFile(""), 1))
    assert (stack.end, stack.by_frame_pointer, stack.is_whole) == (End.NO_TABLE_YET, True, False)
    assert numbers_of(packed) == {1, 2, 9}


@pytest.mark.parametrize("packed", [b"", b"1234567", pack(99), pack(0, *[(1, 1)] * (MAX_DEPTH + 1))])
def test_what_is_no_stack(packed: bytes) -> None:
    with pytest.raises(ProtocolError):
        unpack(packed, FILES)


@given(st.binary(max_size=100))
def test_any_bytes(data: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        unpack(data, FILES)


def name(frame: Frame) -> tuple[str, ...]:
    return ("inlined", "f;\n") if frame.offset == 1 else (place(frame),)


def test_showing() -> None:
    whole = unpack(pack(End.COMPLETE, (2, 0x10), (1, 1)), FILES)
    cut = unpack(pack(End.FAULT, (2, 0x10), (7, 2)), FILES)
    assert text(whole) == "libc.so.6+0x10 <- app+0x1"
    assert text(whole, name) == "libc.so.6+0x10 <- inlined <- f;\n"
    assert text(cut) == "libc.so.6+0x10 <- 0x2 <- [fault]"
    assert folded(whole, name, root=("a;b",)) == "a:b;f: ;inlined;libc.so.6+0x10"
    assert folded(cut) == "[fault];0x2;libc.so.6+0x10"
    assert folded(unpack(pack(End.LIMIT, (1, 3)), FILES)) == "app+0x3"


def batch() -> HitBatch:
    columns = schema([("stack", "stack"), ("n", "u64"), ("caller", "stack")])
    rows = np.zeros(4, row_dtype(columns))
    rows["pid"] = rows["tid"] = [7, 7, 8, 7]
    rows["stack"], rows["caller"], rows["n"] = [0, 0, 0, 1], 2, 5
    header = Header(
        *("h", "p", "s", 0, 4, 0, 0, 0, columns),
        strings=[pack(End.COMPLETE, (2, 0x10), (1, 1)), pack(End.LOOP, (2, 0x20)), pack(End.LIMIT, (1, 4))],
        files=FILES,
        sites=["libc.so.6:f"],
        comms={7: "app"},
    )
    return decode(HitBatch(header, {c: rows[c] for c in rows.dtype.names or ()}).encode())


def test_lines_for_people_have_the_frames_below_the_hit() -> None:
    lines = Lines(name).text(batch()).splitlines()
    assert [line.split(" ", 1)[1] if line[0] != " " else line for line in lines[-7:]] == [
        "8  libc.so.6:f(n=5, caller=app+0x4)",
        "        libc.so.6+0x10",
        "        inlined",
        "        f;\\n",
        "7 app libc.so.6:f(n=5, caller=app+0x4)",
        "        libc.so.6+0x20",
        "        [loop]",
    ]


def test_ndjson_has_them_on_one_line() -> None:
    (first, *_) = Lines().ndjson(batch()).splitlines()
    assert '"stack":"libc.so.6+0x10 <- app+0x1"' in first
    assert '"caller":"app+0x4"' in first
    assert [h.args["stack"] for h in batch().hits()][3] == "libc.so.6+0x20 <- [loop]"


def test_folding_counts_each_stack_under_its_process() -> None:
    counted = Folded(name)
    counted.add(batch())
    counted.add(batch(), 1)
    assert counted.counts == {
        "app;f: ;inlined;libc.so.6+0x10": 3,
        "f: ;inlined;libc.so.6+0x10": 1,
        "app;[loop];libc.so.6+0x20": 1,
    }


def test_folding_is_bounded() -> None:
    counted = Folded(name, most=1)
    counted.add(batch())
    assert sum(counted.counts.values()) == 4
    assert len(counted.counts) == 2
    assert counted.counts[OTHER] > 0


def test_a_batch_whose_stacks_are_none_is_refused() -> None:
    whole = batch()
    whole.header.strings[0] = b"abc"
    with pytest.raises(ProtocolError):
        decode(whole.encode())
    whole.header.strings[:] = []
    with pytest.raises(ProtocolError):
        decode(whole.encode())
