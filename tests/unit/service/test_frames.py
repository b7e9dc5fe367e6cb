"""The fast JSON of hits says what the slow one says."""

from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as some

from tests.unit.service.peers import OFFSET
from trapline.errors import ProtocolError
from trapline.protocol.hits import Header, HitBatch, decode, row_dtype, schema
from trapline.protocol.stacks import StackFile
from trapline_service.frames import HitFrame, rows_json

WORDS = some.one_of(some.integers(0, 2**64 - 1), some.sampled_from([0, 2**53, 2**53 + 1, 2**64 - 1]))


@some.composite
def batches(draw: Any) -> bytes:
    count = draw(some.integers(1, 8))
    columns = schema(
        [("n", "u64"), ("s", "str"), ("t", "stack"), ("i", "i64"), ("f", "f64"), ("b", "bool"), ("x", "bytes")]
    )
    frames = some.lists(some.tuples(some.integers(0, 3), some.integers(0, 2**32 - 1)), max_size=4)
    packed = frames.map(lambda fs: struct.pack(f"<{len(fs) + 1}Q", 4, *(file << 32 | at for file, at in fs)))
    strings = draw(some.lists(packed, min_size=1, max_size=4))
    texts = draw(some.lists(some.binary(max_size=20), min_size=1, max_size=4))
    rows = np.zeros(count, row_dtype(columns))
    for i in range(count):
        # 255 stands for a status of a newer agent.
        status = some.sampled_from([0, 0, 0, 1, 2, 3, 4, 5, 6, 255])
        row = {
            "ts": draw(some.integers(0, 2**40)),
            "pid": draw(some.integers(0, 2**22)),
            "tid": draw(some.integers(0, 2**22)),
            "site": draw(some.integers(0, 2)),
            "n": draw(WORDS),
            "n?": draw(status),
            "s": draw(some.integers(0, len(strings) + len(texts) - 1)),
            "s?": draw(status),
            "t": draw(some.integers(0, len(strings) - 1)),
            "t?": draw(status),
            "i": draw(some.integers(-(2**63), 2**63 - 1)),
            "i?": draw(status),
            "f": draw(some.floats()),
            "f?": draw(status),
            "b": draw(some.integers(0, 1)),
            "b?": draw(status),
            "x": draw(some.integers(0, len(strings) + len(texts) - 1)),
            "x?": draw(status),
        }
        for name, value in row.items():
            rows[name][i] = value
    header = Header(
        host="h",
        probe="p",
        source="s",
        seq=draw(some.integers(0, 2**60)),
        count=count,
        t0=0,
        t1=0,
        clock_offset=OFFSET + draw(some.integers(0, 10**9)),
        columns=columns,
        strings=strings + texts,
        files={1: StackFile("/lib/a.so", build_id="ab", file="08:01 5"), 2: StackFile("[vdso]")},
        sites=["a:f", "a:g"],
        comms={int(rows["pid"][0]): draw(some.text(max_size=15))},
    )
    return HitBatch(header, {name: rows[name] for name in rows.dtype.names or ()}).encode()


@given(batches())
def test_it_equals_the_models(raw: bytes) -> None:
    fast = json.loads(f"[{rows_json(decode(raw))}]")
    slow = [json.loads(hit.model_dump_json()) for hit in decode(raw).hits()]
    assert fast == slow


@pytest.mark.parametrize("change", [{"clock_offset": -(2**62)}, {"clock_offset": 2**63 - 1}, {"seq": 2**63 - 1}])
def test_what_cannot_be_real_is_refused(change: dict[str, int]) -> None:
    columns = schema([])
    rows = np.zeros(1, row_dtype(columns))
    values: dict[str, Any] = {"seq": 0, "clock_offset": OFFSET} | change
    header = Header(host="h", probe="p", source="s", count=1, t0=0, t1=0, columns=columns, **values)
    rows["ts"] = 1
    raw = HitBatch(header, {name: rows[name] for name in rows.dtype.names or ()}).encode()
    with pytest.raises(ProtocolError):
        HitFrame(raw)
