"""Whatever is asked, and whatever the memory holds: a value with its status or a refusal, in bounded time."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.capture import facts as f
from tests.unit.capture.facts import Bench, parameter
from tests.unit.capture.test_values import site
from trapline.errors import SpecError, TraplineError
from trapline.model import Capture
from trapline.protocol.hits import ValueStatus
from trapline.spec import parse_probe
from trapline.tree import MAX_DEPTH
from trapline_agent.capture.compiler import Compiler, Site
from trapline_agent.capture.compute import MAX_NODES, Values, fits
from trapline_agent.capture.program import compiled
from trapline_agent.debuginfo.model import Member, Type
from trapline_agent.patterns import compile_pattern

OK, TRUNCATED, NULL, FAULT, GONE, REDACTED, UNSUPPORTED = (int(s) for s in ValueStatus)
HIT_S = 0.02
"""Of one hit, on a busy machine; measured are 0.1 ms."""
COMPILE_S = 2.0


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    bench.close()


def timed(bench: Bench, expressions: list[str], where: Site | None = None) -> tuple[list[tuple[Any, int]], float]:
    """Values and statuses of a hit, and the seconds that the quickest of some took."""
    compiler = Compiler(where or Site())
    values = Values([compiler.column(text)[1] for text in expressions])
    best, got = 1e9, []
    for _ in range(5):
        hit = values.hit(0, 0, 0, bench.words, bench.fd)
        began = time.perf_counter()
        got = values(hit)
        best = min(best, time.perf_counter() - began)
    return got, best


def within(seconds: float, what: Callable[[], object]) -> TraplineError | None:
    """Runs something that may refuse; fails where that takes longer."""
    began = time.perf_counter()
    try:
        what()
        refused = None
    except TraplineError as e:
        refused = e
    assert time.perf_counter() - began < seconds
    return refused


# --- memory ----------------------------------------------------------------------------------------------------------


def test_a_chain_of_pointers_into_garbage_ends_with_its_status(bench: Bench) -> None:
    deepest = "u64(" * (MAX_DEPTH - 1) + "arg0" + ")" * (MAX_DEPTH - 1)
    bench.put(0x8000, 0x8000)  # points to itself
    for start, status in ((0x8000, OK), (0x9000, FAULT), (1 << 46, FAULT), (0, NULL), (2**64 - 8, FAULT)):
        bench.set(rdi=start)
        ((_, got),), seconds = timed(bench, [deepest])
        assert got == status, hex(start)
        assert seconds < HIT_S
    bench.put(0x10000, random.Random(5).randbytes(1 << 16))
    bench.set(rdi=0x10000)
    got, seconds = timed(bench, [deepest.replace("arg0", f"arg0 + {8 * i}") for i in range(32)])
    assert {status for _, status in got} <= {NULL, FAULT}
    assert seconds < HIT_S


def test_a_cyclic_list_is_followed_as_far_as_it_is_written(bench: Bench) -> None:
    bench.put(0x8000, 0x8010, 1, 0x8000, 2)
    bench.set(rdi=0x8000)
    where = site(parameter("n", f.NODES))
    got, seconds = timed(bench, ["n" + ".next" * (MAX_DEPTH - 2) + ".value", "n.next.value"], where)
    assert got == [(1 if (MAX_DEPTH - 2) % 2 == 0 else 2, OK), (2, OK)]
    assert seconds < HIT_S
    with pytest.raises(SpecError, match="too complex"):
        Compiler(where).column("n" + ".next" * 64)


def test_the_longest_texts_of_the_most_captures(bench: Bench) -> None:
    bench.put(0x100000, b"a" * (1 << 20))
    bench.set(rdi=0x100000)
    got, seconds = timed(bench, [f"str(arg0 + {4096 * i}, 4096)" for i in range(32)])
    assert [(len(text), status) for text, status in got] == [(4096, TRUNCATED)] * 32
    assert seconds < HIT_S


def test_a_length_that_is_garbage_reads_no_more_than_asked(bench: Bench) -> None:
    bench.put(0x8000, 0x9000, -1, 0x9000, 1 << 62)
    bench.put(0x9000, b"text" * 4096)
    where = site(parameter("s", f.STRING_REF), parameter("t", f.STRING_REF), language="c++")
    bench.set(rdi=0x8000, rsi=0x8010)
    ((value, status), (other, status2)), seconds = timed(bench, ["str(s)", "str(t)"], where)
    assert len(value) <= 4096
    assert (len(other), status2) == (64, TRUNCATED)
    assert status in (OK, TRUNCATED)
    assert seconds < HIT_S


@given(st.binary(min_size=64, max_size=512), st.integers(0, 2**64 - 1))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_memory_gives_values_with_statuses(bench: Bench, memory: bytes, address: int) -> None:
    bench.put(0x8000, memory)
    bench.set(rdi=0x8000, rsi=address)
    where = site(parameter("r", f.REQUESTS), parameter("s", f.STRING_REF), parameter("v", 100), parameter("e", 101))
    _with_more_types(where)
    texts = (
        *("r.method", "r.state", "r.next.next.text", "r.flags", "r.keys[arg1]", "s", "len(s)", "s == 'x'"),
        *("v[1]", "v[arg1]", "len(v)", "e", "e.Some.__0.method", "e.method", "ip(arg0)", "ip(buf(arg1, 16))"),
        *("arg1 / u64(arg0)", "1 << u8(arg0)", "f64(arg0) * 2", "matches(str(arg0), '(a|b)*c')", "sym(arg1)"),
    )
    for value, status in timed(bench, list(texts), where)[0]:
        assert OK <= status <= UNSUPPORTED
        assert isinstance(value, int | float | bytes)


def _with_more_types(where: Site) -> None:
    assert isinstance(where.debug, f.Facts)
    where.debug.types |= {
        100: Type("struct", "&[u64]", 16, members=(Member("data_ptr", 102, 0), Member("length", f.LONG, 8))),
        101: Type(
            "variant",
            "core::option::Option<&request>",
            8,
            members=(Member("(discriminant)", f.LONG, 0), Member("None", 103, 0), Member("Some", 104, 0)),
            enumerators=(("None", 0),),
        ),
        102: Type("pointer", "*u64", 8, target=f.LONG),
        103: Type("struct", "None", 8),
        104: Type("struct", "Some", 8, members=(Member("__0", f.REQUESTS, 0),)),
    }


# --- texts of probes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "expression",
    [
        "(" * 2040 + "arg0" + ")" * 2040,
        "-" * 4080 + "1",
        "not " * 1000 + "arg0",
        "arg0" + ".a" * 2000,
        "arg0" + "[0]" * 1300,
        "arg0[" * 800 + "0" + "]" * 800,
        "1" + "+1" * 2000,
        "1" + "**9" * 1300,
        "arg0 if arg1 else " * 200 + "arg2",
        "arg0" + " == 1" * 800,
        "arg0 in (" + "1," * 2000 + ")",
        "str(" * 1000 + "arg0" + ")" * 1000,
        "9" * 4080,
        "'" + "x" * 4080 + "'",
        "lambda: " * 500 + "1",
        "f'{arg0}'",
        "[" * 2000 + "]" * 2000,
        "{" * 2000 + "}" * 2000,
        "(" * 4090,
        "\\" * 4000,
        "\N{SNOWMAN}" * 2000,
        "1e400 + arg0",
        "0x" + "f" * 4000,
    ],
)
def test_long_and_deep_expressions_are_refused_or_read_soon(expression: str) -> None:
    """In 4,096 characters: the parser's own depth, memory and time are bounded too."""

    def ask() -> None:
        spec = parse_probe(f"app:f {{{expression}}}")
        compiled(spec.captures, "", Site(entry=True))

    refused = within(COMPILE_S, ask)
    assert refused is None or isinstance(refused, TraplineError)
    within(COMPILE_S, lambda: parse_probe(f"app:f if {expression}"))
    within(COMPILE_S, lambda: parse_probe(f"app:f -> sum({expression}) by ({expression})"))


def test_what_multiplies_is_refused_before_it_is_made() -> None:
    """An index is looked at three times, and an index in an index nine times: 3 to the power of 30 is too much."""
    where = site(parameter("v", 100), language="rust")
    _with_more_types(where)
    for depth in (6, 12, 30):
        text = "v[" * depth + "1" + "]" * depth
        refused = within(COMPILE_S, lambda text=text: Compiler(where).column(text))  # type: ignore[misc]
        assert isinstance(refused, SpecError), depth
        assert "too much" in refused.detail
    assert Compiler(where).column("v[v[v[1]]]")


@pytest.mark.parametrize(
    "expression",
    [
        "cast(arg0, 'u64 *')[18446744073709551615]",
        "cast(arg0, 'u64 *')[-9223372036854775808]",
        "cast(arg0, 'u64 *') + 18446744073709551615",
    ],
)
def test_offsets_beyond_64_bits_are_refused(expression: str) -> None:
    with pytest.raises(SpecError, match="64 bits") as e:
        Compiler(Site()).column(expression)
    assert e.value.text == expression
    with pytest.raises(SpecError, match="64 bits"):
        Compiler(Site()).condition(expression)


def test_all_captures_together_are_of_a_bounded_size() -> None:
    where = site(parameter("v", 100), language="rust")
    _with_more_types(where)
    many = [Capture(text=f"v[v[v[v[{i}]]]]", name=f"c{i}") for i in range(32)]
    refused = within(COMPILE_S, lambda: compiled(many, "", where))
    assert isinstance(refused, SpecError)
    few = compiled(many[:2], "", where)[1]
    assert few is not None
    assert fits(*few.values)
    assert not fits(*few.values * (MAX_NODES // 100))


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+$",
        "(a|aa)+$",
        "(a|a?)+$",
        "(.*)*x",
        "((a*)*)*b",
        "(x+x+)+y",
        "a" * 100,
        "[a-z]{0,5}" * 3,
        "(?i)(a{0,9}){0,9}$",
    ],
)
def test_patterns_that_ruin_others_take_linear_time(bench: Bench, pattern: str) -> None:
    bench.put(0x8000, b"a" * 4096 + b"!\0")
    bench.set(rdi=0x8000)
    ((_, status),), seconds = timed(bench, [f"matches(buf(arg0, 4096), '{pattern}')"])
    assert status in (OK, TRUNCATED)
    assert seconds < HIT_S


@pytest.mark.parametrize("pattern", ["a" * 1000, "[a-z]{0,50}" * 10])
def test_patterns_that_may_take_long_at_a_hit_are_refused(bench: Bench, pattern: str) -> None:
    with pytest.raises(SpecError, match="for too long"):
        timed(bench, [f"matches(buf(arg0, 4096), '{pattern}')"])


@pytest.mark.parametrize(
    "pattern", ["(a{1000}){1000}", "((a{100}){100}){100}", "(" * 1000 + ")" * 1000, "(?:" * 999, "\\pN" * 999]
)
def test_patterns_that_are_too_large_are_refused_soon(pattern: str) -> None:
    within(COMPILE_S, lambda: compile_pattern(pattern.encode()))
    within(COMPILE_S, lambda: parse_probe(f"app:/{pattern}/"))


# --- types -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["vector<", "std::unique_ptr<a>", "std::shared_ptr<a>", "Vec<a>", "core::option::Option<a>", "x"]
)
@pytest.mark.parametrize("kind", ["struct", "class", "union", "variant", "array", "pointer", "reference"])
def test_types_that_contain_themselves(name: str, kind: str) -> None:
    """No compiler makes such; a malformed file may."""
    where = site(parameter("p", 200), parameter("q", 201), language="rust" if kind == "variant" else "c++")
    names = ("_M_impl", "buf", "len", "Some", "__0", "_M_start", "", "(discriminant)")
    inside = tuple(Member(n, 200, 0, base=not n) for n in names)
    assert isinstance(where.debug, f.Facts)
    where.debug.types |= {
        200: Type(kind, name, 8, target=200, counts=(2, 2), members=inside),  # type: ignore[arg-type]
        201: Type("pointer", "", 8, target=200),
    }
    for text in (
        "p",
        "q",
        "p.x",
        "q.x",
        "p._M_impl.x",
        "p[1]",
        "q[0].Some",
        "len(p)",
        "str(p)",
        "p == 1",
        "p == 'x'",
        "ip(p)",
    ):
        within(COMPILE_S, lambda text=text: Compiler(where).column(text))  # type: ignore[misc]
