"""The store that stands in a ring's place: exact, bounded, sent as what was gained."""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from trapline.aggregates import Function, Key, Table
from trapline.model import Aggregate
from trapline.protocol.aggregates import Delta, decode
from trapline.protocol.hits import ValueStatus
from trapline.protocol.stacks import End, StackFile, unpack
from trapline.tables import table_of
from trapline_agent.capture.values import part_of
from trapline_agent.engines.aggregate import AggregateStore
from trapline_agent.plans import AggregatePlan, Bits, Const, Context, FetchPlan, Frames, Op, Program, Register, Text
from trapline_agent.unwind.walk import Stacks

RDI, RSI = FetchPlan("arg0", "rdi"), FetchPlan("arg1", "rsi")
COMM, PID = FetchPlan("comm", "comm", string=True), FetchPlan("pid", "pid")


def made(
    function: Function,
    *by: FetchPlan,
    value: FetchPlan | None = None,
    comms: dict[int, str] | None = None,
    max_keys: int = 1000,
    **more: Any,
) -> AggregateStore:
    fetches = [*by, *([] if value is None else [value])]
    return AggregateStore(AggregatePlan(function, by=len(by), max_keys=max_keys), fetches, comms or {}, **more)


def words(*, rdi: int = 0, rsi: int = 0, rax: int = 0) -> Sequence[int]:
    from trapline_agent.arch.x86_64.registers import INDEX, REGISTERS

    row = [0] * len(REGISTERS)
    row[INDEX["rdi"]], row[INDEX["rsi"]], row[INDEX["rax"]] = rdi, rsi, rax
    return row


@pytest.fixture
def memory(tmp_path: object) -> Iterator[int]:
    """Something to read "addresses" from: byte n of a file."""
    fd = os.memfd_create("memory", os.MFD_CLOEXEC)
    os.pwrite(fd, b"hello\0", 64)
    yield fd
    os.close(fd)


def drained(store: AggregateStore, *, last: bool = True) -> list[Delta]:
    frames = store.drain(host="h", probe="p", source="s", generation=1, sites=["f"], comms={}, last=last)
    return [decode(frame) for _, frame in frames]


def whole(deltas: list[Delta], *, seq: int = 0) -> Table:
    table = Table(100_000, 100_000)
    for delta in deltas:
        assert delta.seq == seq
        seq += delta.count
        table.add(delta.cells(), delta.other.cell if delta.other else None)
    return table


def key(*values: object) -> Key:
    return tuple((v.encode() if isinstance(v, str) else v, 0) for v in values)  # type: ignore[misc]


def test_hits_are_added_up_by_key(memory: int) -> None:
    store = made("sum", COMM, RSI, value=RDI, comms={7: "app"})
    sink = store.sink(0)
    for i in range(10):
        sink(0, 7, 8, words(rdi=i, rsi=i % 2), memory)
    first = drained(store)
    sink(0, 9, 9, words(rdi=100, rsi=0), memory)
    table = whole(first + drained(store))
    assert {k: (c.count, c.sum) for k, c in table.cells.items()} == {
        key("app", 0): (5, 20), key("app", 1): (5, 25), key("", 0): (1, 100),
    }  # fmt: skip
    assert table.count == store.hits == 11
    assert drained(store) == []


def test_strings_are_keys_with_their_status(memory: int) -> None:
    by = (FetchPlan("s", "rdi", string=True), FetchPlan("t", "rdi", string=True, max_bytes=2))
    store = made("count", *by)
    sink = store.sink(0)
    for address in (64, 64, 0, 1 << 62):
        sink(0, 7, 7, words(rdi=address), memory)
    counts = {k: c.count for k, c in whole(drained(store)).cells.items()}
    assert counts == {
        ((b"hello", 0), (b"he", ValueStatus.TRUNCATED)): 2,
        ((None, ValueStatus.NULL),) * 2: 1,
        ((None, ValueStatus.FAULT),) * 2: 1,
    }


def test_a_value_that_is_not_there_counts_as_such(memory: int) -> None:
    store = made("distinct", value=FetchPlan("s", "rdi", string=True))
    for address in (64, 0, 0):
        store.sink(0)(0, 7, 7, words(rdi=address), memory)
    (cell,) = whole(drained(store)).cells.values()
    assert (cell.count, cell.bad, len(cell.registers)) == (3, {ValueStatus.NULL: 2}, 1)


def test_keys_are_bounded_and_those_that_have_a_row_keep_it(memory: int) -> None:
    store = made("count", RDI, max_keys=3)
    deltas: list[Delta] = []
    for round_ in range(3):
        for i in range(6):
            for _ in range(i + 1):
                store.sink(0)(0, 7, 7, words(rdi=(i + round_) % 6), memory)
        deltas += drained(store)
    table = whole(deltas)
    assert set(table.cells) == {key(0), key(1), key(2)}
    assert table.other is not None
    assert table.count == store.hits == 63
    assert table.cells[key(0)].count == 1 + 6 + 5


def test_returns_keep_what_is_asked_of_the_entry(memory: int) -> None:
    by = (FetchPlan("e", "rdi", entry=True), FetchPlan("s", "rdi", string=True, entry=True), PID)
    store = made("max", *by, value=FetchPlan("latency", "latency"), returns=True)
    sink = store.return_sink(0)
    kept = [sink.enter(words(rdi=64), memory) for _ in range(3)]
    sink.leave(0, 7, 7, words(), memory, 9, sink.enter(words(rdi=0), memory))
    ((null, _),) = whole(drained(store)).cells.items()
    assert null == ((0, 0), (None, ValueStatus.NULL), (7, 0))
    for i, one in enumerate(kept[:2]):
        sink.leave(0, 7, 7, words(rdi=1, rax=2), memory, 50 + i, one)
    sink.lose("abandoned")
    (only,) = whole(drained(store), seq=1).cells.items()
    assert only[0] == ((64, 0), (b"hello", 0), (7, 0))
    assert (only[1].count, only[1].max) == (2, 51)
    assert (store.calls, store.hits, store.unreturned, store.in_flight) == (4, 3, {"abandoned": 1}, 0)


def test_the_limit_is_exact(memory: int) -> None:
    reached = threading.Event()
    store = made("count", max_hits=5, on_limit=reached.set)
    sink = store.sink(0)
    for i in range(8):
        assert reached.is_set() == (i >= 5)
        sink(0, 7, 7, words(), memory)
    assert (store.hits, store.limited, whole(drained(store)).count) == (5, 3, 5)


def test_no_sooner_than_is_due_but_for_the_last(memory: int) -> None:
    told: list[int] = []
    store = made("count", on_data=lambda: told.append(1))
    sink = store.sink(0)
    assert store.due == 0
    sink(0, 7, 7, words(), memory)
    assert [d.count for d in drained(store, last=False)] == [1]
    for _ in range(3):
        sink(0, 7, 7, words(), memory)
    assert told == [1, 1]
    assert drained(store, last=False) == []
    assert store.due > 0
    assert [(d.seq, d.count) for d in drained(store)] == [(1, 3)]
    assert store.due == 0


def test_a_lost_frame_is_told_with_the_next(memory: int) -> None:
    store = made("count")
    sink = store.sink(0)
    for _ in range(4):
        sink(0, 7, 7, words(), memory)
    store.unsent(drained(store)[0].count)
    sink(0, 7, 7, words(), memory)
    (delta,) = drained(store)
    assert (delta.seq, delta.count, delta.drops) == (4, 1, {"tracer-socket": 4})
    assert store.drops == {"tracer-socket": 4}


def test_threads_lose_nothing(memory: int) -> None:
    store = made("sum", RSI, value=RDI)
    done = threading.Event()

    def hit(thread: int) -> None:
        sink = store.sink(0)
        for i in range(5000):
            sink(0, 7, 7, words(rdi=i, rsi=(i + thread) % 5), memory)

    threads = [threading.Thread(target=hit, args=(n,)) for n in range(4)]
    deltas: list[Delta] = []

    def drain() -> None:
        while not done.is_set():
            deltas.extend(drained(store))

    drainer = threading.Thread(target=drain)
    for thread in (drainer, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    drainer.join()
    table = whole(deltas + drained(store))
    assert table.count == 20_000
    assert sum(c.sum for c in table.cells.values()) == 4 * sum(range(5000))


def test_what_a_program_computes_is_a_key_and_a_value(memory: int) -> None:
    """Arithmetic, a condition, a value that cannot be had, and one that is beyond 64 bits."""
    rdi, rsi = Register("rdi"), Register("rsi")
    program = Program(
        (Context("comm"), Op("mod", (rdi, Const(3))), Text(rsi, 64), Op("mul", (rdi, rdi))),
        Op("lt", (rdi, Const(100))),
    )
    columns = [FetchPlan("comm", type="str"), FetchPlan("m", type="u64"), FetchPlan("s", type="str")]
    store = made("sum", *columns, value=FetchPlan("x", type="u64"), comms={7: "app"})
    sink = store.sink(0, program)
    for i in (4, 5, 7, 200, 300):
        sink(0, 7, 7, words(rdi=i, rsi=64), memory)
    sink(0, 7, 7, words(rdi=1), memory)
    cells = whole(drained(store)).cells
    app, hello = (b"app", 0), (b"hello", 0)
    assert {key: (cell.count, cell.sum) for key, cell in cells.items()} == {
        (app, (1, 0), hello): (2, 16 + 49),
        (app, (2, 0), hello): (1, 25),
        (app, (1, 0), (None, ValueStatus.NULL)): (1, 1),
    }
    assert (store.hits, store.filtered) == (4, 2)
    assert part_of(1 << 64, 0) == (0, ValueStatus.TRUNCATED)
    assert part_of(b"x" * 300, 0) == (b"x" * 256, ValueStatus.TRUNCATED)
    assert part_of(0, ValueStatus.FAULT) == (None, ValueStatus.FAULT)


def test_columns_may_be_called_alike(memory: int) -> None:
    """As those that each hit has (`by (pid, n)`), and as one another (`max(n) by (n)`); and a program's own `comm` is not
    the process' name."""
    rdi = Register("rdi")
    program = Program((Context("pid"), Context("comm"), Text(Register("rsi"), 64), rdi, rdi))
    columns = [FetchPlan(n, type=t) for n, t in (("pid", "u64"), ("comm", "str"), ("comm", "str"), ("n", "u64"))]
    store = made("max", *columns, value=FetchPlan("n", type="u64"), comms={7: "app"})
    store.sink(0, program)(0, 7, 7, words(rdi=3, rsi=64), memory)
    returned = made("max", *columns, value=FetchPlan("n", type="u64"), comms={7: "app"}, returns=True)
    sink = returned.return_sink(0, program)
    sink.leave(0, 7, 7, words(rdi=3, rsi=64), memory, 9, sink.enter(words(), memory))
    for one in store, returned:
        ((found, cell),) = whole(drained(one)).cells.items()
        assert found == key(7, "app", "hello", 3)
        assert cell.max == 3


@pytest.mark.parametrize("function", ["sum", "min", "max", "avg", "hist", "quantiles", "topk", "distinct"])
def test_what_is_no_finite_number_is_told_as_such(function: Function, memory: int) -> None:
    """Infinity and NaN have no place in a sum nor in JSON, and NaN as a key would have as many rows as hits."""
    x = Bits(Register("rdi"), 0, 64, "f")
    plan = AggregatePlan(function, (10,) if function == "topk" else (), by=1, max_keys=100)
    store = AggregateStore(plan, [FetchPlan("k", type="f64"), FetchPlan("x", type="f64")], {})
    sink = store.sink(0, Program((x, x)))
    for value in (1.5, float("inf"), float("-inf"), float("nan"), float("nan"), 1.7e308, 1.7e308):
        sink(0, 7, 7, words(rdi=int.from_bytes(struct.pack("<d", value), "little")), memory)
    table = whole(drained(store))
    assert {k[0]: (c.count, c.bad) for k, c in table.cells.items()} == {
        (1.5, 0): (1, {}),
        (None, ValueStatus.UNSUPPORTED): (4, {ValueStatus.UNSUPPORTED: 4}),
        (1.7e308, 0): (2, {}),
    }
    aggregate = Aggregate(text="", function=function, by=["k"], value="x", parameters=list(plan.parameters))
    assert "Infinity" not in (text := table_of(aggregate, table).model_dump_json())
    assert "NaN" not in text


def test_columns_may_be_called_as_those_that_every_hit_has(memory: int) -> None:
    """``count() by (pid, arg0 + 1)``, ``by (entry(arg0), entry(arg0))``: there is no row that names would meet in."""
    pid, computed = FetchPlan("pid", type="u64"), FetchPlan("arg0 + 1", type="u64")
    store = made("count", pid, computed)
    store.sink(0, Program((Context("pid"), Op("add", (Register("rdi"), Const(1))))))(0, 7, 8, words(rdi=4), memory)
    assert set(whole(drained(store)).cells) == {key(7, 5)}
    store = made("count", *[FetchPlan("entry(arg0)", "rdi", entry=True)] * 2, returns=True)
    sink = store.return_sink(0)
    sink.leave(0, 7, 8, words(), memory, 5, sink.enter(words(rdi=4), memory))
    assert set(whole(drained(store)).cells) == {key(4, 4)}


class Walked(Stacks):
    """Takes of every thread the stack whose words are in rdi and rsi."""

    def walk(self, pid: int, words: Sequence[int], memory: int, depth: int, skip: int = 0) -> bytes:
        from trapline_agent.arch.x86_64.registers import INDEX

        frames = [1 << 32 | words[INDEX["rdi"]], 2 << 32 | words[INDEX["rsi"]]][skip : skip + depth]
        return struct.pack(f"<{1 + len(frames)}Q", End.FAULT if words[INDEX["rax"]] else End.COMPLETE, *frames)

    def file(self, number: int) -> StackFile:
        return StackFile(f"/{number}", build_id=f"{number:02}")


def stacks_of(table: Table) -> dict[tuple[object, ...], int]:
    return {
        tuple(
            tuple((f.file.path, f.offset) for f in unpack(value, table.files.by_number).frames)
            if i in table.stacks and isinstance(value, bytes)
            else value
            for i, (value, _) in enumerate(key)
        ): cell.count
        for key, cell in table.cells.items()
    }


def received(deltas: list[Delta]) -> Table:
    table = Table(1000)
    for delta in deltas:
        delta.add_to(table)
    return table


def test_stacks_are_keys(memory: int) -> None:
    """By plain fetches, by a program, and at a return: with the files that they have frames in."""
    stack, caller = FetchPlan("ustack()", "rip", stack=127), FetchPlan("caller", "rip", stack=1, skip=1)
    plain = made("count", stack, PID, caller, stacks=Walked())
    program = Program((Frames(127), Context("pid"), Frames(1, 1)), Op("lt", (Register("rdi"), Const(10))))
    computed = made(
        *("count", FetchPlan("ustack()", type="stack"), FetchPlan("pid", type="u64"), FetchPlan("caller", type="stack")),
        stacks=Walked(),
    )  # fmt: skip
    returns = made("count", stack, PID, caller, stacks=Walked(), returns=True)
    for store, sink in ((plain, plain.sink(0)), (computed, computed.sink(0, program))):
        assert store.of_stacks
        for rdi in (1, 1, 2):
            sink(0, 7, 7, words(rdi=rdi, rsi=9), memory)
    at_return = returns.return_sink(0)
    for rdi in (1, 1, 2):
        at_return.leave(0, 7, 7, words(rdi=rdi, rsi=9), memory, 5, at_return.enter(words(), memory))
    for store in (plain, computed, returns):
        table = received(drained(store))
        assert table.stacks == (0, 2)
        assert stacks_of(table) == {
            ((("/1", 1), ("/2", 9)), 7, (("/2", 9),)): 2,
            ((("/1", 2), ("/2", 9)), 7, (("/2", 9),)): 1,
        }


def test_a_stack_is_as_long_as_it_is(memory: int) -> None:
    class Deep(Walked):
        def walk(self, pid: int, words: Sequence[int], memory: int, depth: int, skip: int = 0) -> bytes:
            return struct.pack(f"<{depth + 1}Q", 0, *(1 << 32 | i for i in range(depth)))

    fetch = FetchPlan("ustack(1024)", type="stack")
    for store, program in (
        (made("count", FetchPlan("ustack(1024)", "rip", stack=1024), stacks=Deep()), None),
        (made("count", fetch, stacks=Deep()), Program((Frames(1024),))),
    ):
        store.sink(0, program)(0, 7, 7, words(), memory)
        (((packed, status),),) = received(drained(store)).cells
        assert isinstance(packed, bytes)
        assert (len(packed), status) == (8 * 1025, 0)


def test_one_that_was_cut_is_truncated(memory: int) -> None:
    store = made("count", FetchPlan("ustack()", "rip", stack=9), stacks=Walked())
    store.sink(0)(0, 7, 7, words(rax=1), memory)
    (((_, status),),) = received(drained(store)).cells
    assert status == ValueStatus.TRUNCATED


def test_bytes_of_stacks_are_bounded(memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trapline_agent.engines.aggregate.MAX_STACK_BYTES", 5 * 24)
    store = made("count", FetchPlan("ustack()", "rip", stack=9), stacks=Walked())
    deltas: list[Delta] = []
    for _ in range(3):
        for rdi in range(8):
            store.sink(0)(0, 7, 7, words(rdi=rdi), memory)
        deltas += drained(store)
    table = received(deltas)
    assert (len(table.cells), table.other and table.other.count, table.count) == (5, 9, 24)
    assert all(cell.count == 3 for cell in table.cells.values())
