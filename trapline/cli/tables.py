"""Aggregates on a terminal: tables of figures, histograms as bars, what is frequent as a list, stacks frame by frame."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from trapline.cli.rows import plain
from trapline.model import AggregateBucket, AggregateRow, AggregateTable, AggregateValue, StackFrame
from trapline.protocol.stacks import Frame, StackFile, fold, place

_BAR = 40
_UNITS = (("T", 40), ("G", 30), ("M", 20), ("K", 10))
_LONGEST = 60
"""Characters of a key in a table."""


_OTHER = "(other keys)"

NameFrame = Callable[[StackFrame], Iterable[str]]
"""The names of a frame: the functions that are inlined there, innermost first, then the function."""


def frame_of(frame: StackFrame) -> Frame:
    """Returns a frame of a table as ``trapline.protocol.stacks`` has it."""
    return Frame(StackFile(frame.path, frame.build_id, frame.file), frame.offset)


def placed(frame: StackFrame) -> Iterable[str]:
    """Names a frame by its place alone."""
    return (place(frame_of(frame)),)


@dataclass
class _Row:
    """A row as it is shown."""

    row: AggregateRow
    key: list[str]
    """Texts of its key's parts; empty for what is in ``stacks``."""
    stacks: list[tuple[str, list[str]]]
    """Its stacks of several frames: their expression and their functions, innermost first."""


def lines(table: AggregateTable, name: NameFrame = placed) -> list[str]:
    """Returns a table as lines of text; a key that a program chose is printed without what a terminal would obey.

    Args:
        table: what to show.
        name: names the frames of stacks; by default they are shown as places in files.
    """
    rows = _rows(table, name)
    if not rows:
        return ["no hits"]
    stacks = any(row.stacks for row in rows)
    match table.aggregate.function:
        case "hist" | "lhist":
            out = _each(table, rows, lambda row: _histogram(row.buckets, duration if _timed(table) else size))
        case "topk":
            out = _each(table, rows, lambda row: _items(table, row))
        case "quantiles":
            out = _each(table, rows, lambda row: _shares(table, row)) if stacks else _quantiles(table, rows)
        case _:
            out = _each(table, rows, lambda row: []) if stacks else _figures(table, rows)
    left_out = table.keys - len(table.rows)
    if left_out > 0:
        out.append(f"... and {left_out:,} more keys")
    if table.lost:
        out.append(f"{table.lost:,} hits were lost on the way and are not in here")
    return out


def duration(ns: AggregateValue) -> str:
    """Returns nanoseconds as text in the unit that suits their size."""
    if ns is None:
        return "..."
    number = float(ns)
    for unit, least in (("s", 1e9), ("ms", 1e6), ("us", 1e3)):
        if abs(number) >= least:
            return f"{number / least:,.1f} {unit}"
    return f"{number:.0f} ns"


def _timed(table: AggregateTable) -> bool:
    """Whether what is measured is a time in nanoseconds."""
    return table.aggregate.value == "latency"


def _measured(table: AggregateTable, of: AggregateValue) -> str:
    timed = _timed(table) and of is not None and table.aggregate.function != "distinct"
    return duration(of) if timed else value(of)


def folded_lines(table: AggregateTable, name: NameFrame = placed) -> list[str]:
    """Returns ``frame;frame;frame COUNT`` lines, as flamegraph.pl and speedscope read them, the largest first.

    The key's other parts are the outermost frames. What is counted are hits; of a ``sum`` it is what was summed up, such as
    bytes.
    """
    counts: dict[str, int] = {}
    for row in _rows(table, name):
        calls = [call for _, stack in row.stacks for call in reversed(stack)]
        line = fold([*(text for text in row.key if text), *calls])
        figure = row.row.value if table.aggregate.function == "sum" else row.row.count
        counts[line] = counts.get(line, 0) + round(float(figure) if isinstance(figure, float) else int(figure or 0))
    return [f"{line} {count}" for line, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]


def _rows(table: AggregateTable, name: NameFrame) -> list[_Row]:
    names = [[plain(n) for n in name(frame)] for frame in table.frames]
    rows = []
    for row in table.rows:
        shown = _Row(row, [], [])
        for by, part, status in zip(table.aggregate.by, row.key, row.key_status, strict=False):
            found = row.stacks.get(by)
            calls = [] if found is None else [n for at in found for n in names[at]]
            if found is not None and status:
                calls.append(str(part).rpartition(" <- ")[2])  # why it could not be followed
            if len(calls) > 1:
                shown.stacks.append((by, calls))
            shown.key.append("" if len(calls) > 1 else calls[0] if calls else _key_part(part, status))
        rows.append(shown)
    if table.other is not None:
        rows.append(_Row(table.other, [_OTHER, *[""] * (len(table.aggregate.by) - 1)], []))
    return rows


def value(of: AggregateValue) -> str:
    """Returns a figure, or a value that was grouped by or counted."""
    if of is None:
        return "-"
    if isinstance(of, float):
        size = abs(of)
        return f"{of:,.0f}" if size >= 1000 else f"{of:,.1f}" if size >= 1 else f"{of:.4g}"
    if isinstance(of, int):
        return f"{of:,}"
    return plain(of)


def _key_part(of: AggregateValue, status: str) -> str:
    if of is None:
        return f"<{status}>"
    text = plain(of) or '""' if isinstance(of, str) else str(of)
    return (text[: _LONGEST - 1] + "…") if len(text) > _LONGEST else text + ("…" if status == "truncated" else "")


def _bad(row: AggregateRow) -> str:
    return "".join(f", {count:,} {status}" for status, count in row.bad.items())


def _each(table: AggregateTable, rows: Sequence[_Row], body: Callable[[AggregateRow], list[str]]) -> list[str]:
    out: list[str] = []
    for shown in rows:
        row = shown.row
        if out:
            out.append("")
        named = zip(table.aggregate.by, shown.key, strict=False)
        key = _OTHER if row is table.other else ", ".join(f"{name}={part}" for name, part in named if part)
        title = f"{row.count:,} {'hit' if row.count == 1 else 'hits'}{_figure(table, row)}{_bad(row)}"
        out.append(f"{key}: {title}" if key else title)
        for name, calls in shown.stacks:
            out += [f"  {name}:"] if len(shown.stacks) > 1 else []
            out += [f"    {call}" for call in calls]
        out += body(row)
    return out


def _figure(table: AggregateTable, row: AggregateRow) -> str:
    if table.aggregate.function not in ("sum", "min", "max", "avg", "distinct"):
        return ""
    return f", {table.aggregate.text.partition(' by ')[0]} {value(row.value)}"


def size(of: AggregateValue) -> str:
    """Returns a bound of a bucket as bpftrace writes it: powers of two with K, M, G."""
    if of is None:
        return "..."
    number = int(of)
    for unit, bits in _UNITS:
        if number and number % (1 << bits) == 0 and abs(number) >= 1 << bits:
            return f"{number >> bits}{unit}"
    return str(number)


def _histogram(buckets: Sequence[AggregateBucket], bound: Callable[[AggregateValue], str]) -> list[str]:
    if not buckets:
        return []
    names = [
        f"[{bound(b.low)}]" if _single(b) else f"{'(' if b.low is None else '['}{bound(b.low)}, {bound(b.high)})"
        for b in buckets
    ]
    most = max(b.count for b in buckets)
    wide, long = max(map(len, names)), len(f"{most:,}")
    return [
        f"{name:<{wide}}  {b.count:>{long},} |{'@' * round(b.count / most * _BAR):<{_BAR}}|"
        for name, b in zip(names, buckets, strict=True)
    ]


def _single(bucket: AggregateBucket) -> bool:
    return bucket.low is not None and bucket.high is not None and int(bucket.high) - int(bucket.low) == 1


def _items(table: AggregateTable, row: AggregateRow) -> list[str]:
    if not row.items:
        return []
    long = len(f"{row.items[0].count:,}")
    timed = _timed(table)
    out = [
        f"{item.count:>{long},}  {duration(item.value) if timed else _key_part(item.value, item.status)}"
        for item in row.items
    ]
    if row.error:
        out.append(f"(each may be up to {row.error:,} more)")
    return out


def _figures(table: AggregateTable, rows: Sequence[_Row]) -> list[str]:
    function = table.aggregate.function
    figures = [] if function == "count" else [table.aggregate.text.partition(" by ")[0]]
    cells = [
        [
            *_key(table, shown),
            f"{shown.row.count:,}",
            *([_measured(table, shown.row.value)] if figures else []),
            _bad(shown.row).removeprefix(", "),
        ]
        for shown in rows
    ]
    return columns([*table.aggregate.by, "HITS", *figures, ""], cells)


def _key(table: AggregateTable, shown: _Row) -> list[str]:
    return shown.key[: len(table.aggregate.by)]


def _quantiles(table: AggregateTable, rows: Sequence[_Row]) -> list[str]:
    shares = sorted({share for shown in rows for share in shown.row.quantiles}, key=float)
    cells = [
        [
            *_key(table, shown),
            f"{shown.row.count:,}",
            *(_measured(table, shown.row.quantiles.get(share)) for share in shares),
            _bad(shown.row).removeprefix(", "),
        ]
        for shown in rows
    ]
    return columns([*table.aggregate.by, "HITS", *map(_share, shares), ""], cells)


def _shares(table: AggregateTable, row: AggregateRow) -> list[str]:
    shares = sorted(row.quantiles, key=float)
    return (
        columns([_share(s) for s in shares], [[_measured(table, row.quantiles[s]) for s in shares]]) if shares else []
    )


def _share(share: str) -> str:
    return "MIN" if share == "0" else "MAX" if share == "1" else f"{float(share):.1%}".replace(".0%", "%")


def columns(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Returns a table as lines: numbers to the right, the rest to the left."""
    rows = list(rows)
    widths = [max(len(line[i]) for line in (headings, *rows)) for i in range(len(headings))]
    right = [all(_numeric(row[i]) for row in rows) for i in range(len(headings))]
    return [
        "  ".join(
            c.rjust(w) if number else c.ljust(w) for c, w, number in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in (headings, *rows)
    ]


def _numeric(text: str) -> bool:
    text = text.removesuffix(" ns").removesuffix(" us").removesuffix(" ms").removesuffix(" s")
    return text in ("-", "") or text.replace(",", "").replace(".", "").replace("e-", "").lstrip("-").isdigit()
