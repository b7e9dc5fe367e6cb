"""The books: hits = delivered + dropped, whatever order the news comes in."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as some

from trapline.model import Counters
from trapline.protocol.hits import Header
from trapline.protocol.messages import Observed
from trapline_service.ledger import Ledger, Tally


def header(seq: int, count: int = 10, *, source: str = "src", drops: dict[str, int] | None = None) -> Header:
    return Header(
        host="h",
        probe="p",
        source=source,
        seq=seq,
        count=count,
        t0=0,
        t1=0,
        clock_offset=0,
        columns=[],
        drops=drops or {},
    )


def observed(hits: int, dropped: dict[str, int] | None = None) -> Observed:
    dropped = dropped or {}
    return Observed(
        probe="p",
        generation=1,
        counters=Counters(hits=hits, dropped=sum(dropped.values())),
        dropped_by_reason=dropped,
    )


def ledger() -> Ledger:
    books = Ledger()
    books.open("p")
    return books


Fate = tuple[str, int]


@given(
    some.lists(some.tuples(some.sampled_from(["sent", "ring", "outbox", "vanished"]), some.integers(1, 9))),
    some.data(),
)
def test_every_hit_is_booked_once(fates: list[Fate], data: some.DataObject) -> None:
    """A host's hits each meet one fate; what the service books must be all of them, in the right places."""
    books = ledger()
    seq, ring = 0, 0
    sent = {"delivered": 0, "ring": 0, "outbox": 0, "vanished": 0}
    untold = 0
    shown = 0
    for fate, count in [*fates, ("sent", 1)]:
        if fate == "sent":
            losses = books.batch(header(seq + ring, count, drops={"tracer-ring": ring} if ring else None))
            shown += sum(loss.count for loss in losses)
            seq += ring + count
            ring = 0
            sent["delivered"] += count
        elif fate == "ring":
            ring += count
            sent["ring"] += count
        elif fate == "outbox":
            # A batch that fell out of the outbox, and what its header would have told.
            if ring:
                shown += sum(loss.count for loss in books.link_drops("p", "h", "tracer-ring", ring))
            seq += ring + count
            ring = 0
            sent["outbox"] += count
            untold += count
            if data.draw(some.booleans()):
                shown += sum(loss.count for loss in books.link_drops("p", "h", "agent-outbox", untold))
                untold = 0
        else:
            seq += count
            sent["vanished"] += count
    if untold:
        shown += sum(loss.count for loss in books.link_drops("p", "h", "agent-outbox", untold))
    lost = sent["ring"] + sent["outbox"] + sent["vanished"]
    counters, reasons = books.totals("p")
    assert counters.hits == sent["delivered"] + lost
    assert counters.dropped == lost == shown
    expected = {"tracer-ring": sent["ring"], "agent-outbox": sent["outbox"], "unknown": sent["vanished"]}
    assert reasons == {stage: count for stage, count in expected.items() if count}


def test_the_hosts_own_counters_are_ahead_and_never_counted_twice() -> None:
    books = ledger()
    books.batch(header(0))
    books.report("h", observed(25, {"tracer-ring": 5}))
    counters, reasons = books.totals("p")
    assert (counters.hits, counters.dropped, reasons) == (25, 5, {"tracer-ring": 5})
    books.batch(header(15, drops={"tracer-ring": 5}))
    counters, reasons = books.totals("p")
    assert (counters.hits, counters.dropped, reasons) == (25, 5, {"tracer-ring": 5})


def test_counters_stay_when_an_agent_starts_anew_and_add_up_when_a_tracer_does() -> None:
    books = ledger()
    books.batch(header(0, 100))
    books.report("h", observed(100))
    books.report("h", observed(0))  # a new agent, before its tracer has told it anything
    assert books.totals("p")[0].hits == 100
    books.report("h", observed(120))
    assert books.totals("p")[0].hits == 120
    books.batch(header(0, 7, source="src-2"))
    books.report("h", observed(7))
    assert books.totals("p")[0].hits == 127


def test_the_agents_own_drops_go_on_with_a_new_tracer() -> None:
    books = ledger()
    books.batch(header(0))
    books.link_drops("p", "h", "agent-outbox", 4)
    books.report("h", observed(14, {"agent-outbox": 4}))
    books.batch(header(0, source="src-2"))
    books.report("h", observed(10, {"agent-outbox": 4}))
    counters, reasons = books.totals("p")
    assert reasons == {"agent-outbox": 4}
    assert counters.hits == 24


def test_a_sequence_that_begins_anew_is_booked_from_its_beginning() -> None:
    books = ledger()
    books.batch(header(0, 100))
    assert books.batch(header(0)) == []
    assert [(loss.count, loss.seq_from, loss.seq_to) for loss in books.batch(header(15))] == [(5, 10, 14)]
    assert [loss.count for loss in books.batch(header(3, source="src-2"))] == [3]
    counters, reasons = books.totals("p")
    assert (counters.hits, reasons) == (138, {"unknown": 8})


def test_tallies_survive_their_json() -> None:
    books = ledger()
    books.batch(header(0))
    books.batch(header(15, drops={"tracer-ring": 5}))
    books.report("h", observed(30))
    (kept,) = books.tallies("p").values()
    again = Ledger()
    again.open("p", {"h": Tally.model_validate_json(kept.model_dump_json())})
    assert again.totals("p") == books.totals("p")
    # Though the record itself may be trimmed, the books know what comes next.
    assert again.batch(header(25)) == []


def test_calls_and_those_that_did_not_return_are_summed_over_tracers() -> None:
    tally = Tally()
    tally.report(Counters(hits=7, calls=10, unreturned=2), {}, {"abandoned": 2})
    tally.arrived("trc_1", 7)
    tally.report(Counters(hits=7, calls=12, unreturned=5), {}, {"abandoned": 2, "exec": 3})
    tally.arrived("trc_2", 1)
    tally.report(Counters(hits=1, calls=4, unreturned=3), {}, {"abandoned": 3})
    assert tally.unreturned() == {"abandoned": 5, "exec": 3}
    counters = tally.counters()
    assert (counters.calls, counters.hits, counters.unreturned) == (16, 8, 8)
