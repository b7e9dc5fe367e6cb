"""The ring of one consumer: hits as fixed-size rows, bounded, drained into batches.

Rows are written at the trap with one ``struct.pack_into`` and turned into columns once, when they are drained. Chunks are
contiguous in sequence; when all are full the oldest is let go whole and counted (docs: pipeline rule 3), so that
hits = delivered + dropped at all times.
"""

from __future__ import annotations

import itertools
import logging
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from trapline.protocol.hits import INTERNED, Header, HitBatch, ValueStatus, row_dtype, row_format, schema
from trapline.protocol.stacks import StackFile, numbers_of
from trapline_agent.capture.compute import MASK, Floats, Scalar, Values
from trapline_agent.capture.evaluate import Evaluator, Kept, ReturnEvaluator
from trapline_agent.plans import FetchPlan, Program
from trapline_agent.unwind.walk import Stacks

log = logging.getLogger(__name__)

ROWS = 2048
"""Rows of a chunk: an agent flushes at 10 ms or 2,000 hits (docs: pipeline rule 2)."""
CHUNKS = 64
"""Full chunks that wait to be drained: 131,072 hits."""
OVERHEAD_SAMPLES = 256
_TEXT_BYTES = 384 << 10
"""Of a chunk's different texts and stacks, with which it takes no further row: with those of one row more they have to fit a
batch's header (``hits.MAX_HEADER_BYTES``)."""
_TEXT_HEAD = 5
"""Bytes that msgpack puts before each."""
_SIGN = 1 << 63


class _Texts(list[bytes]):
    """Texts, and how many bytes they take in a batch's header."""

    size = 0

    def append(self, text: bytes) -> None:
        super().append(text)
        self.size += len(text) + _TEXT_HEAD


class _Chunk:
    __slots__ = ("buffer", "count", "interned", "seq", "strings")

    def __init__(self, seq: int, row_bytes: int) -> None:
        self.seq = seq
        self.count = 0
        self.buffer = bytearray(ROWS * row_bytes)
        self.strings = _Texts()
        self.interned: dict[bytes, int] = {}


class HitRing:
    """Where the hits of one probe wait. Sinks write from any thread; one thread drains."""

    def __init__(
        self,
        fetches: Sequence[FetchPlan] = (),
        *,
        max_hits: int = 0,
        returns: bool = False,
        stacks: Stacks | None = None,
        floats: Floats | None = None,
        on_data: Callable[[], None] = lambda: None,
        on_limit: Callable[[], None] = lambda: None,
    ) -> None:
        """
        Args:
            fetches: what each hit captures; where they are not all plain, each site's program computes them.
            max_hits: hits to record; further ones are counted as limited. 0: all.
            returns: it is for a return probe: ``return_sink`` makes its sinks.
            stacks: walks them, where a fetch is of one.
            floats: reads the floating-point registers of a stopped thread.
            on_data: called when a row is written to an empty ring, by the writing thread.
            on_limit: called once when ``max_hits`` is reached, likewise.
        """
        self._stacks = stacks or Stacks()
        self.of_stacks = any(f.column == "stack" for f in fetches)
        """Whether its hits have stacks."""
        self.columns = schema([(f.name, f.column) for f in fetches])
        self._dtype = row_dtype(self.columns)
        self._row = struct.Struct(row_format(self.columns))
        plain = all(f.register for f in fetches)
        self._evaluate = Evaluator(() if returns or not plain else fetches, self._stacks.walk)
        self._evaluate_return = ReturnEvaluator(fetches if returns and plain else (), self._stacks.walk)
        self._types = [f.column for f in fetches]
        self._floats = floats
        self._comms: Mapping[int, str] | None = None
        """Names of processes by pid, where a value `comm` is to be that; None: it is the thread's."""
        self._max = max_hits
        self._returns = returns
        self._on_data = on_data
        self._on_limit = on_limit
        self._lock = threading.Lock()
        self._full: deque[_Chunk] = deque()
        self._chunk = _Chunk(0, self._row.size)
        self._unreported: dict[str, int] = {}
        self.hits = 0
        self.filtered = 0
        """Hits of which the condition was not true."""
        self.limited = 0
        self.drops: dict[str, int] = {}
        """Hits that were let go, by where."""
        self.calls = 0
        """Of a return probe: calls that began. All of them are hits, limited, unreturned, or in flight."""
        self.unreturned: dict[str, int] = {}
        """Calls whose return will not be seen, by reason."""
        self.overhead_ns: deque[int] = deque(maxlen=OVERHEAD_SAMPLES)
        """Samples of how long the engine held a thread for one hit, in ns."""

    @property
    def due(self) -> float:
        """CLOCK_MONOTONIC seconds at which ``drain`` is to be called again; 0: when ``on_data`` says so."""
        return 0.0

    @property
    def in_flight(self) -> int:
        """Calls of a return probe that have not returned yet."""
        with self._lock:
            if not self._returns:
                return 0
            return self.calls - self.hits - self.filtered - self.limited - sum(self.unreturned.values())

    def return_sink(self, site: int, program: Program | None = None) -> ReturnRecorder | ProgramReturns:
        """Returns the ``ReturnSink`` that records calls of this site."""
        if program is None:
            return ReturnRecorder(self, site)
        return ProgramReturns(self, site, self._compiled(program))

    def _compiled(self, program: Program) -> Values:
        return Values(program.values, program.condition, self._floats, self._stacks.walk, self._comms)

    def begin(self, words: Sequence[int], memory: int) -> Kept:
        """Counts a call; returns what it keeps for its return."""
        with self._lock:
            self.calls += 1
        return self._evaluate_return.enter(words, memory)

    def begin_elsewhere(self) -> None:
        """Counts a call that began in a parent process, before the fork."""
        with self._lock:
            self.calls += 1

    def end(
        self, site: int, ts: int, pid: int, tid: int, words: Sequence[int], memory: int, latency_ns: int, kept: Kept
    ) -> None:
        """Records the return of a call."""
        with self._lock:
            if self._max and self.hits >= self._max:
                self.limited += 1
                return
            chunk = self._chunk
            if chunk.count == ROWS or chunk.strings.size >= _TEXT_BYTES:
                chunk = self._rotate()
            n = chunk.count
            values = self._evaluate_return.leave(words, memory, latency_ns, kept, chunk.interned, chunk.strings, pid)
            self._row.pack_into(chunk.buffer, n * self._row.size, ts, pid, tid, site, *values)
            chunk.count = n + 1
            self.hits += 1
            if n == 0:
                self._on_data()
            if self._max and self.hits == self._max:
                self._on_limit()

    def end_unseen(self, reason: str) -> None:
        """Counts a call whose return will not be seen."""
        with self._lock:
            self.unreturned[reason] = self.unreturned.get(reason, 0) + 1

    def program_sink(self, site: int, program: Program) -> Callable[[int, int, int, Sequence[int], int], None]:
        """Returns the ``Sink`` that records what a program computes."""
        values = self._compiled(program)
        conditional = program.condition is not None

        def record(ts: int, pid: int, tid: int, words: Sequence[int], memory: int) -> None:
            hit = values.hit(ts, pid, tid, words, memory)
            try:
                if conditional and not values.holds(hit):
                    self.filter()
                else:
                    self.record(site, ts, pid, tid, values(hit))
            except Exception:  # noqa: BLE001 - it is logged there
                self.fail(pid)

        return record

    def fail(self, pid: int) -> None:
        """Counts a hit that could not be recorded, in an except clause: that is a bug of ours, and neither the hit's other
        probes nor the thread are to feel it."""
        with self._lock:
            known = "tracer-capture" in self.drops
            self.hits += 1
            self._drop("tracer-capture", 1)
            self._skip()
        if not known:
            log.exception("a hit in process %d could not be recorded; further ones are counted alone", pid)

    def filter(self) -> None:
        """Counts a hit of which the condition is not true."""
        with self._lock:
            self.filtered += 1

    def record(self, site: int, ts: int, pid: int, tid: int, values: Sequence[tuple[Scalar, int]]) -> None:
        """Records a hit with its values and their statuses."""
        with self._lock:
            if self._max and self.hits >= self._max:
                self.limited += 1
                return
            chunk = self._chunk
            if chunk.count == ROWS or chunk.strings.size >= _TEXT_BYTES:
                chunk = self._rotate()
            n = chunk.count
            row: list[int | float] = []
            statuses: list[int] = []
            for kind, (value, status) in zip(self._types, values, strict=True):
                if kind in INTERNED:
                    data = value if isinstance(value, bytes) else b""
                    index = chunk.interned.get(data)
                    if index is None:
                        index = chunk.interned[data] = len(chunk.strings)
                        chunk.strings.append(data)
                    row.append(index)
                elif isinstance(value, bytes):
                    row.append(0)
                elif kind == "f64":
                    try:
                        row.append(float(value))
                    except OverflowError:  # an integer of more than 1,024 bits
                        row.append(0.0)
                        status = int(ValueStatus.UNSUPPORTED)
                else:
                    number = int(value)
                    packed = number & MASK if kind == "u64" else ((number + _SIGN) & MASK) - _SIGN
                    row.append(packed)
                    if packed != number and not status:
                        status = int(ValueStatus.TRUNCATED)
                statuses.append(status)
            self._row.pack_into(chunk.buffer, n * self._row.size, ts, pid, tid, site, *row, *statuses)
            chunk.count = n + 1
            self.hits += 1
            if n == 0:
                self._on_data()
            if self._max and self.hits == self._max:
                self._on_limit()

    def sink(self, site: int, program: Program | None = None) -> Callable[[int, int, int, Sequence[int], int], None]:
        """Returns the ``Sink`` that records hits of this site."""
        if program is not None:
            return self.program_sink(site, program)
        evaluate = self._evaluate
        lock = self._lock
        pack_into = self._row.pack_into
        size = self._row.size
        capture = evaluate.words if not evaluate.has_strings else None
        maximum = self._max
        most = _TEXT_BYTES

        def record(ts: int, pid: int, tid: int, words: Sequence[int], memory: int) -> None:
            with lock:
                if maximum and self.hits >= maximum:
                    self.limited += 1
                    return
                chunk = self._chunk
                n = chunk.count
                if n == ROWS or (capture is None and chunk.strings.size >= most):
                    chunk = self._rotate()
                    n = 0
                values = (
                    capture(words)
                    if capture is not None
                    else evaluate(words, memory, chunk.interned, chunk.strings, pid)
                )
                pack_into(chunk.buffer, n * size, ts, pid, tid, site, *values)
                chunk.count = n + 1
                self.hits += 1
                if n == 0:
                    self._on_data()
                if maximum and self.hits == maximum:
                    self._on_limit()

        return record

    def _rotate(self) -> _Chunk:
        self._full.append(self._chunk)
        if len(self._full) > CHUNKS:
            self._drop("tracer-ring", self._full.popleft().count)
        self._chunk = _Chunk(self._chunk.seq + self._chunk.count, self._row.size)
        return self._chunk

    def _skip(self) -> None:
        """Leaves out a number of the sequence. The caller has the lock."""
        if self._chunk.count:
            self._rotate()
        self._chunk.seq += 1

    def _drop(self, stage: str, count: int) -> None:
        self.drops[stage] = self.drops.get(stage, 0) + count
        self._unreported[stage] = self._unreported.get(stage, 0) + count

    def unsent(self, count: int) -> None:
        """Counts drained hits that could not be handed on."""
        with self._lock:
            self._drop("tracer-socket", count)

    def drain(
        self,
        *,
        host: str,
        probe: str,
        source: str,
        generation: int,
        sites: Sequence[str],
        comms: Mapping[int, str],
        last: bool = True,
    ) -> list[tuple[int, bytes]]:
        """Takes all rows out and returns them as (count, encoded batch), oldest first.

        Args:
            host, probe, source, generation, sites: for the headers.
            comms: names of processes by pid; those that occur go into the header.
            last: nothing may stay for a later, larger batch.
        """
        with self._lock:
            if not self._chunk.count and not self._full:
                return []
            chunks = [*self._full, self._chunk] if self._chunk.count else list(self._full)
            self._full.clear()
            self._chunk = _Chunk(self._chunk.seq + self._chunk.count, self._row.size)
            drops, self._unreported = self._unreported, {}
        offset = time.time_ns() - time.monotonic_ns()
        batches = []
        for chunk in chunks:
            rows = np.frombuffer(chunk.buffer, self._dtype, chunk.count)
            ts = rows["ts"]
            header = Header(
                host=host,
                probe=probe,
                source=source,
                seq=chunk.seq,
                count=chunk.count,
                t0=int(ts.min()),
                t1=int(ts.max()),
                clock_offset=offset,
                columns=self.columns,
                generation=generation,
                strings=chunk.strings,
                sites=list(sites),
                comms={p: comms[p] for p in np.unique(rows["pid"]).tolist() if p in comms},
                drops=drops,
                files=self._files_of(chunk, rows),
            )
            drops = {}
            batches.append((chunk.count, HitBatch(header, {c.name: rows[c.name] for c in self.columns}).encode()))
        return batches

    def _files_of(self, chunk: _Chunk, rows: npt.NDArray[Any]) -> dict[int, StackFile]:
        """Returns the files that the stacks of a chunk have frames in."""
        columns = [c.name for c in self.columns if c.type == "stack"]
        if not columns:
            return {}
        which = np.unique(np.concatenate([rows[name] for name in columns])).tolist()
        numbers = {number for i in which for number in numbers_of(chunk.strings[i])}
        return {number: self._stacks.file(number) for number in sorted(numbers)}

    def median_overhead_ns(self) -> float:
        """Returns the median of the last samples, in ns; 0.0 before the first."""
        samples = sorted(itertools.islice(self.overhead_ns, OVERHEAD_SAMPLES))
        return float(samples[len(samples) // 2]) if samples else 0.0


class ReturnRecorder:
    """A ``ReturnSink`` over a ring."""

    def __init__(self, ring: HitRing, site: int) -> None:
        self._site = site
        self._end = ring.end
        self.enter = ring.begin
        self.inherit = ring.begin_elsewhere
        self.lose = ring.end_unseen

    def leave(
        self, ts: int, pid: int, tid: int, words: Sequence[int], memory: int, latency_ns: int, kept: Kept
    ) -> None:
        self._end(self._site, ts, pid, tid, words, memory, latency_ns, kept)


class ProgramReturns:
    """A ``ReturnSink`` over a ring, of a site that has a program."""

    def __init__(self, ring: HitRing, site: int, values: Values) -> None:
        self._ring = ring
        self._site = site
        self._values = values
        self.inherit = ring.begin_elsewhere
        self.lose = ring.end_unseen

    def enter(self, words: Sequence[int], memory: int) -> Kept:
        self._ring.begin_elsewhere()
        return self._values.keep(words, memory)  # type: ignore[return-value] # nobody but ``leave`` looks at it

    def leave(
        self, ts: int, pid: int, tid: int, words: Sequence[int], memory: int, latency_ns: int, kept: Kept
    ) -> None:
        values = self._values
        hit = values.hit(ts, pid, tid, words, memory, latency_ns, kept)  # type: ignore[arg-type] # as ``enter`` made it
        try:
            if values.holds(hit):
                self._ring.record(self._site, ts, pid, tid, values(hit))
            else:
                self._ring.filter()
        except Exception:  # noqa: BLE001 - it is logged there
            self._ring.fail(pid)
