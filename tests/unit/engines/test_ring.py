"""The ring: hits = delivered + dropped, whatever the threads do."""

from __future__ import annotations

import os
import threading

import pytest

from trapline.protocol.hits import HitBatch, decode
from trapline_agent.arch.x86_64 import REGISTERS
from trapline_agent.capture.evaluate import read_string
from trapline_agent.engines import ring as rings
from trapline_agent.engines.ring import HitRing
from trapline_agent.plans import LATENCY, Const, Context, Entry, FetchPlan, Op, Program, Register, Text, Value

WORDS = list(range(100, 127))


def drain(ring: HitRing) -> list[HitBatch]:
    return [
        decode(b) for _, b in ring.drain(host="h", probe="p", source="s", generation=1, sites=["x"], comms={7: "seven"})
    ]


def test_rows_come_out_as_they_went_in() -> None:
    ring = HitRing([FetchPlan(name="a", register="rdi"), FetchPlan(name="b", register="r15")])
    sink = ring.sink(0)
    for i in range(5):
        sink(1000 + i, 7, 8, WORDS, -1)
    (batch,) = drain(ring)
    hits = list(batch.hits())
    assert [h.args for h in hits] == [{"a": 114, "b": 100}] * 5
    assert (batch.header.t0, batch.header.t1, batch.header.seq) == (1000, 1004, 0)
    assert hits[0].comm == "seven"
    assert drain(ring) == []


def test_sequences_go_on_after_a_drain() -> None:
    ring = HitRing()
    sink = ring.sink(0)
    seqs = []
    for n in (1, 3, rings.ROWS + 2):
        for _ in range(n):
            sink(1, 2, 3, WORDS, -1)
        seqs += [(b.header.seq, b.header.count) for b in drain(ring)]
    assert seqs == [(0, 1), (1, 3), (4, rings.ROWS), (4 + rings.ROWS, 2)]


def test_the_oldest_go_whole_and_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rings, "ROWS", 4)
    monkeypatch.setattr(rings, "CHUNKS", 2)
    ring = HitRing()
    sink = ring.sink(0)
    for _ in range(19):
        sink(1, 2, 3, WORDS, -1)
    batches = drain(ring)
    assert [(b.header.seq, b.header.count) for b in batches] == [(8, 4), (12, 4), (16, 3)]
    assert batches[0].header.drops == {"tracer-ring": 8} == ring.drops
    ring.unsent(3)
    sink(1, 2, 3, WORDS, -1)
    assert drain(ring)[0].header.drops == {"tracer-socket": 3}
    assert ring.hits == 20
    assert ring.drops == {"tracer-ring": 8, "tracer-socket": 3}


def test_the_limit_is_exact_under_threads() -> None:
    reached = threading.Event()
    ring = HitRing(max_hits=1000, on_limit=reached.set)
    sink = ring.sink(0)
    delivered: list[HitBatch] = []
    threads = [threading.Thread(target=lambda: [sink(1, 2, 3, WORDS, -1) for _ in range(500)]) for _ in range(4)]
    for t in threads:
        t.start()
    while any(t.is_alive() for t in threads):
        delivered += drain(ring)
    delivered += drain(ring)
    assert reached.is_set()
    assert sum(b.header.count for b in delivered) == ring.hits == 1000
    assert ring.limited == 1000
    position = 0
    for batch in delivered:
        assert batch.header.seq == position
        position += batch.header.count


def test_strings_are_interned_in_each_batch() -> None:
    import ctypes

    texts = [ctypes.create_string_buffer(t) for t in (b"alpha", b"beta")]
    ring = HitRing([FetchPlan(name="s", register="rdi", string=True)])
    sink = ring.sink(0)
    memory = os.open("/proc/self/mem", os.O_RDONLY)
    try:
        for i in range(6):
            words = list(WORDS)
            words[14] = ctypes.addressof(texts[i % 2])
            sink(1, 2, 3, words, memory)
    finally:
        os.close(memory)
    (batch,) = drain(ring)
    assert batch.header.strings == [b"alpha", b"beta"]
    assert [h.args["s"] for h in batch.hits()] == ["alpha", "beta"] * 3


def test_a_string_at_the_end_of_the_mapped_memory() -> None:
    import ctypes
    import mmap

    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    page = mmap.PAGESIZE
    start = libc.mmap(None, 2 * page, 3, 0x22, -1, 0)
    libc.munmap(start + page, page)
    memory = os.open("/proc/self/mem", os.O_RDONLY)
    try:
        ctypes.memmove(start + page - 4, b"end\0", 4)
        assert read_string(memory, start + page - 4, 64) == (b"end", 0)
        ctypes.memmove(start + page - 4, b"ends", 4)
        assert read_string(memory, start + page - 4, 64)[0] == b"ends"
        assert read_string(memory, start + page, 64)[1].text == "fault"
        assert read_string(memory, 2**63, 64)[1].text == "fault"
        assert read_string(memory, 0, 64)[1].text == "null"
    finally:
        os.close(memory)
        libc.munmap(start, page)


def test_returns_are_paired_with_their_entries() -> None:
    fetches = [
        FetchPlan(name="a", register="rdi", entry=True),
        FetchPlan(name="took", register=LATENCY),
        FetchPlan(name="r", register="rax"),
    ]
    ring = HitRing(fetches, returns=True)
    sink = ring.return_sink(0)
    first, second = sink.enter(WORDS, -1), sink.enter([w + 100 for w in WORDS], -1)
    later = [w + 1000 for w in WORDS]
    assert ring.in_flight == 2
    sink.leave(5000, 7, 8, later, -1, 42, second)
    sink.leave(6000, 7, 8, later, -1, 43, first)
    (batch,) = drain(ring)
    assert [h.args for h in batch.hits()] == [
        {"a": 214, "took": 42, "r": 1110},
        {"a": 114, "took": 43, "r": 1110},
    ]
    assert (ring.calls, ring.hits, ring.in_flight) == (2, 2, 0)


def test_calls_are_hits_limited_unreturned_or_in_flight() -> None:
    limits = []
    ring = HitRing(max_hits=2, returns=True, on_limit=lambda: limits.append(ring.hits))
    sink = ring.return_sink(0)
    kept = [sink.enter(WORDS, -1) for _ in range(6)]
    for k in kept[:3]:
        sink.leave(1, 7, 8, WORDS, -1, 1, k)
    sink.lose("abandoned")
    sink.lose("abandoned")
    sink.inherit()
    sink.lose("ended")
    assert (ring.calls, ring.hits, ring.limited, ring.unreturned) == (7, 2, 1, {"abandoned": 2, "ended": 1})
    assert (ring.in_flight, limits) == (1, [2])


def test_what_programs_compute_and_what_they_let_go() -> None:
    rdi, big = Register("rdi"), Const(1 << 63)
    program = Program(
        values=(
            Op("sub", (Const(0), rdi)), Op("add", (big, big)), Op("div", (rdi, Const(4))), Op("gt", (rdi, Const(0))),
            Const(b"text"), Text(Const(0), 8),
        ),
        condition=Op("eq", (Op("mod", (rdi, Const(2))), Const(0))),
    )  # fmt: skip
    fetches = [
        FetchPlan(n, type=t) for n, t in zip("abcdef", ("i64", "u64", "f64", "bool", "bytes", "str"), strict=True)
    ]
    ring = HitRing(fetches, max_hits=rings.ROWS + 1)
    sink = ring.sink(3, program)
    words = list(WORDS)
    for i in range(2 * rings.ROWS + 6):
        words[REGISTERS.index("rdi")] = i
        sink(i, 7, 8, words, -1)
    assert (ring.hits, ring.filtered, ring.limited) == (rings.ROWS + 1, rings.ROWS + 3, 2)
    first, last = drain(ring)
    hit = list(first.hits())[1]
    assert hit.args == {"a": -2, "b": 0, "c": 0.5, "d": True, "e": b"text".hex(), "f": None}
    assert hit.status == {"b": "truncated", "f": "null"}
    assert [h.args["a"] for h in last.hits()] == [-2 * rings.ROWS]


def test_a_return_that_is_filtered_is_a_call_that_ended() -> None:
    program = Program(
        values=(Entry(Register("rdi")), Context("latency")),
        condition=Op("lt", (Register("rax"), Entry(Register("rdi")))),
    )
    ring = HitRing([FetchPlan("a", type="u64"), FetchPlan("t", type="u64")], returns=True)
    sink = ring.return_sink(0, program)
    kept = [sink.enter([w + 1000 * i for w in WORDS], -1) for i in range(4)]
    assert ring.in_flight == 4
    for k in kept[:3]:
        sink.leave(1, 7, 8, [w + 1000 for w in WORDS], -1, 9, k)
    assert (ring.calls, ring.hits, ring.filtered, ring.in_flight) == (4, 2, 1, 1)
    (batch,) = drain(ring)
    rdi = WORDS[REGISTERS.index("rdi")]
    assert [h.args for h in batch.hits()] == [{"a": rdi + 1000, "t": 9}, {"a": rdi + 2000, "t": 9}]


def test_long_texts_fit_their_batches() -> None:
    """A batch's header has its texts: with 2,048 rows of 4,096 bytes it would be larger than a reader takes."""
    fd = os.memfd_create("memory", os.MFD_CLOEXEC)
    os.pwrite(fd, b"".join(b"%08d" % i for i in range(40_000)), 0)
    plain = HitRing([FetchPlan(f"s{i}", "rdi", string=True, max_bytes=4096 - i) for i in range(3)])
    returned = HitRing([FetchPlan("s", "rdi", string=True, max_bytes=4096)], returns=True)
    computed = HitRing([FetchPlan("s", type="str")])
    program = Program((Text(Register("rdi"), 4096),))
    sink, back, compute = plain.sink(0), returned.return_sink(0), computed.sink(0, program)
    words = list(WORDS)
    for i in range(rings.ROWS):
        words[REGISTERS.index("rdi")] = 8 + 16 * i
        sink(1, 2, 3, words, fd)
        back.leave(1, 2, 3, words, fd, 5, back.enter(words, fd))
        compute(1, 2, 3, words, fd)
    for ring in plain, returned, computed:
        assert sum(batch.header.count for batch in drain(ring)) == rings.ROWS
        assert not ring.drops
    os.close(fd)


def test_a_number_beyond_what_a_column_holds_is_no_hit_less() -> None:
    huge: Value = Register("rdi")
    for _ in range(20):
        huge = Op("shl", (huge, Const(63)))
    ring = HitRing([FetchPlan("x", type="f64"), FetchPlan("y", type="u64"), FetchPlan("z", type="i64")])
    sink = ring.sink(0, Program((huge, huge, huge)))
    sink(1, 2, 3, WORDS, -1)
    (batch,) = drain(ring)
    (hit,) = batch.hits()
    assert [hit.status[c] for c in "xyz"] == ["unsupported", "truncated", "truncated"]
    assert not ring.drops


def test_a_hit_that_cannot_be_computed_is_counted_as_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is wrong with our code: other probes of the place are served, and the numbers hold."""
    program = Program((Register("rdi"),), Op("lt", (Register("rdi"), Const(1000))))
    ring, returned = HitRing([FetchPlan("x", type="u64")]), HitRing([FetchPlan("x", type="u64")], returns=True)
    sink, back = ring.sink(0, program), returned.return_sink(0, program)
    for fails in (False, True, False):
        with monkeypatch.context() as patched:
            if fails:
                patched.setattr(HitRing, "record", lambda *_: 1 / 0)
            sink(1, 2, 3, WORDS, -1)
            back.leave(1, 2, 3, WORDS, -1, 5, back.enter(WORDS, -1))
    for one in ring, returned:
        batches = drain(one)
        assert [(b.header.seq, b.header.count) for b in batches] == [(0, 1), (2, 1)]
        assert batches[0].header.drops == one.drops == {"tracer-capture": 1}
        assert (one.hits, one.in_flight) == (3, 0)
