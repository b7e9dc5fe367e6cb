"""Aggregates as text."""

from __future__ import annotations

import pytest

from trapline.aggregates import Cell, Table, recorder
from trapline.cli.tables import columns, duration, lines, size, value
from trapline.model import Aggregate
from trapline.spec import parse_probe
from trapline.tables import table_of


def shown(
    clause: str, *hits: tuple[object, object], max_keys: int = 10, top: int | None = None, probe: str = "a:f"
) -> list[str]:
    aggregate = parse_probe(f"{probe} -> {clause}").aggregate
    assert isinstance(aggregate, Aggregate)
    table = Table(max_keys)
    record = recorder(aggregate.function, tuple(aggregate.parameters))
    for key, given in hits:
        part = (None, 3) if key is None else (key.encode() if isinstance(key, str) else key, 0)
        cell = table.cell((part,) if aggregate.by else ())  # type: ignore[arg-type]
        cell.count += 1
        record(cell, (None, 2) if given is None else (given, 0))  # type: ignore[arg-type]
    return lines(table_of(aggregate, table, top=top))


def test_a_table_of_figures() -> None:
    hits: list[tuple[object, object]] = [("nginx", 5), ("nginx", 7), (None, 1), ("e\x1b[2J", None)]
    assert shown("sum(arg0) by (comm)", *hits) == [
        "comm      HITS  sum(arg0)",
        "nginx        2         12",
        "<fault>      1          1",
        "e\\x1b[2J     1          -  1 null",
    ]
    assert shown("count()", (0, 0), (0, 0)) == ["HITS", "   2"]
    assert shown("avg(arg0)") == ["no hits"]


def test_what_does_not_fit_is_said() -> None:
    hits: list[tuple[object, object]] = [(i, 1) for i in range(5)]
    assert shown("max(arg0) by (arg1)", *hits, max_keys=3, top=2)[-2:] == [
        "(other keys)     2          1", "... and 1 more keys",
    ]  # fmt: skip


def test_a_histogram_is_bars() -> None:
    found = shown("hist(arg0)", *[(0, v) for v in (1, 2, 3, 3000)], (0, None))
    assert found[0] == "5 hits, 1 null"
    assert found[1] == "[1]         1 |" + "@" * 20 + " " * 20 + "|"
    assert found[2] == "[2, 4)      2 |" + "@" * 40 + "|"
    assert found[-1].split("|")[0].split() == ["[2K,", "4K)", "1"]
    assert len({line.index("|") for line in found[1:]}) == 1


def test_ends_of_a_linear_histogram_are_open() -> None:
    found = shown("lhist(arg0, 0, 20, 10)", (0, 5), (0, 25))
    assert [line.split("  ")[0] for line in found[1:]] == ["[0, 10)", "[10, 20)", "[20, ...)"]


def test_quantiles_and_topk() -> None:
    found = shown("quantiles(arg0)", *[(0, v) for v in range(1, 1001)])
    assert found[0].split() == ["HITS", "MIN", "50%", "90%", "95%", "99%", "99.9%", "MAX"]
    assert found[1].split()[:2] == ["1,000", "1.0"]
    assert shown("topk(arg0, 2) by (comm)", ("a", 9), ("a", 9), ("a", 8), ("a", 7)) == [
        "comm=a: 4 hits", "2  9", "1  7",
    ]  # fmt: skip


def test_a_topk_says_what_it_does_not_know() -> None:
    aggregate = Aggregate(text="topk(arg0, 1)", function="topk", parameters=[1])
    table = Table(1)
    table.add([((), Cell(count=9, items={(1, 0): 4}, error=2))])
    assert lines(table_of(aggregate, table)) == ["9 hits", "4  1", "(each may be up to 2 more)"]


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0"), (1000, "1000"), (1024, "1K"), (1 << 31, "2G"), (1 << 64, "16777216T")]
)
def test_bounds_are_short(number: int, text: str) -> None:
    assert size(number) == size(str(number)) == text


def test_figures() -> None:
    assert [value(v) for v in (None, 1234, 1234.5, 12.34, 0.001234, str(1 << 60))] == [
        "-", "1,234", "1,234", "12.3", "0.001234", str(1 << 60),
    ]  # fmt: skip
    assert columns(["A", "B"], [["x", "1"], ["yy", "22"]]) == ["A    B", "x    1", "yy  22"]


def test_times_have_units() -> None:
    hits: list[tuple[object, object]] = [(0, 900), (0, 5_000), (0, 2_500_000)]
    assert shown("max(latency) by (retval)", *hits, probe="ur:a:f")[1].split() == ["0", "3", "2.5", "ms"]
    assert shown("quantiles(latency)", *hits, probe="ur:a:f") == [
        "HITS     MIN     50%     90%     95%     99%   99.9%     MAX",
        "   3  900 ns  5.0 us  5.0 us  5.0 us  5.0 us  5.0 us  2.5 ms",
    ]
    assert shown("hist(latency)", *hits, probe="ur:a:f")[1].startswith("[512 ns, 1.0 us)")
    assert shown("distinct(latency)", *hits, probe="ur:a:f")[1].split() == ["3", "3"]
    assert [duration(n) for n in (None, 0, 999, 1000, 12_345_678, 3.2e9, str(1 << 60))] == [
        "...", "0 ns", "999 ns", "1.0 us", "12.3 ms", "3.2 s", "1,152,921,504.6 s",
    ]  # fmt: skip
