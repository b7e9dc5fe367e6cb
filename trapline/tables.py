"""Aggregates as people and programs read them: cells become rows of figures."""

from __future__ import annotations

from trapline.aggregates import (
    Cell,
    Key,
    Part,
    Table,
    bounds,
    buckets_of,
    distinct,
    most,
    quantile,
    values,
)
from trapline.model import (
    Aggregate,
    AggregateBucket,
    AggregateItem,
    AggregateRow,
    AggregateTable,
    AggregateValue,
    StackFrame,
)
from trapline.protocol.hits import ValueStatus, status_text
from trapline.protocol.stacks import Frame, text, unpack

QUANTILES = (0.5, 0.9, 0.95, 0.99, 0.999)
_EXACT = 2**53


class FrameList:
    """The frames of tables' stacks, each once.

    Attributes:
        frames: as ``AggregateTable.frames`` has them.
    """

    def __init__(self) -> None:
        self.frames: list[StackFrame] = []
        self._known: dict[Frame, int] = {}

    def index(self, frame: Frame) -> int:
        """Returns where a frame is."""
        known = self._known.get(frame)
        if known is None:
            known = self._known[frame] = len(self.frames)
            file = frame.file
            self.frames.append(StackFrame(path=file.path, build_id=file.build_id, file=file.file, offset=frame.offset))
        return known


def table_of(
    aggregate: Aggregate,
    table: Table,
    *,
    probe: str = "",
    top: int | None = None,
    frames: FrameList | None = None,
) -> AggregateTable:
    """Returns a table's rows, those with the most hits first; ``top`` of them, or all.

    Args:
        aggregate: what it is of.
        table: its cells.
        probe: its probe.
        top: the most rows; None: all.
        frames: where the frames of stacks are listed, if those of several tables are to be in one list.
    """
    listed = FrameList() if frames is None else frames
    rows = [
        _with_stacks(row_of(aggregate, key, cell), aggregate, key, table, listed)
        for key, cell in most(table.cells, top)
    ]
    return AggregateTable(
        probe=probe,
        aggregate=aggregate,
        count=table.count,
        keys=len(table.cells),
        rows=rows,
        other=None if table.other is None else row_of(aggregate, (), table.other),
        frames=listed.frames,
    )


def _with_stacks(row: AggregateRow, aggregate: Aggregate, key: Key, table: Table, frames: FrameList) -> AggregateRow:
    """Puts places in files, and indices of frames, where a row's key has packed stacks."""
    for i in table.stacks:
        packed = key[i][0]
        if i < len(aggregate.by) and isinstance(packed, bytes):
            stack = unpack(packed, table.files.by_number)
            row.key[i] = text(stack)
            row.stacks[aggregate.by[i]] = [frames.index(frame) for frame in stack.frames]
    return row


def row_of(aggregate: Aggregate, key: Key, cell: Cell) -> AggregateRow:
    """Returns what a cell says; stacks in the key are not looked into."""
    row = AggregateRow(
        key=[_part(part) for part in key],
        key_status=[status_text(status) if status else "" for _, status in key],
        count=cell.count,
        bad={status_text(status): count for status, count in sorted(cell.bad.items())},
    )
    good = values(cell)
    match aggregate.function:
        case "count":
            row.value = cell.count
        case "sum":
            row.value = _exact(cell.sum) if good else None
        case "avg":
            row.value = cell.sum / good if good else None
        case "min":
            row.value = _exact(cell.min)
        case "max":
            row.value = _exact(cell.max)
        case "distinct":
            row.value = distinct(cell)
        case "hist" | "lhist":
            row.buckets = _buckets(aggregate, cell)
        case "quantiles":
            row.quantiles = _quantiles(cell)
        case "topk":
            (k,) = aggregate.parameters
            order = sorted(cell.items.items(), key=lambda item: (-item[1], repr(item[0])))
            row.items = [
                AggregateItem(value=_part(part), status=status_text(part[1]) if part[1] else "", count=count)
                for part, count in order[:k]
            ]
            row.error = cell.error
    return row


def _buckets(aggregate: Aggregate, cell: Cell) -> list[AggregateBucket]:
    # Of what an agent sends, buckets that there cannot be are left out here: nobody could show them.
    least, most = buckets_of(aggregate.function, aggregate.parameters)
    bins = [bin for bin in cell.bins if least <= bin <= most]
    buckets = []
    for bin in range(min(bins), max(bins) + 1) if bins else ():
        low, high = bounds(aggregate.function, aggregate.parameters, bin)
        buckets.append(AggregateBucket(low=_exact(low), high=_exact(high), count=cell.bins.get(bin, 0)))
    return buckets


def _quantiles(cell: Cell) -> dict[str, float]:
    shares = {f"{q:g}": value for q in QUANTILES if (value := quantile(cell, q)) is not None}
    if cell.min is None or cell.max is None:
        return shares
    return {"0": float(cell.min), **shares, "1": float(cell.max)}


def _exact(value: int | float | None) -> AggregateValue:
    return str(value) if isinstance(value, int) and abs(value) > _EXACT else value


def _part(part: Part) -> AggregateValue:
    value, status = part
    if status > ValueStatus.TRUNCATED:
        return None
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    return _exact(value)
