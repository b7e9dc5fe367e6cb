"""Hits as lines, and that nothing a traced program says can command a terminal."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trapline.cli.rows import Clock, Lines, format_hit, plain, quote, word
from trapline.model import Hit
from trapline.protocol.hits import Header, HitBatch, ValueStatus, decode, row_dtype, schema


def _batch() -> HitBatch:
    columns = schema([("size", "u64"), ("path", "str"), ("n", "i64"), ("x", "f64"), ("ok", "bool"), ("raw", "bytes")])
    rows = np.zeros(3, row_dtype(columns))
    rows["ts"] = [1_000, 2_000, 1_500_000_000]
    rows["pid"], rows["tid"] = [7, 7, 8], [7, 9, 8]
    rows["size"] = [3, 2**63, 0]
    rows["size?"] = [0, 0, ValueStatus.FAULT]
    rows["n"], rows["x"], rows["ok"], rows["raw"] = [-5, 7, 0], [0.1, np.inf, 2.0], [1, 0, 0], [2, 3, 3]
    rows["path"] = [0, 1, 9]
    rows["path?"] = [0, ValueStatus.TRUNCATED, ValueStatus.NULL]
    header = Header(
        host="hst_a",
        probe="prb_a",
        source="src",
        seq=40,
        count=3,
        t0=1_000,
        t1=1_500_000_000,
        clock_offset=1_700_000_000_000_000_000,
        columns=columns,
        strings=[b"/etc/\x1b[2J\xff", b'a"b', b"\x00\x7f", b""],
        sites=["app:f"],
        comms={7: "app", 8: "\x07bell"},
    )
    return decode(HitBatch(header, {name: rows[name] for name in rows.dtype.names or ()}).encode())


def test_lines_for_people() -> None:
    lines = Lines().text(_batch()).splitlines()
    assert [line.split(" ", 1)[1] for line in lines] == [
        '7 app app:f(size=3, path="/etc/\\x1b[2J\\\\xff", n=-5, x=0.1, ok=true, raw="007f")',
        '7/9 app app:f(size=0x8000000000000000, path="a\\"b"..., n=7, x=inf, ok=false, raw="")',
        '8 \\x07bell app:f(size=<fault>, path=NULL, n=0, x=2.0, ok=false, raw="")',
    ]
    assert len(Lines().text(_batch(), 2).splitlines()) == 2


def test_ndjson_says_what_the_api_says() -> None:
    lines = Lines().ndjson(_batch()).splitlines()
    assert [Hit.model_validate_json(line) for line in lines] == list(_batch().hits())
    assert json.loads(lines[0])["ts"] == "2023-11-14T22:13:20.000001Z"


def test_hits_of_the_api_look_like_those_of_a_batch() -> None:
    assert [format_hit(hit, "f") for hit in _batch().hits()][0::2] == Lines().text(_batch()).splitlines()[0::2]


@given(st.text())
def test_a_quoted_string_is_one_printable_line_and_can_be_read_back(text: str) -> None:
    quoted = quote(text)
    assert quoted.isprintable()
    assert eval(quoted) == text


@given(st.text())
def test_a_name_is_printable(text: str) -> None:
    assert plain(text).isprintable()


@pytest.mark.parametrize(("value", "text"), [(0, "0"), (2**32 - 1, "4294967295"), (2**32, "0x100000000")])
def test_words(value: int, text: str) -> None:
    assert word(value) == text


def test_a_second_is_formatted_once() -> None:
    seconds: list[float] = []

    def convert(second: float) -> time.struct_time:
        seconds.append(second)
        return time.gmtime(second)

    clock = Clock(convert)
    assert [clock(ns) for ns in (1_000_001_000, 1_999_999_999, 2_000_000_000)] == [
        "00:00:01.000001",
        "00:00:01.999999",
        "00:00:02.000000",
    ]
    assert seconds == [1, 2]
