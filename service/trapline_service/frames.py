"""A hit batch on its way through the service: checked once when it comes in, encoded as JSON at most once."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

import msgspec
import numpy as np

from trapline.errors import ProtocolError
from trapline.protocol import hits, stacks
from trapline.protocol.hits import FIXED, STATUS_SUFFIX, Header, HitBatch, JsonValue, ValueStatus, in_json, status_text

_MAX_INT64 = 2**63 - 1
_EXACT_IN_JAVASCRIPT = 2**53
_CONVERTED = ("i64", "f64", "bool", "bytes")


@dataclass(frozen=True, slots=True)
class LinkPosition:
    """A place in the sequence of a host's agent; within one ``link_id`` sequences count up."""

    host: str
    link_id: str
    link_seq: int


class _Row(msgspec.Struct):
    """``trapline.model.Hit`` without the cost of a pydantic model a row; a test holds the two together."""

    probe: str
    host: str
    seq: int
    ts: datetime
    ts_ns: str
    pid: int
    tid: int
    comm: str
    site: str
    args: dict[str, JsonValue | None]
    status: dict[str, str]
    stacks: dict[str, list[_Frame]]


class _Frame(msgspec.Struct):
    """``trapline.model.StackFrame``."""

    path: str
    build_id: str
    file: str
    offset: int


_encode = msgspec.json.Encoder().encode


class HitFrame:
    """A batch that was found sound.

    Attributes:
        batch: header and columns, views of ``raw``.
        raw: the bytes as the host encoded them; binary subscribers get these.
        first_ns: wall-clock time of the earliest row, Unix ns.
        last_ns: wall-clock time of the latest row, Unix ns.
        position: where it stood on its agent's link.
    """

    __slots__ = ("_json", "batch", "first_ns", "last_ns", "position", "raw")

    def __init__(self, raw: bytes, position: LinkPosition | None = None) -> None:
        """Checks everything that a later reader relies on.

        Raises:
            ProtocolError: the bytes are no hit batch, or its times or numbers cannot be real.
        """
        self.batch: HitBatch = hits.decode(raw)
        self.raw = raw
        self.position = position
        self._json: str | None = None
        h = self.batch.header
        ts = self.batch.columns["ts"]
        self.first_ns = int(ts.min()) + h.clock_offset
        self.last_ns = int(ts.max()) + h.clock_offset
        if not 0 <= self.first_ns <= self.last_ns <= _MAX_INT64:
            raise ProtocolError(f"hit batch of {h.probe} has times outside of 1970 to 2262")
        if h.seq + h.count > _MAX_INT64:
            raise ProtocolError(f"hit batch of {h.probe} has sequence {h.seq}")
        if any(not 0 <= n <= _MAX_INT64 for n in h.drops.values()):
            raise ProtocolError(f"hit batch of {h.probe} counts a negative or absurd number of drops")

    @property
    def header(self) -> Header:
        return self.batch.header

    @property
    def json(self) -> str:
        """The rows as JSON objects joined by commas, without the brackets; encoded at the first call."""
        if self._json is None:
            self._json = rows_json(self.batch)
        return self._json


def rows_json(batch: HitBatch) -> str:
    """Returns all rows of a batch as JSON objects joined by commas: what ``Hit`` would give, column by column."""
    h = batch.header
    count = h.count
    columns = {name: column.tolist() for name, column in batch.columns.items()}
    ts, pids, tids, sites = (columns[name] for name, _ in FIXED)
    args: list[dict[str, JsonValue | None]] = [{} for _ in range(count)]
    statuses: list[dict[str, str]] = [{} for _ in range(count)]
    frames: list[dict[str, list[_Frame]]] = [{} for _ in range(count)]
    texts = [s.decode("utf-8", "backslashreplace") for s in h.strings]
    for column in h.columns[len(FIXED) :]:
        if column.name.endswith(STATUS_SUFFIX):
            continue
        name = column.name
        values = columns[name]
        if column.type == "str":
            ok = batch.columns[name + STATUS_SUFFIX] <= ValueStatus.TRUNCATED
            values = [texts[v] if good else None for v, good in zip(values, ok.tolist(), strict=True)]
        elif column.type == "stack":
            found = {i: stacks.unpack(h.strings[i], h.files) for i in set(values)}
            lists = {i: [_frame(f) for f in stack.frames] for i, stack in found.items()}
            shown = {i: stacks.text(stack) for i, stack in found.items()}
            for i, which in enumerate(values):
                frames[i][name] = lists[which]
            values = [shown[which] for which in values]
        elif column.type in _CONVERTED:
            ok = batch.columns[name + STATUS_SUFFIX] <= ValueStatus.TRUNCATED
            convert = in_json(column.type, h.strings)
            values = [convert(v) if good else None for v, good in zip(values, ok.tolist(), strict=True)]
        elif column.type == "u64" and int(batch.columns[name].max()) > _EXACT_IN_JAVASCRIPT:
            values = [v if v <= _EXACT_IN_JAVASCRIPT else str(v) for v in values]
        for row, value in zip(args, values, strict=True):
            row[name] = value
        flags = batch.columns[name + STATUS_SUFFIX]
        for i in np.flatnonzero(flags).tolist():
            flag = int(flags[i])
            statuses[i][name] = status_text(flag)
            if flag > ValueStatus.TRUNCATED:
                args[i][name] = None
                frames[i].pop(name, None)
    rows = []
    for i in range(count):
        wall = ts[i] + h.clock_offset
        site = sites[i]
        rows.append(
            _Row(
                h.probe,
                h.host,
                h.seq + i,
                datetime.fromtimestamp(wall / 1e9, UTC),
                str(wall),
                pids[i],
                tids[i],
                h.comms.get(pids[i], ""),
                h.sites[site] if site < len(h.sites) else "",
                args[i],
                statuses[i],
                frames[i],
            )
        )
    return _encode(rows)[1:-1].decode()


def _frame(frame: stacks.Frame) -> _Frame:
    return _Frame(frame.file.path, frame.file.build_id, frame.file.file, frame.offset)
