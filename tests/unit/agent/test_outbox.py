"""The outbox: bounded, exact, in order, and nothing lost over a cut that there was room for."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.unit.agent.batches import batch
from trapline.aggregates import Table
from trapline.protocol import aggregates
from trapline_agent.outbox import STAGE, Drop, Outbox


def _drain(outbox: Outbox) -> list[tuple[int, bytes]]:
    sent = []
    while (item := outbox.next()) is not None:
        sent.append(item)
    return sent


def test_sequences_count_up_from_one_in_the_order_of_put() -> None:
    outbox = Outbox()
    frames = [batch(seq=3 * i) for i in range(5)]
    for frame in frames:
        outbox.put(frame)
    assert _drain(outbox) == list(enumerate(frames, 1))
    assert not outbox.empty.is_set()
    outbox.ack(5)
    assert outbox.empty.is_set()
    assert outbox.size_bytes == 0


def test_what_is_not_acknowledged_is_sent_again_under_its_number() -> None:
    outbox = Outbox()
    frames = [batch(seq=3 * i) for i in range(4)]
    for frame in frames[:3]:
        outbox.put(frame)
    assert len(_drain(outbox)) == 3
    outbox.put(frames[3])
    outbox.rewind(1)
    assert _drain(outbox) == [(2, frames[1]), (3, frames[2]), (4, frames[3])]


def test_an_ack_during_the_second_sending_spares_the_rest() -> None:
    outbox = Outbox()
    for i in range(4):
        outbox.put(batch(seq=3 * i))
    _drain(outbox)
    outbox.rewind(0)
    first = outbox.next()
    assert first is not None
    assert first[0] == 1
    outbox.ack(3)
    assert [seq for seq, _ in _drain(outbox)] == [4]


def test_oldest_waiting_batches_go_first_and_are_counted_whole() -> None:
    frames = [batch("prb_old", drops={"tracer-ring": 4}), batch("prb_old", seq=3)]
    frames += [batch("prb_new", seq=3 * i) for i in range(2, 5)]
    outbox = Outbox(sum(map(len, frames[2:])))
    for frame in frames:
        outbox.put(frame)
    assert outbox.dropped == {"prb_old": 6}
    assert sorted(outbox.take_drops(), key=lambda d: d.stage) == [
        Drop("prb_old", STAGE, 6),
        Drop("prb_old", "tracer-ring", 4),
    ]
    assert outbox.take_drops() == []
    first = outbox.next()
    assert first is not None
    assert aggregates.head(first[1]).seq == 6


def test_what_flies_is_never_dropped() -> None:
    size = len(batch())
    outbox = Outbox(4 * size)
    for i in range(10):
        outbox.put(batch(seq=3 * i))
        outbox.next()
    # Half of the bound flies; of the other half the newest stay.
    assert [seq for seq, _ in outbox._flight] == [1, 2]
    assert outbox.dropped == {"prb_a": 3 * 6}
    outbox.rewind(0)
    assert [aggregates.head(frame).seq for _, frame in _drain(outbox)] == [0, 3]


def test_a_batch_beyond_the_bound_is_dropped_not_kept() -> None:
    outbox = Outbox(64)
    outbox.put(batch())
    assert outbox.next() is None
    assert outbox.dropped == {"prb_a": 3}
    assert outbox.empty.is_set()


def test_drops_that_could_not_be_told_are_told_later() -> None:
    outbox = Outbox(64)
    outbox.put(batch())
    told = outbox.take_drops()
    outbox.put(batch())
    outbox.untake_drops(told)
    assert outbox.take_drops() == [Drop("prb_a", STAGE, 6)]


def test_an_outbox_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match="room"):
        Outbox(1)


def delta(seq: int, count: int = 3, *, probe: str = "prb_a", drops: dict[str, int] | None = None) -> bytes:
    """Returns an aggregate frame: hits of three keys, counted by key."""
    table = Table(10)
    for hit in range(seq, seq + count):
        table.cell(((hit % 3, 0),)).count += 1
    ((_, frame),) = aggregates.split(
        table.cells.items(), None, host="hst_a", probe=probe, source="src_a", seq=seq, begin_ns=seq, end_ns=seq + count,
        drops=drops,
    )  # fmt: skip
    return frame


def test_aggregates_that_wait_are_added_up() -> None:
    outbox = Outbox()
    outbox.put(batch())
    for i in range(5):
        outbox.put(delta(3 * i))
        outbox.put(delta(3 * i, probe="prb_b"))
    assert outbox.size_bytes < len(batch()) + 3 * len(delta(0))
    _, *sent = [frame for _, frame in _drain(outbox)]
    assert [(d.probe, d.seq, d.count, d.begin_ns, d.end_ns) for d in map(aggregates.decode, sent)] == [
        ("prb_a", 0, 15, 0, 15), ("prb_b", 0, 15, 0, 15),
    ]  # fmt: skip
    assert {e.key: e.cell.count for e in aggregates.decode(sent[0]).entries} == {((k, 0),): 5 for k in range(3)}
    # What flies is not touched any more.
    outbox.put(delta(15))
    outbox.rewind(0)
    assert [aggregates.head(f).seq for _, f in _drain(outbox)] == [0, 0, 0, 15]


def test_aggregates_with_a_gap_between_stay_apart() -> None:
    outbox = Outbox()
    outbox.put(delta(0))
    outbox.put(delta(5, drops={"tracer-socket": 2}))
    outbox.put(delta(8))
    outbox.put(delta(90))
    assert [(h.seq, h.count, h.drops) for _, f in _drain(outbox) if (h := aggregates.head(f))] == [
        (0, 3, {}), (5, 6, {"tracer-socket": 2}), (90, 3, {}),
    ]  # fmt: skip


def test_dropped_aggregates_are_counted() -> None:
    outbox = Outbox(len(delta(0)) + 2)
    outbox.put(delta(0))
    outbox.put(delta(90))  # cannot be added
    assert outbox.dropped == {"prb_a": 3}
    outbox.put(delta(93))
    assert [aggregates.head(f).seq for _, f in _drain(outbox)] == [90]


class Accounting(RuleBasedStateMachine):
    """Whatever the link does, each hit is received exactly once or counted as dropped."""

    frame = staticmethod(lambda seq: batch(seq=seq))

    def __init__(self) -> None:
        super().__init__()
        self.size = max(len(batch()), len(delta(1 << 40, 3)))
        self.outbox = Outbox(6 * self.size)
        self.put = 0
        self.on_the_wire: list[tuple[int, range]] = []
        self.received: list[int] = []
        self.last_seq = 0

    @rule(n=st.integers(1, 4))
    def hits_come(self, n: int) -> None:
        for _ in range(n):
            self.outbox.put(self.frame(3 * self.put))
            self.put += 1

    @rule(n=st.integers(1, 4))
    def link_sends(self, n: int) -> None:
        for _ in range(n):
            if (item := self.outbox.next()) is not None:
                head = aggregates.head(item[1])
                self.on_the_wire.append((item[0], range(head.seq, head.seq + head.count)))

    @precondition(lambda self: self.on_the_wire)
    @rule(n=st.integers(1, 4))
    def service_reads(self, n: int) -> None:
        for link_seq, numbers in self.on_the_wire[:n]:
            if link_seq > self.last_seq:
                self.received += numbers
                self.last_seq = link_seq
        del self.on_the_wire[:n]

    @rule()
    def service_acks(self) -> None:
        self.outbox.ack(self.last_seq)

    @rule(survive=st.integers(0, 8))
    def cut(self, survive: int) -> None:
        del self.on_the_wire[survive:]
        self.service_reads(len(self.on_the_wire))
        self.outbox.rewind(self.last_seq)

    @invariant()
    def bounded(self) -> None:
        assert self.outbox.size_bytes <= 6 * self.size

    def teardown(self) -> None:
        self.cut(0)
        while not self.outbox.empty.is_set():
            self.link_sends(1)
            self.service_reads(1)
            self.service_acks()
        assert self.received == sorted(set(self.received))
        assert len(self.received) + self.outbox.dropped.get("prb_a", 0) == 3 * self.put


TestAccounting = Accounting.TestCase
TestAccounting.settings = settings(deadline=None, max_examples=60)


class AccountingOfAggregates(Accounting):
    """The same where what waits is added up."""

    frame = staticmethod(delta)


TestAccountingOfAggregates = AccountingOfAggregates.TestCase
TestAccountingOfAggregates.settings = settings(deadline=None, max_examples=60)
