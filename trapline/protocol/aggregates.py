"""Aggregate frames: what a probe's cells have gained since the frame before, in the place of hits.

A frame is the magic "TLA1" and a msgpack map, see ``Delta``. It numbers hits as a hit batch does: it stands for hits
``seq`` to ``seq + count - 1`` of (probe, source), and the counts of its cells add up to ``count``. So a frame that comes
twice is known, one that is lost is a gap of so many hits, and what is added up of frames is exact.

A part of a key may be a packed stack (``trapline.protocol.stacks``): ``Delta.stacks`` says which, ``Delta.files`` what the
numbers in it mean. Numbers are the frame's: whoever adds frames up knows files by their build-ids (``stacks.Files``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Protocol

import msgspec

from trapline.aggregates import MAX_RANK, REGISTERS, Cell, Key, Part, Table
from trapline.errors import ProtocolError
from trapline.protocol import hits, stacks
from trapline.protocol.stacks import StackFile

MAGIC = b"TLA1"
FRAME_BYTES = 512 * 1024
"""A table beyond that goes in several frames."""
MAX_FRAME_BYTES = 3 * 1024 * 1024
MAX_CELLS = 65_536
_MAX_PARTS = 16
_MAX_BINS = 16_384
_MAX_COUNT = 2**53
_MAX_VALUE = 1 << 64
_MAX_PATH, _MAX_IDENTITY = 4096, 128
"""Characters of a file's path, and of its build-id or identity."""
_LIMB = 1 << 62
"""msgpack's integers have 64 bits, a sum of many has more: it goes in two parts."""


class Numbered(Protocol):
    """What hit batches and aggregate frames have in common: enough to route, count and book them."""

    @property
    def host(self) -> str: ...
    @property
    def probe(self) -> str: ...
    @property
    def source(self) -> str: ...
    @property
    def seq(self) -> int: ...
    @property
    def count(self) -> int: ...
    @property
    def drops(self) -> dict[str, int]: ...


class Entry(msgspec.Struct, omit_defaults=True, array_like=True):
    """A row: its key (no parts for the only row of an aggregate without ``by``) and its cell."""

    key: Key
    cell: Cell
    high: int = 0
    """The sum is ``high`` * 2^62 more than ``cell.sum``."""


class Delta(msgspec.Struct, omit_defaults=True):
    """A frame's content."""

    host: str
    probe: str
    source: str
    """One registration of the probe at one tracer: it is what sequences count in."""
    seq: int
    count: int
    begin_ns: int
    """When the first of its hits may have been, at the earliest: Unix ns."""
    end_ns: int
    generation: int = 1
    entries: list[Entry] = []
    other: Entry | None = None
    """Of the keys that were beyond the bound; its key means nothing."""
    drops: dict[str, int] = {}
    """Hits lost at the source since its last frame, by stage; their numbers lie before ``seq``."""
    stacks: list[int] = []
    """Which parts of a key are packed stacks, in order."""
    files: dict[int, StackFile] = {}
    """What the numbers of files in them mean."""

    def cells(self) -> Iterator[tuple[Key, Cell]]:
        """Yields its rows, for ``Table.add``, which does not keep them."""
        return ((entry.key, entry.cell) for entry in self.entries)

    def add_to(self, table: Table) -> None:
        """Adds its rows to a table, which does not keep them. Where another part of the key is a stack there the frame is
        of another aggregate: its hits count as those of other keys."""
        other = self.other.cell if self.other is not None else None
        if table.has_stacks_at(self.stacks):
            table.add(self.cells(), other, self.files)
            return
        for entry in self.entries:
            table.beyond().add(entry.cell, table.capacity)
        table.add((), other)


class _Head(msgspec.Struct):
    """What ``peek`` reads; the rest is skipped."""

    host: str
    probe: str
    source: str
    seq: int
    count: int
    drops: dict[str, int] = {}


_encode = msgspec.msgpack.Encoder().encode
_decoder = msgspec.msgpack.Decoder(Delta)
_head_decoder = msgspec.msgpack.Decoder(_Head)
_MALFORMED = (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError, RecursionError, TypeError)


def entry(key: Key, cell: Cell) -> Entry:
    """Returns a row as it is sent."""
    if isinstance(cell.sum, int) and not -_LIMB < cell.sum < _LIMB:
        high, low = divmod(cell.sum, _LIMB)
        return Entry(key, msgspec.structs.replace(cell, sum=low), high)
    return Entry(key, cell)


def is_delta(frame: bytes) -> bool:
    """Says whether a frame is of this kind, not whether it is sound."""
    return frame[:4] == MAGIC


def encode(delta: Delta) -> bytes:
    """Returns the frame."""
    return MAGIC + _encode(delta)


def _no_file(number: int) -> StackFile:
    return StackFile("")


def split(
    cells: Iterable[tuple[Key, Cell]],
    other: Cell | None,
    *,
    host: str,
    probe: str,
    source: str,
    seq: int,
    begin_ns: int,
    end_ns: int,
    generation: int = 1,
    drops: dict[str, int] | None = None,
    max_bytes: int = FRAME_BYTES,
    of_stacks: Sequence[int] = (),
    file: Callable[[int], StackFile] = _no_file,
) -> list[tuple[int, bytes]]:
    """Returns cells as (count, frame), each of some ``max_bytes`` at most but for a single cell that is larger.

    Cells without a hit are left out. ``of_stacks``: which parts of a key are packed stacks; ``file``: what numbers in them
    mean.
    """
    frames: list[tuple[int, bytes]] = []
    untold = drops or {}
    entries: list[Entry] = []
    files: dict[int, StackFile] = {}
    size = 0

    def close(beyond: Entry | None) -> None:
        nonlocal seq, untold, entries, files, size
        count = sum(e.cell.count for e in entries) + (beyond.cell.count if beyond else 0)
        if count:
            delta = Delta(
                host, probe, source, seq, count, begin_ns, end_ns, generation, entries, beyond, untold,
                list(of_stacks), files,
            )  # fmt: skip
            frames.append((count, encode(delta)))
            seq, untold = seq + count, {}
        entries, files, size = [], {}, 0

    for key, cell in cells:
        if not cell.count:
            continue
        sent = entry(key, cell)
        named = _files_of(key, of_stacks, file)
        own = len(_encode(sent))
        if named and own + len(_encode(named)) > MAX_FRAME_BYTES // 2:
            # Of a program that maps very many files of very long names: no frame would hold it.
            other = other or Cell()
            other.add(cell, _MAX_BINS // 2)
            continue
        more = own + _size(named, files)
        if entries and (size + more > max_bytes or len(entries) >= MAX_CELLS):
            close(None)
            more = own + _size(named, files)
        entries.append(sent)
        files |= named
        size += more
    close(entry((), other) if other is not None and other.count else None)
    return frames


def _files_of(key: Key, of_stacks: Sequence[int], file: Callable[[int], StackFile]) -> dict[int, StackFile]:
    """Returns the files that the stacks in a key have frames in."""
    numbers = {n for i in of_stacks if isinstance(value := key[i][0], bytes) for n in stacks.numbers_of(value)}
    return {number: _bounded(file(number)) for number in sorted(numbers - {0})}


def _bounded(file: StackFile) -> StackFile:
    if len(file.path) <= _MAX_PATH:
        return file
    return msgspec.structs.replace(file, path=file.path[:_MAX_PATH])


def _size(named: Mapping[int, StackFile], told: Mapping[int, StackFile]) -> int:
    """Returns the bytes of those files that are not told yet."""
    return len(_encode({n: file for n, file in named.items() if n not in told})) if named else 0


def peek(frame: bytes) -> Numbered:
    """Reads what a frame has in common with a hit batch. Raises ProtocolError."""
    if not is_delta(frame):
        raise ProtocolError(f"not an aggregate frame: it begins with {frame[:4]!r}")
    try:
        head = _head_decoder.decode(memoryview(frame)[4:])
    except _MALFORMED as e:
        raise ProtocolError(f"malformed aggregate frame: {e}") from e
    _check_head(head)
    return head


def head(frame: bytes) -> Numbered:
    """Reads what every kind of frame has, of either kind. Raises ProtocolError."""
    return peek(frame) if is_delta(frame) else hits.peek(frame)[0]


def decode(frame: bytes) -> Delta:
    """Reads a frame, and checks everything that is relied on later.

    Raises:
        ProtocolError: it is none, or contradicts itself, or its numbers cannot be real.
    """
    if not is_delta(frame):
        raise ProtocolError(f"not an aggregate frame: it begins with {frame[:4]!r}")
    if len(frame) > MAX_FRAME_BYTES:
        raise ProtocolError(f"an aggregate frame of {len(frame)} bytes; {MAX_FRAME_BYTES} are the most")
    try:
        delta = _decoder.decode(memoryview(frame)[4:])
    except _MALFORMED as e:
        raise ProtocolError(f"malformed aggregate frame: {e}") from e
    _check_head(delta)
    if not 0 <= delta.begin_ns <= delta.end_ns < 2**63:
        raise ProtocolError(f"an aggregate frame of {delta.probe} has times outside of 1970 to 2262")
    if len(delta.entries) > MAX_CELLS:
        raise ProtocolError(f"an aggregate frame of {len(delta.entries)} rows")
    _check_files(delta.stacks, delta.files)
    entries = [*delta.entries, delta.other] if delta.other is not None else delta.entries
    for sent in entries:
        _check_key(sent.key, delta.stacks if sent is not delta.other else (), delta.files)
        _check_cell(sent.cell)
        _put_together(sent)
    if sum(sent.cell.count for sent in entries) != delta.count:
        raise ProtocolError(f"an aggregate frame of {delta.count} hits has rows of another number")
    return delta


class _Kept(msgspec.Struct, omit_defaults=True):
    entries: list[Entry]
    other: Entry | None = None
    stacks: list[int] = []
    files: dict[int, StackFile] = {}


_kept_decoder = msgspec.msgpack.Decoder(_Kept)


def pack(table: Table) -> bytes:
    """Returns a table as bytes, for a store."""
    other = entry((), table.other) if table.other else None
    rows = [entry(*row) for row in table.cells.items()]
    return _encode(_Kept(rows, other, list(table.stacks), table.files.by_number))


def unpack(data: bytes, into: Table) -> None:
    """Adds a table that ``pack`` gave. Raises ProtocolError where it is damaged."""
    try:
        kept = _kept_decoder.decode(data)
    except _MALFORMED as e:
        raise ProtocolError(f"a kept aggregate is damaged: {e}") from e
    _check_files(kept.stacks, kept.files)
    for sent in kept.entries:
        _check_key(sent.key, kept.stacks, kept.files)
    if not kept.entries and kept.other is None:
        return
    if not into.has_stacks_at(kept.stacks):
        raise ProtocolError("a kept aggregate is of another key")
    for sent in [*kept.entries, *([kept.other] if kept.other is not None else [])]:
        _put_together(sent)
    into.add(((e.key, e.cell) for e in kept.entries), kept.other.cell if kept.other is not None else None, kept.files)


def _put_together(sent: Entry) -> None:
    """Makes one sum of its two parts."""
    if sent.high:
        if not isinstance(sent.cell.sum, int):
            raise ProtocolError("an aggregate frame has half a sum")
        sent.cell.sum += sent.high * _LIMB
        sent.high = 0


def merged(first: bytes, second: bytes) -> bytes | None:
    """Returns one frame in the place of two of which the second follows on the first; None where there is none.

    Raises:
        ProtocolError: one of them is no aggregate frame.
    """
    if len(first) + len(second) > FRAME_BYTES:
        return None  # it need not become so large, but what has so many keys is not looked through for each frame
    one, two = decode(first), decode(second)
    same = (one.host, one.probe, one.source, one.generation) == (two.host, two.probe, two.source, two.generation)
    if not same or two.seq != one.seq + one.count or two.drops or one.stacks != two.stacks:
        return None
    table = Table(MAX_CELLS, _MAX_BINS // 2)
    for delta in (one, two):
        delta.add_to(table)
    ((_, frame),) = split(
        table.cells.items(),
        table.other,
        host=one.host,
        probe=one.probe,
        source=one.source,
        seq=one.seq,
        begin_ns=one.begin_ns,
        end_ns=max(one.end_ns, two.end_ns),
        generation=one.generation,
        drops=one.drops,
        max_bytes=MAX_FRAME_BYTES,
        of_stacks=one.stacks,
        file=table.files.get,
    )
    return frame


def _check_head(head: _Head | Delta) -> None:
    if not 0 < head.count <= _MAX_COUNT or not 0 <= head.seq <= 2**63 - _MAX_COUNT:
        raise ProtocolError(f"aggregate frame with count {head.count} and sequence {head.seq}")
    if any(not 0 <= n < 2**63 for n in head.drops.values()):
        raise ProtocolError("an aggregate frame counts a negative or absurd number of drops")


def _check_files(of_stacks: list[int], files: dict[int, StackFile]) -> None:
    if sorted(set(of_stacks)) != of_stacks or (of_stacks and not 0 <= of_stacks[0] <= of_stacks[-1] < _MAX_PARTS):
        raise ProtocolError(f"an aggregate frame with stacks at {of_stacks[:20]} of a key")
    if len(files) > stacks.MAX_FILES:
        raise ProtocolError(f"an aggregate frame of {len(files)} files")
    for file in files.values():
        if len(file.path) > _MAX_PATH or len(file.build_id) > _MAX_IDENTITY or len(file.file) > _MAX_IDENTITY:
            raise ProtocolError("an aggregate frame with a file whose name is longer than any can be")


def _check_key(key: Key, of_stacks: Sequence[int], files: Mapping[int, StackFile]) -> None:
    if len(key) > _MAX_PARTS:
        raise ProtocolError(f"a row's key of {len(key)} values")
    if of_stacks and of_stacks[-1] >= len(key):
        raise ProtocolError(f"a row's key of {len(key)} values, of which number {of_stacks[-1]} is a stack")
    for i, part in enumerate(key):
        if i not in of_stacks:
            _check_part(part)
        elif isinstance(part[0], bytes):
            _check_status(part[1])
            stacks.check(part[0], files)
        elif part[0] is not None or not part[1]:
            raise ProtocolError("a stack that is none")
        else:
            _check_status(part[1])


def _check_part(part: Part) -> None:
    value, status = part
    _check_status(status)
    if isinstance(value, bytes) and len(value) > 4096:
        raise ProtocolError(f"a value of {len(value)} bytes")


def _check_status(status: int) -> None:
    if not 0 <= status < 256:
        raise ProtocolError(f"a value's status {status}")


def _check_cell(cell: Cell) -> None:
    if cell.count < 0 or cell.error < 0:
        raise ProtocolError("a row that counts less than nothing")
    if len(cell.bins) > _MAX_BINS or len(cell.items) > _MAX_BINS or len(cell.bad) > 256:
        raise ProtocolError("a row that is larger than any can be")
    for counts in (cell.bad.values(), cell.bins.values(), cell.items.values()):
        if any(n < 0 for n in counts) or sum(counts) > cell.count:
            raise ProtocolError(f"a row of {cell.count} hits counts more of them")
    if any(abs(bin) > _MAX_BINS for bin in cell.bins):
        raise ProtocolError("a row with a bucket that there is not")
    for item in cell.items:
        _check_part(item)
    if any(not (0 <= at < REGISTERS and 0 < rank <= MAX_RANK) for at, rank in cell.registers.items()):
        raise ProtocolError("a row with a register that there is not")
    if any(isinstance(v, float) and not math.isfinite(v) for v in (cell.sum, cell.min, cell.max)):
        raise ProtocolError("a row with a value that is no number")
