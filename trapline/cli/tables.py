"""Aggregates on a terminal: tables of figures, histograms as bars, what is frequent as a list."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from trapline.cli.rows import plain
from trapline.model import AggregateBucket, AggregateRow, AggregateTable, AggregateValue

_BAR = 40
_UNITS = (("T", 40), ("G", 30), ("M", 20), ("K", 10))
_LONGEST = 60
"""Characters of a key in a table."""


def lines(table: AggregateTable) -> list[str]:
    """Returns a table as lines of text; a key that a program chose is printed without what a terminal would obey."""
    rows = [(_key(table, row), row) for row in table.rows]
    if table.other is not None:
        rows.append(("(other keys)", table.other))
    if not rows:
        return ["no hits"]
    match table.aggregate.function:
        case "hist" | "lhist":
            out = _each(rows, lambda row: _histogram(row.buckets, duration if _timed(table) else size))
        case "topk":
            out = _each(rows, lambda row: _items(table, row))
        case "quantiles":
            out = _quantiles(table, rows)
        case _:
            out = _figures(table, rows)
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


def _key(table: AggregateTable, row: AggregateRow) -> str:
    parts = [_key_part(*part) for part in zip(row.key, row.key_status, strict=True)]
    return ", ".join(f"{name}={part}" for name, part in zip(table.aggregate.by, parts, strict=False))


def _bad(row: AggregateRow) -> str:
    return "".join(f", {count:,} {status}" for status, count in row.bad.items())


def _each(rows: Sequence[tuple[str, AggregateRow]], body: Callable[[AggregateRow], list[str]]) -> list[str]:
    out: list[str] = []
    for key, row in rows:
        if out:
            out.append("")
        title = f"{row.count:,} {'hit' if row.count == 1 else 'hits'}{_bad(row)}"
        out.append(f"{key}: {title}" if key else title)
        out += body(row)
    return out


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


def _figures(table: AggregateTable, rows: Sequence[tuple[str, AggregateRow]]) -> list[str]:
    function = table.aggregate.function
    figures = [] if function == "count" else [table.aggregate.text.partition(" by ")[0]]
    cells = [
        [
            *_keys(table, row),
            f"{row.count:,}",
            *([_measured(table, row.value)] if figures else []),
            _bad(row).removeprefix(", "),
        ]
        for _, row in rows
    ]
    return columns([*table.aggregate.by, "HITS", *figures, ""], cells)


def _quantiles(table: AggregateTable, rows: Sequence[tuple[str, AggregateRow]]) -> list[str]:
    shares = sorted({share for _, row in rows for share in row.quantiles}, key=float)
    names = ["MIN" if s == "0" else "MAX" if s == "1" else f"{float(s):.1%}".replace(".0%", "%") for s in shares]
    cells = [
        [
            *_keys(table, row),
            f"{row.count:,}",
            *(_measured(table, row.quantiles.get(share)) for share in shares),
            _bad(row).removeprefix(", "),
        ]
        for _, row in rows
    ]
    return columns([*table.aggregate.by, "HITS", *names, ""], cells)


def _keys(table: AggregateTable, row: AggregateRow) -> list[str]:
    if row is table.other:
        return ["(other keys)", *[""] * (len(table.aggregate.by) - 1)]
    return [_key_part(*part) for part in zip(row.key, row.key_status, strict=True)]


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
