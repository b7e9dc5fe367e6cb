"""Hit batches: columns of one probe from one source, encoded once on the traced host and passed on as they are.

A frame, all little-endian::

    0   4s   magic "TLH1" (schema id)
    4   u32  header length
    8        header: msgpack map, see ``Header``
    ...      zeros up to a multiple of 8
    ...      the columns, one after the other in the header's order, each padded with zeros to a multiple of 8

Eight-byte alignment lets a browser lay typed arrays over the frame without copying. A batch is self-contained: its
strings, sites and process names are tables in its own header, so it can be stored, replayed, and read by a subscriber
who came late (docs/adr/0003 says why they are not interned per connection).

Fixed columns: ``ts`` u64 (CLOCK_MONOTONIC ns of the host), ``pid`` u32, ``tid`` u32, ``site`` u32 (index into
``sites``). Then for each captured value a column by its name and of its type (``VALUE_TYPES``), and after all of them for
each a u8 column ``NAME?`` with its ``ValueStatus``. Sequence numbers are implied: row i is hit ``seq + i`` of
(probe, source); they begin at 0.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import IntEnum
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from trapline.errors import ProtocolError
from trapline.model import Hit, StackFrame
from trapline.protocol import stacks
from trapline.protocol.stacks import StackFile

MAGIC = b"TLH1"
MAX_ROWS = 65_536
MAX_HEADER_BYTES = 1 << 20
_PREFIX = struct.Struct("<4sI")
_DTYPES: dict[str, np.dtype[Any]] = {
    "u64": np.dtype("<u8"),
    "u32": np.dtype("<u4"),
    "str": np.dtype("<u4"),
    "stack": np.dtype("<u4"),
    "u8": np.dtype("u1"),
    "i64": np.dtype("<i8"),
    "f64": np.dtype("<f8"),
    "bool": np.dtype("u1"),
    "bytes": np.dtype("<u4"),
}
VALUE_TYPES = {"u64": "Q", "i64": "q", "f64": "d", "bool": "B", "str": "I", "bytes": "I", "stack": "I"}
"""Types of captured values, and how ``struct`` packs them. ``str``, ``bytes`` and ``stack`` (packed as
``trapline.protocol.stacks`` says, its files are in ``files``) are indices into ``strings``."""
INTERNED = ("str", "bytes", "stack")
JsonValue = bool | int | float | str
_NO_FILES: Mapping[int, StackFile] = {}
_JSON_EXACT = 2**53
"""Up to here JavaScript's numbers hold every integer."""
FIXED = (("ts", "u64"), ("pid", "u32"), ("tid", "u32"), ("site", "u32"))
STATUS_SUFFIX = "?"


class ValueStatus(IntEnum):
    """How a captured value came out; a bad pointer is a value, never an error."""

    OK = 0
    TRUNCATED = 1
    NULL = 2
    FAULT = 3
    OPTIMISED_OUT = 4
    REDACTED = 5
    UNSUPPORTED = 6

    @property
    def text(self) -> str:
        return self.name.lower().replace("_", "-")


class Column(msgspec.Struct, frozen=True):
    """Name and type of a column; ``str`` (text), ``bytes`` and ``stack`` are u32 indices into the header's ``strings``."""

    name: str
    type: str


class Header(msgspec.Struct, omit_defaults=True):
    """What routing, storing and reading need; nobody on the way has to look at the columns."""

    host: str
    probe: str
    source: str
    """One registration of the probe at one tracer: it is what sequences count in."""
    seq: int
    count: int
    t0: int
    """``ts`` of the first row."""
    t1: int
    clock_offset: int
    """CLOCK_REALTIME - CLOCK_MONOTONIC of the host when the batch was made, in ns."""
    columns: list[Column]
    generation: int = 1
    strings: list[bytes] = []
    files: dict[int, StackFile] = {}
    """Files that frames of its stacks are in, by their numbers; these hold for the tracer's life (``source``'s)."""
    sites: list[str] = []
    comms: dict[int, str] = {}
    """Process names of the pids in this batch."""
    drops: dict[str, int] = {}
    """Hits lost at the source since its last batch, by stage; their numbers lie before ``seq``."""


_header_encoder = msgspec.msgpack.Encoder()
_header_decoder = msgspec.msgpack.Decoder(Header)


def _pad(n: int) -> int:
    return -n % 8


@dataclass
class HitBatch:
    """A header and its columns; ``columns[name]`` are arrays of ``header.count`` rows (views of the frame if decoded)."""

    header: Header
    columns: dict[str, npt.NDArray[Any]] = field(default_factory=dict)

    def encode(self) -> bytes:
        """Returns the frame."""
        head = _header_encoder.encode(self.header)
        parts = [_PREFIX.pack(MAGIC, len(head)), head, bytes(_pad(len(head)))]
        for column in self.header.columns:
            raw = np.ascontiguousarray(self.columns[column.name], _DTYPES[column.type]).tobytes()
            parts += (raw, bytes(_pad(len(raw))))
        return b"".join(parts)

    def hits(self, start: int = 0, stop: int | None = None) -> Iterator[Hit]:
        """Yields rows as ``Hit``s, for JSON; ``start`` and ``stop`` are row numbers."""
        h = self.header
        captured = [c for c in h.columns[len(FIXED) :] if not c.name.endswith(STATUS_SUFFIX)]
        convert = {c.name: in_json(c.type, h.strings, h.files) for c in captured}
        rows = range(start, h.count if stop is None else min(stop, h.count))
        ts, pids, tids, sites = (self.columns[name] for name, _ in FIXED)
        for i in rows:
            wall = int(ts[i]) + h.clock_offset
            args: dict[str, JsonValue | None] = {}
            status: dict[str, str] = {}
            frames: dict[str, list[StackFrame]] = {}
            for c in captured:
                st = int(self.columns[c.name + STATUS_SUFFIX][i])
                args[c.name] = None if st > ValueStatus.TRUNCATED else convert[c.name](self.columns[c.name][i].item())
                if c.type == "stack" and st <= ValueStatus.TRUNCATED:
                    stack = stacks.unpack(h.strings[int(self.columns[c.name][i])], h.files)
                    frames[c.name] = [_frame(f) for f in stack.frames]
                if st:
                    status[c.name] = status_text(st)
            site = int(sites[i])
            pid = int(pids[i])
            yield Hit(
                probe=h.probe,
                host=h.host,
                seq=h.seq + i,
                ts=datetime.fromtimestamp(wall / 1e9, UTC),
                ts_ns=str(wall),
                pid=pid,
                tid=int(tids[i]),
                comm=h.comms.get(pid, ""),
                site=h.sites[site] if site < len(h.sites) else "",
                args=args,
                status=status,
                stacks=frames,
            )


def _frame(frame: stacks.Frame) -> StackFrame:
    return StackFrame(path=frame.file.path, build_id=frame.file.build_id, file=frame.file.file, offset=frame.offset)


def _text(data: bytes) -> str:
    return data.decode("utf-8", "backslashreplace")


def _number(value: int) -> int | str:
    return value if -_JSON_EXACT <= value <= _JSON_EXACT else str(value)


def _real(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def in_json(
    kind: str, strings: Sequence[bytes], files: Mapping[int, StackFile] = _NO_FILES, name: stacks.Name = stacks.placed
) -> Callable[[Any], JsonValue]:
    """Returns what makes a column's values (as ``tolist`` has them) what ``trapline.model.Hit`` has.

    Args:
        kind: the column's type.
        strings: the batch's.
        files: the batch's.
        name: names the frames of stacks.
    """
    if kind == "stack":
        return lambda index: stacks.text(stacks.unpack(strings[index], files), name)
    if kind in INTERNED:
        texts: dict[int, str] = {}

        def text(index: int) -> str:  # the table has the texts of other columns too: only what is used is decoded
            known = texts.get(index)
            if known is None:
                known = texts[index] = _text(strings[index]) if kind == "str" else strings[index].hex()
            return known

        return text
    if kind == "bool":
        return bool
    return _real if kind == "f64" else _number


def status_text(value: int) -> str:
    """Returns the word for a value's status; a newer agent's becomes ``status-N``."""
    try:
        return ValueStatus(value).text
    except ValueError:
        return f"status-{value}"


def peek(frame: bytes | memoryview) -> tuple[Header, int]:
    """Reads the header alone.

    Returns:
        The header and the byte offset of the first column.

    Raises:
        ProtocolError: it is not a hit batch, or its header contradicts itself or the frame's length.
    """
    if len(frame) < _PREFIX.size:
        raise ProtocolError(f"hit batch of {len(frame)} bytes is shorter than its prefix")
    magic, head_len = _PREFIX.unpack_from(frame)
    if magic != MAGIC:
        raise ProtocolError(f"not a hit batch: it begins with {bytes(frame[:4])!r}")
    if head_len > MAX_HEADER_BYTES or _PREFIX.size + head_len > len(frame):
        raise ProtocolError(f"hit batch header of {head_len} bytes does not fit a frame of {len(frame)}")
    try:
        header = _header_decoder.decode(frame[_PREFIX.size : _PREFIX.size + head_len])
    except (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError, RecursionError) as e:
        raise ProtocolError(f"malformed hit batch header: {e}") from e
    if not 0 < header.count <= MAX_ROWS or header.seq < 0:
        raise ProtocolError(f"hit batch with count {header.count} and sequence {header.seq}")
    if [(c.name, c.type) for c in header.columns[: len(FIXED)]] != list(FIXED):
        raise ProtocolError("hit batch lacks the fixed columns")
    names = [c.name for c in header.columns]
    if len(set(names)) != len(names):
        raise ProtocolError("hit batch names a column twice")
    start = _PREFIX.size + head_len + _pad(head_len)
    size = start
    for c in header.columns:
        if c.type not in _DTYPES:
            raise ProtocolError(f"hit batch column {c.name} has unknown type {c.type}")
        if c.name.endswith(STATUS_SUFFIX) and c.type != "u8":
            raise ProtocolError(f"hit batch column {c.name} is named as a status, and is {c.type}")
        if not c.name.endswith(STATUS_SUFFIX) and (c.name, c.type) not in FIXED and c.name + STATUS_SUFFIX not in names:
            raise ProtocolError(f"hit batch column {c.name} has no status column")
        raw = _DTYPES[c.type].itemsize * header.count
        size += raw + _pad(raw)
    if size != len(frame):
        raise ProtocolError(f"hit batch of {len(frame)} bytes should have {size}")
    return header, start


def decode(frame: bytes | memoryview) -> HitBatch:
    """Reads a frame; the columns are read-only views of it. Raises ProtocolError as ``peek``, and for a string index
    beyond the table."""
    header, at = peek(frame)
    columns: dict[str, npt.NDArray[Any]] = {}
    for c in header.columns:
        dtype = _DTYPES[c.type]
        columns[c.name] = np.frombuffer(frame, dtype, header.count, at)
        raw = dtype.itemsize * header.count
        at += raw + _pad(raw)
    for c in header.columns:
        if c.type in INTERNED:
            ok = columns[c.name + STATUS_SUFFIX] <= ValueStatus.TRUNCATED
            if ok.any() and int(columns[c.name][ok].max()) >= len(header.strings):
                raise ProtocolError(f"hit batch column {c.name} points beyond its string table")
        if c.type == "stack" and header.count:
            for i in np.unique(columns[c.name]).tolist():
                if i >= len(header.strings):
                    raise ProtocolError(f"hit batch column {c.name} points beyond its string table")
                stacks.unpack(header.strings[i], header.files)
    return HitBatch(header, columns)


def schema(captures: Sequence[tuple[str, str]]) -> list[Column]:
    """Returns the columns of a probe that captures these (name, type) values; types are those of ``VALUE_TYPES``."""
    columns = [Column(n, t) for n, t in FIXED]
    columns += [Column(name, kind) for name, kind in captures]
    columns += [Column(name + STATUS_SUFFIX, "u8") for name, _ in captures]
    return columns


def row_dtype(columns: Sequence[Column]) -> np.dtype[Any]:
    """Returns the packed record that an engine's ring writes for these columns, one field a column, in order; its
    ``struct`` format is ``row_format``."""
    return np.dtype([(c.name, _DTYPES[c.type]) for c in columns])


def row_format(columns: Sequence[Column]) -> str:
    """Returns the ``struct`` format of ``row_dtype``: what ``struct.pack_into`` takes at the trap."""
    return "<" + "".join(({"u32": "I", "u8": "B"} | VALUE_TYPES)[c.type] for c in columns)
