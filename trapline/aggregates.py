"""What an aggregate keeps in the place of hits, and how parts of it become a whole.

A ``Cell`` is what is known of one row. Cells of the same aggregate are *added*: counts and sums add up, the smaller
minimum stays, registers take the larger value. Adding is associative and commutative and has the empty cell as its zero,
so that it does not matter where and in which order parts meet: threads, processes, hosts, seconds. A ``Table`` is cells by
key, and bounded: keys beyond the bound share one cell, so that the counts of all cells together are the hits, always.

Where the figures come from, and what they promise:

- ``hist``: bucket n > 0 holds 2^(n-1) to 2^n - 1, 0 holds 0, -n the mirror image: bpftrace's ``hist()``.
- ``quantiles``: DDSketch (Masson, Rim, Lee: "DDSketch: a fast and fully-mergeable quantile sketch", VLDB 2019): within
  ``ACCURACY`` of the value itself, between ``_SMALLEST`` and ``_LARGEST``.
- ``topk``: Misra and Gries' frequent items, merged as in Agarwal et al., "Mergeable summaries" (PODS 2012): a count is at
  most ``Cell.error`` too small, never too large; exact while no more than 2 * ``capacity`` different values occur.
- ``distinct``: HyperLogLog with 64-bit hashes and 4,096 registers; the estimator is Ertl's ("New cardinality estimation
  algorithms for HyperLogLog sketches", 2017): a standard error of 1.6 %.

docs/adr/0019 says why these are here and not a library's.
"""

from __future__ import annotations

import hashlib
import heapq
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

import msgspec

from trapline.protocol.stacks import Files, StackFile

Value = int | float | bytes | bool | None
"""Integers have 64 bits: -2^63 to 2^64 - 1."""
Part = tuple[Value, int]
"""A value and its ``ValueStatus``."""
Key = tuple[Part, ...]
Function = Literal["count", "sum", "min", "max", "avg", "hist", "lhist", "quantiles", "topk", "distinct"]

FUNCTIONS: dict[Function, int] = {
    "count": 0, "sum": 0, "min": 0, "max": 0, "avg": 0, "hist": 0, "lhist": 3, "quantiles": 0, "topk": 1, "distinct": 0,
}  # fmt: skip
"""The functions, and how many parameters each has."""
ACCURACY = 0.01
"""Relative error of a quantile, at most."""
REGISTERS_LOG2 = 12
REGISTERS = 1 << REGISTERS_LOG2
MAX_RANK = 64 - REGISTERS_LOG2 + 1
_GAMMA = (1 + ACCURACY) / (1 - ACCURACY)
_PER_LOG = 1 / math.log(_GAMMA)
_SMALLEST = 1e-9
_LARGEST = 2.0**64
_BIAS = 1 << 12
"""Added to the index of a quantile's bin, so that all of them are positive, and negative for negative values."""
_MIN_CAPACITY = 100
MAX_STACK_BYTES = 64 * 1024 * 1024
"""Of the stacks in the keys of one table."""


class Cell(msgspec.Struct, omit_defaults=True):
    """What is known of one row; which fields are used depends on the function."""

    count: int = 0
    """Hits."""
    bad: dict[int, int] = {}
    """Those of them whose value could not be had, by its ``ValueStatus``: they are in ``count`` alone."""
    sum: int | float = 0
    min: int | float | None = None
    max: int | float | None = None
    bins: dict[int, int] = {}
    """Of a histogram or quantiles: hits by bin."""
    items: dict[Part, int] = {}
    """Of ``topk``: hits by value, at least so many."""
    error: int = 0
    """Of ``topk``: at most so many more than ``items`` says."""
    registers: dict[int, int] = {}
    """Of ``distinct``: those that are not 0."""

    def add(self, other: Cell, capacity: int = _MIN_CAPACITY) -> None:
        """Takes in what another cell of the same aggregate knows; ``capacity`` is ``capacity_of`` it."""
        self.count += other.count
        self.sum = _plus(self.sum, other.sum)
        if other.min is not None:
            self.min = other.min if self.min is None else min(self.min, other.min)
        if other.max is not None:
            self.max = other.max if self.max is None else max(self.max, other.max)
        for mine, theirs in ((self.bad, other.bad), (self.bins, other.bins)):
            for key, count in theirs.items():
                mine[key] = mine.get(key, 0) + count
        for item, count in other.items.items():
            self.items[item] = self.items.get(item, 0) + count
        self.error += other.error
        self.shrink(capacity)
        for register, rank in other.registers.items():
            if rank > self.registers.get(register, 0):
                self.registers[register] = rank

    def shrink(self, capacity: int) -> None:
        """Forgets rare items where there are too many: those that stay give up as much as the largest that goes."""
        if len(self.items) <= 2 * capacity:
            return
        cut = heapq.nlargest(capacity + 1, self.items.values())[-1]
        self.items = {item: count - cut for item, count in self.items.items() if count > cut}
        self.error += cut


class Table:
    """Cells by key: at most ``max_keys`` of them, and one for all other keys. Not thread-safe.

    Attributes:
        cells: by key.
        other: of the keys that came when the table was full; None while there are none.
        stacks: which parts of a key are packed stacks (``trapline.protocol.stacks``); known with the first rows.
        files: what the numbers in them mean.
    """

    def __init__(self, max_keys: int, capacity: int = _MIN_CAPACITY) -> None:
        self.max_keys = max_keys
        self.capacity = capacity
        self.stacks: tuple[int, ...] = ()
        self.files = Files()
        self._stack_bytes = 0
        self.cells: dict[Key, Cell] = {}
        self.other: Cell | None = None

    @property
    def count(self) -> int:
        """Hits in all cells."""
        return sum(cell.count for cell in self.cells.values()) + (self.other.count if self.other else 0)

    def has_stacks_at(self, stacks: Sequence[int]) -> bool:
        """Whether rows with stacks in these parts of their keys may be added: an empty table takes all."""
        if not self.cells and self.other is None:
            self.stacks = tuple(stacks)
        return self.stacks == tuple(stacks)

    def cell(self, key: Key) -> Cell:
        """Returns where hits of a key belong: a cell of its own, or the one of the others."""
        cell = self.cells.get(key)
        if cell is not None:
            return cell
        size = stack_bytes(key, self.stacks)
        if len(self.cells) < self.max_keys and self._stack_bytes + size <= MAX_STACK_BYTES:
            self._stack_bytes += size
            cell = self.cells[key] = Cell()
            return cell
        return self.beyond()

    def beyond(self) -> Cell:
        """Returns the cell of the keys that have none of their own."""
        if self.other is None:
            self.other = Cell()
        return self.other

    def add(
        self, cells: Iterable[tuple[Key, Cell]], other: Cell | None = None, files: Mapping[int, StackFile] | None = None
    ) -> None:
        """Takes in cells of another table of the same aggregate; ``files``: what the numbers in its stacks mean."""
        mine = self.files.renumbered(files) if self.stacks and files is not None else None
        for key, cell in cells:
            if mine is not None:
                parts = list(key)
                for i in self.stacks:
                    value, status = parts[i]
                    if isinstance(value, bytes):
                        parts[i] = (mine(value), status)
                key = tuple(parts)
            self.cell(key).add(cell, self.capacity)
        if other is not None:
            self.beyond().add(other, self.capacity)


def stack_bytes(key: Key, stacks: Sequence[int]) -> int:
    """Returns the bytes of the stacks in a key."""
    return sum(len(value) for i in stacks if isinstance(value := key[i][0], bytes))


def capacity_of(function: Function, parameters: Iterable[int]) -> int:
    """Returns how many values a ``topk`` keeps for sure: ten times what is asked for, at least 100."""
    return max(_MIN_CAPACITY, *(10 * k for k in parameters)) if function == "topk" else _MIN_CAPACITY


def recorder(function: Function, parameters: tuple[int, ...]) -> Callable[[Cell, Part], None]:
    """Returns what enters the value of one hit into its cell; ``Cell.count`` is the caller's.

    Called at the trap: what it does takes a microsecond at the most, but for a ``topk`` that shrinks.
    """
    if function == "count":
        return lambda cell, part: None
    add = _recorder(function, parameters)
    number = function not in ("topk", "distinct")

    def record(cell: Cell, part: Part) -> None:
        value, status = part
        # A truncated string is a value; one that is not there is not. Of numbers, what is none is none; an infinite one
        # has no place in a sum, and none in JSON.
        if status > 1 or (number and not _is_number(value)):
            status = status if status > 1 else _UNSUPPORTED
            cell.bad[status] = cell.bad.get(status, 0) + 1
        else:
            add(cell, part)

    return record


_UNSUPPORTED = 6
"""``ValueStatus.UNSUPPORTED``."""


def _is_number(value: Value) -> bool:
    return isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))


def _plus(one: int | float, other: int | float) -> int | float:
    """Adds; what is beyond the largest floating-point number is that."""
    total = one + other
    if isinstance(total, float) and math.isinf(total):
        return math.copysign(sys.float_info.max, total)
    return total


def _recorder(function: Function, parameters: tuple[int, ...]) -> Callable[[Cell, Part], None]:
    match function:
        case "sum" | "avg":
            return _sum
        case "min" | "max":
            return _extremes
        case "hist":
            return _log2
        case "lhist":
            return _linear(*parameters)
        case "quantiles":
            return _sketch
        case "topk":
            return _item(capacity_of(function, parameters))
        case _:
            return _register


def _number(part: Part) -> int | float:
    return part[0]  # type: ignore[return-value] # ``recorder`` has looked


def _sum(cell: Cell, part: Part) -> None:
    cell.sum = _plus(cell.sum, _number(part))


def _extremes(cell: Cell, part: Part) -> None:
    value = _number(part)
    if cell.min is None or value < cell.min:
        cell.min = value
    if cell.max is None or value > cell.max:
        cell.max = value


def _log2(cell: Cell, part: Part) -> None:
    value = _number(part)
    if isinstance(value, float):
        value = int(max(-_LARGEST, min(value, _LARGEST)))
    bin = value.bit_length() if value >= 0 else -value.bit_length()
    cell.bins[bin] = cell.bins.get(bin, 0) + 1


def _linear(low: int, high: int, step: int) -> Callable[[Cell, Part], None]:
    last = (high - low + step - 1) // step

    def record(cell: Cell, part: Part) -> None:
        value = _number(part)
        bin = -1 if value < low else last if value >= high else int((value - low) // step)
        cell.bins[bin] = cell.bins.get(bin, 0) + 1

    return record


def _sketch(cell: Cell, part: Part) -> None:
    value = _number(part)
    size = abs(value)
    if size < _SMALLEST:
        bin = 0
    else:
        bin = math.ceil(math.log(min(size, _LARGEST)) * _PER_LOG) + _BIAS
        if value < 0:
            bin = -bin
    cell.bins[bin] = cell.bins.get(bin, 0) + 1
    _extremes(cell, part)


def _item(capacity: int) -> Callable[[Cell, Part], None]:
    def record(cell: Cell, part: Part) -> None:
        items = cell.items
        known = items.get(part)
        if known is None:
            items[part] = 1
            cell.shrink(capacity)
        else:
            items[part] = known + 1

    return record


def _register(cell: Cell, part: Part) -> None:
    value = part[0]
    data = value if isinstance(value, bytes) else repr(value).encode()
    hashed = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
    register = hashed & (REGISTERS - 1)
    rank = MAX_RANK - (hashed >> REGISTERS_LOG2).bit_length()
    if rank > cell.registers.get(register, 0):
        cell.registers[register] = rank


# --- what cells say --------------------------------------------------------------------------------------------------


def values(cell: Cell) -> int:
    """Returns how many hits had a value."""
    return cell.count - sum(cell.bad.values())


def quantile(cell: Cell, q: float) -> float | None:
    """Returns the value below which a share ``q`` (0 to 1) of the values are; None where there are none.

    The least of them that has at least ``q`` * (n - 1) others below it, within ``ACCURACY``.
    """
    total = sum(cell.bins.values())
    if not total:
        return None
    rank = q * (total - 1)
    seen = 0
    bin = 0
    for bin in sorted(cell.bins):
        seen += cell.bins[bin]
        if seen > rank:
            break
    if bin == 0:
        return 0.0
    size = 2 * _GAMMA ** (abs(bin) - _BIAS) / (1 + _GAMMA)
    value = size if bin > 0 else -size
    # The extremes are known exactly.
    low = value if cell.min is None else float(cell.min)
    high = value if cell.max is None else float(cell.max)
    return min(max(value, low), high)


def distinct(cell: Cell) -> int:
    """Returns about how many different values there were."""
    counts = [0] * (MAX_RANK + 1)
    for rank in cell.registers.values():
        counts[rank] += 1
    counts[0] = REGISTERS - len(cell.registers)
    z = REGISTERS * _tau(1 - counts[MAX_RANK] / REGISTERS)
    for rank in range(MAX_RANK - 1, 0, -1):
        z = 0.5 * (z + counts[rank])
    z += REGISTERS * _sigma(counts[0] / REGISTERS)
    return round(REGISTERS * REGISTERS / (2 * math.log(2) * z)) if z != math.inf else 0


def _sigma(x: float) -> float:
    """Ertl's correction for registers that are 0."""
    if x == 1.0:
        return math.inf
    y, z, before = 1.0, x, -1.0
    while z != before:
        before = z
        x *= x
        z += x * y
        y += y
    return z


def _tau(x: float) -> float:
    """Ertl's correction for registers that are full."""
    if x in (0.0, 1.0):
        return 0.0
    y, z, before = 1.0, 1 - x, -1.0
    while z != before:
        before = z
        x = math.sqrt(x)
        y *= 0.5
        z -= (1 - x) ** 2 * y
    return z / 3


def buckets_of(function: str, parameters: list[int]) -> tuple[int, int]:
    """Returns the first and the last bucket that a histogram can have."""
    if function == "lhist":
        low, high, step = parameters
        return -1, (high - low + step - 1) // step
    return -65, 65


def bounds(function: str, parameters: list[int], bin: int) -> tuple[int | None, int | None]:
    """Returns the least value of a histogram's bucket, and the first beyond it; None: there is no bound."""
    if function == "lhist":
        low, high, step = parameters
        if bin < 0:
            return None, low
        at = low + bin * step
        return (high, None) if at >= high else (at, min(at + step, high))
    if bin == 0:
        return 0, 1
    if bin > 0:
        return 1 << (bin - 1), 1 << bin
    return -(1 << -bin) + 1, -(1 << (-bin - 1)) + 1


def most(cells: Mapping[Key, Cell], top: int | None) -> list[tuple[Key, Cell]]:
    """Returns cells in the order of their counts, largest first; ``top`` of them, or all."""
    order = sorted(cells.items(), key=lambda item: (-item[1].count, repr(item[0])))
    return order[:top]
