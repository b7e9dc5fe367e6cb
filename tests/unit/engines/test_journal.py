"""The journal of what is written into processes: read back whole, or not at all, whatever the bytes are."""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trapline_agent.engines import journal as j
from trapline_agent.kernel import ptrace
from trapline_agent.kernel.robust import COUNT, DeathWatch

BOOT, NAMESPACE = bytes(range(16)), 4026531836
PTRACE_O_EXITKILL = 0x100000


@pytest.fixture
def journal() -> Iterator[j.Journal]:
    journal = j.Journal(os.memfd_create("journal"))
    yield journal
    os.close(journal.fd)


def read(journal: j.Journal) -> j.Contents:
    data = os.pread(journal.fd, os.fstat(journal.fd).st_size, 0)
    return j.parse(data, j.boot_id(), j.pid_namespace())


def entries() -> st.SearchStrategy[j.Entry]:
    def make(
        width: int,
        code: bytes,
        armed: bytes,
        numbers: tuple[int, int, int, int, int, int, int],
        counter: tuple[int, bool],
    ) -> j.Entry:
        code = code.ljust(width, b"\x90")
        pid, start, space, addr, inode, offset, dev = numbers
        changed = armed.ljust(width, b"\xcc")[:width] + code[width:]
        return j.Entry(
            pid, start, space, addr, (dev >> 20, dev & 0xFFFFF), inode, offset, width, code, changed, *counter
        )

    u32, u63 = st.integers(0, 2**32 - 1), st.integers(0, 2**63 - 17)
    numbers = st.tuples(st.integers(1, 2**31 - 1), u63, u32, u63, u63, u63, u32)
    code = st.binary(min_size=1, max_size=j.CONTEXT)
    counter = st.one_of(st.just((0, False)), st.tuples(st.integers(1, 2**64 - 1), st.booleans()))
    return st.builds(make, st.integers(1, 5), code, st.binary(max_size=5), numbers, counter)


def file(records: list[bytes]) -> bytes:
    """Returns a journal with these records."""
    head = bytearray(j.HEADER_BYTES)
    start = j.header(BOOT, NAMESPACE)
    head[: len(start)] = start
    struct.pack_into("=I", head, 1024, len(records))
    return bytes(head) + b"".join(records)


@given(st.lists(entries(), max_size=8))
def test_s2_what_is_entered_is_read(written: list[j.Entry]) -> None:
    contents = j.parse(file([j.pack(e) for e in written]), BOOT, NAMESPACE)
    assert contents == ([(i, e) for i, e in enumerate(written)], 0, "")


@given(st.binary(max_size=3 * j.HEADER_BYTES))
def test_s2_foreign_bytes_are_no_journal(data: bytes) -> None:
    assert j.parse(data, BOOT, NAMESPACE).entries == []


@given(
    st.lists(st.one_of(st.binary(min_size=96, max_size=96), entries().map(j.pack)), max_size=6), st.integers(0, 9000)
)
def test_s2_damaged_records_are_left_out(records: list[bytes], length: int) -> None:
    whole = file(records)
    contents = j.parse(whole[:length], BOOT, NAMESPACE)
    for number, entry in contents.entries:
        assert j.pack(entry) == records[number]
    if length < len(whole) and length >= j.HEADER_BYTES:
        assert len(contents.entries) + contents.damaged <= len(records)


@given(entries(), st.integers(0, 94), st.integers(1, 255))
def test_s2_a_record_with_one_byte_changed_is_left_out(entry: j.Entry, at: int, change: int) -> None:
    record = bytearray(j.pack(entry))
    record[at] ^= change
    contents = j.parse(file([bytes(record)]), BOOT, NAMESPACE)
    assert contents.entries == []
    assert contents.damaged == (record[:4] != b"\0\0\0\0")


def test_s2_numbers_of_another_time_or_place_mean_nothing() -> None:
    entry = j.Entry(7, 7, 1, 4096, (8, 1), 5, 0, 1, b"\x55" * 16, b"\xcc" + b"\x55" * 15)
    data = file([j.pack(entry)])
    assert j.parse(data, BOOT, NAMESPACE).entries
    assert j.parse(data, bytes(16), NAMESPACE) == ([], 0, "")  # the host was started anew
    assert "namespace" in j.parse(data, BOOT, NAMESPACE + 1).refusal
    assert "header" in j.parse(data[:100], BOOT, NAMESPACE).refusal
    assert "damaged" in j.parse(b"x" + data[1:], BOOT, NAMESPACE).refusal


def test_s2_entered_and_cleared(journal: j.Journal) -> None:
    space = journal.space(100, 200, 0)
    for addr in range(0x1000, 0x1000 + 3000):  # more than one chunk
        space.enter(addr, "fd:01", 77, addr - 0x1000, b"\x55\x48\x89\xe5", b"\xcc")
    assert len(journal) == 3000
    _, first = read(journal).entries[0]
    assert first[:2] + first[3:10] == (100, 200, 0x1000, (0xFD, 1), 77, 0, 1, b"\x55\x48\x89\xe5", b"\xcc\x48\x89\xe5")
    for addr in range(0x1000, 0x1000 + 2999):
        space.clear(addr)
    space.clear(1)
    assert [e.addr for _, e in read(journal).entries] == [0x1000 + 2999]
    space.belongs_to(101, 201)
    assert [(e.pid, e.start_time) for _, e in read(journal).entries] == [(101, 201)]
    other = journal.space(102, 202, 0)
    other.enter(0x5000, "0:2a", 1, 2, b"\xc3", b"\xcc")
    assert read(journal).entries[0][0] == 0, "the first free record is used again"
    space.close()
    other.close()
    assert read(journal) == ([], 0, "")
    assert len(journal) == 0


def test_s2_memory_has_a_new_number_each_time(journal: j.Journal) -> None:
    """Else a guardian that missed that it is another one would write into the old."""
    space = journal.space(100, 200, 0)
    numbers = set()
    for _ in range(3):
        space.enter(0x1000, "fd:01", 77, 0, b"\x55", b"\xcc")
        numbers.add(read(journal).entries[0][1].space)
        space.clear(0x1000)
    assert len(numbers) == 3


def test_s2_an_arm_costs_little(journal: j.Journal) -> None:
    space = journal.space(100, 200, 0)
    best = 1.0
    for _ in range(5):
        start = time.perf_counter()
        for addr in range(1000):
            space.enter(addr, "fd:01", 77, addr, b"\x55\x48\x89\xe5", b"\xcc")
        best = min(best, time.perf_counter() - start)
        space.close()
    assert best < 0.05, f"{best * 1000:.1f} ms for 1,000"


def test_s2_no_room_is_said_before_anything_is_written(journal: j.Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, offset: int, length: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    space = journal.space(1, 2, 0)
    with pytest.raises(OSError, match="No space"):
        space.enter(0x1000, "fd:01", 77, 0, b"\x55", b"\xcc")
    monkeypatch.undo()
    space.enter(0x1000, "fd:01", 77, 0, b"\x55", b"\xcc")
    assert len(read(journal).entries) == 1


def test_s2_threads_that_end_in_good_order_are_not_taken_for_killed(journal: j.Journal) -> None:
    watch: DeathWatch = journal.watch
    held = [watch.hold() for _ in range(COUNT)]
    assert None not in held
    assert watch.hold() is None
    for number in held:
        watch.let_go(number)
    assert not watch.died()


def test_s2_the_kernel_kills_no_target_with_its_tracer() -> None:
    assert not ptrace.FOLLOW & PTRACE_O_EXITKILL


def test_r19_s2_a_raised_semaphore_is_one_byte_of_a_record(journal: j.Journal) -> None:
    """It is told of after it was raised, and no more before it is lowered: what a record says of it is so."""
    space = journal.space(100, 200, 0)
    for addr in (0x1000, 0x2000):
        space.enter(addr, "fd:01", 77, 0, b"\x55", b"\xcc")
    space.raised(0x1000, 0x8000)
    space.raised(0x3000, 0x8000)  # nothing is entered there
    space.lowered(0x3000)

    def found() -> dict[int, tuple[int, bool]]:
        return {e.addr: (e.counter, e.raised) for _, e in read(journal).entries}

    assert found() == {0x1000: (0x8000, True), 0x2000: (0, False)}
    space.belongs_to(101, 201)
    assert found()[0x1000] == (0x8000, True)
    before = bytearray(os.pread(journal.fd, os.fstat(journal.fd).st_size, 0))
    space.lowered(0x1000)
    after = os.pread(journal.fd, os.fstat(journal.fd).st_size, 0)
    assert sum(a != b for a, b in zip(before, after, strict=True)) == 1
    assert found()[0x1000] == (0x8000, False)
    space.belongs_to(102, 202)
    assert found()[0x1000] == (0x8000, False)
    space.raised(0x1000, 0x8000)
    assert found()[0x1000] == (0x8000, True)
    space.raised(0x1000, 0x9000)
    assert found()[0x1000] == (0x9000, True)
    assert len(journal) == 2
    space.clear(0x1000)
    assert found() == {0x2000: (0, False)}


@given(entries(), st.integers(2, 255))
def test_r19_s2_a_damaged_flag_lowers_nothing(entry: j.Entry, flag: int) -> None:
    record = bytearray(j.pack(entry))
    record[-1] = flag
    ((_, found),) = j.parse(file([bytes(record)]), BOOT, NAMESPACE).entries
    assert found == entry._replace(raised=False)
