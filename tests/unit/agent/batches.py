"""Encoded hit batches for tests of what passes them on."""

from __future__ import annotations

import numpy as np

from trapline.protocol.hits import Header, HitBatch, row_dtype, schema


def batch(probe: str = "prb_a", *, seq: int = 0, count: int = 3, drops: dict[str, int] | None = None) -> bytes:
    """Returns a batch of hits that carry one word, their own sequence number."""
    columns = schema([("n", "u64")])
    rows = np.zeros(count, row_dtype(columns))
    rows["ts"] = np.arange(seq, seq + count)
    rows["pid"] = rows["tid"] = 7
    rows["n"] = np.arange(seq, seq + count)
    header = Header(
        host="hst_a",
        probe=probe,
        source="src_a",
        seq=seq,
        count=count,
        t0=seq,
        t1=seq + count - 1,
        clock_offset=0,
        columns=columns,
        sites=["app:f"],
        comms={7: "app"},
        drops=drops or {},
    )
    return HitBatch(header, {name: rows[name] for name in rows.dtype.names or ()}).encode()
