"""Golden vectors: hit batches as the Python codec encodes and reads them, for the browser's codec to agree with.

``python -m tests.web.golden`` writes them to web/tests/golden-batches.json; a test fails when that is stale.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from trapline.protocol.hits import MAGIC, Column, Header, HitBatch, schema
from trapline.protocol.stacks import StackFile

PATH = Path(__file__).resolve().parents[2] / "web" / "tests" / "golden-batches.json"
STRINGS = [
    b"GET user:1042",
    "Grüße, 世界 🦫".encode(),
    b"",
    b"\xef\xbb\xbfbom",
    b"cut \xe2\x82",
    b"\xff\xfe\x80 loose \xc0\xaf overlong \xed\xa0\x80 surrogate \xf4\x90\x80\x80 beyond",
    b'quote " back\\slash \n\t\x00 nul',
]


def _batch(count: int, columns: list[Column], values: dict[str, Any], **fields: Any) -> HitBatch:
    ts = [5_000_000_000 + 1_500 * i for i in range(count)]
    fixed = {"ts": ts, "pid": [70 + i % 2 for i in range(count)], "tid": [700 + i for i in range(count)]}
    types = {c.name: {"i64": np.int64, "f64": np.float64}.get(c.type, np.uint64) for c in columns}
    arrays = {k: np.array(v, types[k]) for k, v in {**fixed, "site": [0] * count, **values}.items()}
    header = Header(
        **{
            "host": "hst_a",
            "probe": "prb_a",
            "source": "src_a",
            "seq": 0,
            "count": count,
            "t0": ts[0],
            "t1": ts[-1],
            "clock_offset": 1_700_000_000_000_000_000,
            "columns": columns,
            "sites": ["app:f"],
            "comms": {70: "app", 71: "wörker"},
            **fields,
        }
    )
    return HitBatch(header, dict(arrays))


def _stack(end: int, *frames: tuple[int, int]) -> bytes:
    return struct.pack(f"<{len(frames) + 1}Q", end, *(file << 32 | offset for file, offset in frames))


def batches() -> dict[str, HitBatch]:
    """Returns the batches by name."""
    words = [0, 1, 4096, 2**32, 2**53, 2**53 + 1, 2**63, 2**64 - 1]
    return {
        "one row, nothing captured": _batch(1, schema([]), {}),
        "words of every size": _batch(8, schema([("size", "u64")]), {"size": words, "size?": [0] * 8}),
        "signed, real and true": _batch(
            5,
            schema([("n", "i64"), ("x", "f64"), ("ok", "bool"), ("raw", "bytes")]),
            {
                "n": [-1, -(2**63), 2**63 - 1, -(2**53) - 1, 0],
                "x": [1.5, float("nan"), float("-inf"), -0.0, 1e300],
                "ok": [0, 1, 1, 0, 1],
                "raw": [0, 1, 0, 0, 1],
                **{f"{name}?": [0, 0, 1, 0, 3] for name in ("n", "x", "ok", "raw")},
            },
            strings=[b"", b"\x00\xff\x7fGET"],
        ),
        "strings": _batch(
            len(STRINGS),
            schema([("path", "str")]),
            {"path": list(range(len(STRINGS))), "path?": [0, 0, 0, 0, 1, 1, 0]},
            strings=STRINGS,
        ),
        "every status, and one to come": _batch(
            9,
            schema([("p", "u64"), ("s", "str")]),
            {"p": list(range(9)), "p?": [*range(7), 9, 255], "s": [0] * 9, "s?": [0] * 9},
            strings=[b"x"],
        ),
        "sites, drops, a later generation": _batch(
            3,
            schema([]),
            {"site": [1, 0, 7]},
            sites=["libc.so.6:malloc", "libc.so.6:free"],
            drops={"tracer-ring": 40},
            generation=3,
        ),
        "numbers beyond 32 bits": _batch(2, schema([]), {}, seq=2**40 + 3, clock_offset=-3_000_000_000, comms={}),
        "stacks": _batch(
            4,
            schema([("stack", "stack"), ("caller", "stack")]),
            {"stack": [0, 1, 2, 3], "caller": [4] * 4, "stack?": [0, 0, 1, 1], "caller?": [0] * 4},
            strings=[
                _stack(0, (1, 0x9B0E3), (2, 0x11D0), (1, 0x27249)),
                _stack(1, (3, 0x8F0), (4, 0xFFFF_FFFF)),
                _stack(0x103, (2, 0x11D0), (9, 0x10)),
                _stack(4),
                _stack(1, (2, 7)),
            ],
            files={
                1: StackFile("/usr/lib/x86_64-linux-gnu/libc.so.6", build_id="ab12", file="08:01 77"),
                2: StackFile("/srv/wörker"),
                3: StackFile("[vdso]"),
                4: StackFile("[anon]"),
            },
        ),
        "odd paddings": _batch(
            5,
            schema([(f"a{i}", "str" if i % 2 else "u64") for i in range(5)]),
            {f"a{i}{q}": [0] * 5 for i in range(5) for q in ("", "?")},
            strings=[b"only"],
        ),
    }


def _frame(header: dict[str, Any], body: bytes = b"") -> bytes:
    head = msgspec.msgpack.encode(header)
    return struct.pack("<4sI", MAGIC, len(head)) + head + bytes(-len(head) % 8) + body


def malformed() -> dict[str, bytes]:
    """Returns frames that are no hit batch, by what is wrong with them."""
    good = batches()["words of every size"].encode()
    fixed = [{"name": n, "type": t} for n, t in (("ts", "u64"), ("pid", "u32"), ("tid", "u32"), ("site", "u32"))]
    header = {"host": "h", "probe": "p", "source": "s", "seq": 0, "count": 1, "t0": 0, "t1": 0, "clock_offset": 0}
    row = bytes(32)
    return {
        "nothing": b"",
        "another magic": b"TLH9" + good[4:],
        "cut in the header": good[:40],
        "cut in the columns": good[:-8],
        "bytes behind the end": good + bytes(8),
        "a header longer than the frame": good[:4] + struct.pack("<I", 1 << 30) + good[8:],
        "a header that is no map": struct.pack("<4sI", MAGIC, 1) + b"\x01" + bytes(7),
        "no rows": _frame({**header, "count": 0, "columns": fixed}),
        "too many rows": _frame({**header, "count": 1 << 20, "columns": fixed}),
        "a negative sequence": _frame({**header, "seq": -1, "columns": fixed}, row),
        "no fixed columns": _frame({**header, "columns": fixed[1:]}, row),
        "no status column": _frame({**header, "columns": [*fixed, {"name": "x", "type": "u64"}]}, row + bytes(8)),
        "an unknown type": _frame({**header, "columns": [*fixed, {"name": "x?", "type": "f128"}]}, row + bytes(8)),
        "a column twice": _frame({**header, "columns": [*fixed, *[{"name": "x?", "type": "u8"}] * 2]}, row + bytes(16)),
    }


def document() -> str:
    """Returns the file's text."""
    shown = {"probe", "host", "seq", "ts_ns", "pid", "tid", "comm", "site", "args", "status"}
    good = [
        {
            "name": name,
            "frame": batch.encode().hex(),
            "drops": batch.header.drops,
            "generation": batch.header.generation,
            "hits": [hit.model_dump(mode="json", include=shown) for hit in batch.hits()],
        }
        for name, batch in batches().items()
    ]
    bad = [{"name": name, "frame": frame.hex()} for name, frame in malformed().items()]
    return json.dumps({"batches": good, "malformed": bad}, indent=1, ensure_ascii=True) + "\n"


if __name__ == "__main__":
    PATH.write_text(document())
