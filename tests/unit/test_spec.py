"""The probe language: what is read, what is refused and where the caret stands, and that text and spec round-trip."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trapline.errors import SpecError, Unsupported
from trapline.expressions import REGISTERS
from trapline.model import Aggregate, Point, PointKind, ProbeKind, ProbeSpec
from trapline.spec import MAX_TEXT, WHERE_KEYS, format_probe, parse_probe, require_supported


def caret(error: SpecError | Unsupported) -> str:
    """What the caret points at: the rest of the text from there."""
    assert error.position is not None
    assert 0 <= error.position <= len(error.text)
    return error.text[error.position :]


@pytest.mark.parametrize(
    ("text", "object_", "point"),
    [
        ("libc.so.6:malloc", "libc.so.6", Point(kind=PointKind.SYMBOL, value="malloc")),
        ("redis-server:processCommand", "redis-server", Point(kind=PointKind.SYMBOL, value="processCommand")),
        (
            "/usr/bin/python3.11:PyEval_EvalFrame+0x10",
            "/usr/bin/python3.11",
            Point(kind=PointKind.SYMBOL, value="PyEval_EvalFrame", offset=16),
        ),
        ("app:f+16", "app", Point(kind=PointKind.SYMBOL, value="f", offset=16)),
        ("app:0x1234", "app", Point(kind=PointKind.OFFSET, offset=0x1234)),
        ("app:str*_copy[0-9]", "app", Point(kind=PointKind.GLOB, value="str*_copy[0-9]")),
        ("*:malloc", "*", Point(kind=PointKind.SYMBOL, value="malloc")),
        ("buildid=ABCDEF01:f", "buildid=abcdef01", Point(kind=PointKind.SYMBOL, value="f")),
        ("libc.so.6:memcpy@@GLIBC_2.14", "libc.so.6", Point(kind=PointKind.SYMBOL, value="memcpy@@GLIBC_2.14")),
        (r"app:/^a\/b$/", "app", Point(kind=PointKind.REGEX, value="^a/b$")),
        ("app:server.c:120", "app", Point(kind=PointKind.LINE, value="server.c", offset=120)),
        ('app:"my file.c":7', "app", Point(kind=PointKind.LINE, value="my file.c", offset=7)),
        ('app:"ns::Cls::operator->"', "app", Point(kind=PointKind.TEXT, value="ns::Cls::operator->")),
        ("app:ns::f", "app", Point(kind=PointKind.TEXT, value="ns::f")),
        ('go:"main.(*T).Get"', "go", Point(kind=PointKind.SYMBOL, value="main.(*T).Get")),
        ("'/opt/my app/x':f", "/opt/my app/x", Point(kind=PointKind.SYMBOL, value="f")),
        ('"u":main', "u", Point(kind=PointKind.SYMBOL, value="main")),
    ],
)
def test_object_and_point(text: str, object_: str, point: Point) -> None:
    spec = parse_probe(text)
    assert (spec.object, spec.point, spec.kind) == (object_, point, ProbeKind.ENTRY)
    assert parse_probe(spec.text) == spec


def test_every_clause() -> None:
    spec = parse_probe(
        " slow = ur:app:f {size=entry(arg0), entry(str(arg1,128)), reg.rbx, str( entry(arg2) ), retval, took=latency}"
        " @ comm=nginx*, host=web-* if entry(arg0)>3 -> hist( entry(arg0) )by( pid )"
    )
    assert spec.name == "slow"
    assert spec.kind is ProbeKind.RETURN
    assert spec.where == {"comm": "nginx*", "host": "web-*"}
    assert spec.condition == "entry(arg0) > 3"
    assert spec.aggregate == Aggregate(
        text="hist(entry(arg0)) by (pid)", function="hist", value="entry(arg0)", by=["pid"]
    )
    assert [(c.name, c.text) for c in spec.captures] == [
        ("size", "entry(arg0)"),
        ("entry(str(arg1, 128))", "entry(str(arg1, 128))"),
        ("reg.rbx", "reg.rbx"),
        ("str(entry(arg2))", "str(entry(arg2))"),
        ("retval", "retval"),
        ("took", "latency"),
    ]
    assert spec.text == (
        "slow=ur:app:f @ comm=nginx*, host=web-* if entry(arg0) > 3 {size=entry(arg0), entry(str(arg1, 128)), reg.rbx,"
        " str(entry(arg2)), retval, took=latency} -> hist(entry(arg0)) by (pid)"
    )
    require_supported(parse_probe("ur:app:f {retval}"))


@pytest.mark.parametrize(
    ("text", "at", "says"),
    [
        ("app:f {retval}", "retval}", "when the function returns"),
        ("app:f {x=str(retval)}", "retval)}", "`ur:`"),
        ("app:f {latency}", "latency}", "`ur:`"),
        ("app:f {entry(arg0)}", "entry(arg0)}", "did you mean `arg0`"),
        ("app:f {str(entry(arg0))}", "entry(arg0))}", "did you mean `arg0`"),
        ("ur:app:f {arg0}", "arg0}", "did you mean `entry(arg0)`"),
        ("ur:app:f {str(arg1)}", "arg1)}", "did you mean `entry(arg1)`"),
        ("ur:app:f {entry(retval)}", "retval)}", "not known yet"),
        ("ur:app:f {entry(str(latency))}", "latency))}", "not known yet"),
        ("ur:app:f {entry(entry(arg0))}", "entry(arg0))}", "inside of"),
        ("ur:app:f {entry(str(entry(arg0)))}", "entry(arg0)))}", "inside of"),
        ("ur:app:f {entry()}", "entry()}", "takes one value"),
        ("p /a:f $retval", "$retval", "`ur:`"),
    ],
)
def test_values_of_another_time_are_refused(text: str, at: str, says: str) -> None:
    with pytest.raises(SpecError) as e:
        parse_probe(text)
    assert caret(e.value) == at
    assert says in str(e.value)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (
            "p:rl /bin/bash:readline text=+0(%di):string n=%si:u64",
            "rl=/bin/bash:readline {text=str(reg.rdi), n=reg.rsi}",
        ),
        ("p /bin/bash:0x4245c0", "/bin/bash:0x4245c0"),
        ("p:grp/ev /bin/bash:f $arg1", "ev=/bin/bash:f {arg0}"),
        ("r:rl /bin/bash:readline", "rl=ur:/bin/bash:readline"),
        ("/bin/bash:readline%return", "ur:/bin/bash:readline"),
        ("r /b:f $retval a=$arg1 s=+0($arg2):string", "ur:/b:f {retval, a=entry(arg0), s=entry(str(arg1))}"),
        ("r /b:f t=+0($retval):string %ax", "ur:/b:f {t=str(retval), reg.rax}"),
        ("uprobe:/bin/bash:readline", "/bin/bash:readline"),
        ("uretprobe:/bin/bash:readline", "ur:/bin/bash:readline"),
        ("usdt:/bin/app:prov:name", 'usdt:/bin/app:"prov:name"'),
        ("app:f {$rdi, x=%si}", "app:f {reg.rdi, x=reg.rsi}"),
        ("p:main @ pid=3", '"p":main @ pid=3'),
    ],
)
def test_other_tools_habits(theirs: str, ours: str) -> None:
    assert parse_probe(theirs).text == ours
    assert parse_probe(ours).text == ours


@pytest.mark.parametrize(
    ("text", "at", "says"),
    [
        ("", "", "empty"),
        ("malloc", "malloc", "`*:malloc`, `PROGRAM:malloc`"),
        ("u:malloc", "malloc", "`*:malloc`"),
        ("server.c:120", "120", "OBJECT:FILE:LINE"),
        ("app:", "", "expected a symbol"),
        (":f", ":f", "expected the object"),
        ("./app:f", "./app:f", "relative path"),
        ("lib*:f", "lib*:f", "patterns over objects"),
        ("buildid=xyz:f", "xyz:f", "build-id"),
        ("kprobe:vfs_read", "kprobe:vfs_read", "kernel"),
        ("uprobe:/bin/bash:0x42", "0x42", "virtual"),
        ("app:f+x", "x", "SYMBOL+BYTES"),
        ("app:f*+4", "+4", "one symbol"),
        ("app:f(int)", "(int)", "quote"),
        ("app:f @ comn=x", "comn=x", "did you mean `comm`"),
        ("app:f @ process=x", "process=x", "did you mean `comm`"),
        ("app:f @ pid=abc", "abc", "process number"),
        ("app:f @ pid=1, pid=2", "pid=2", "twice"),
        ("app:f {arg0", "", "expected `}`"),
        ("app:f {}", "}", "expected a value"),
        ("app:f {arg0, arg0}", "arg0}", "two captured values"),
        ("app:f {pid=arg0}", "arg0}", "every hit has"),
        ("app:f {reg.rdj}", "reg.rdj}", "`reg.rdi`"),
        ("app:f {rdi}", "rdi}", "did you mean `reg.rdi`"),
        ("app:f {str(arg0, 5000)}", "5000)}", "4096"),
        ("app:f {arg0 +}", "}", "value to capture"),
        ("app:f {lambda: 1}", "lambda: 1}", "Lambda"),
        ("app:f if x {arg0} if y", "if y", "second `if`"),
        ("app:f -> cuont()", "cuont()", "did you mean `count`"),
        ("app:f -> arg0", "arg0", "is a call"),
        ("app:f -> hist(retval)", "retval)", "when the function returns"),
        ("ur:app:f -> hist(arg0)", "arg0)", "did you mean `entry(arg0)`"),
        ("app:f -> hist()", "hist()", "expected `hist(x)`"),
        ("app:f -> count(arg0)", "count(arg0)", "`count() by (expression, ...)`"),
        ("app:f -> sum(x=arg0)", "arg0)", "no named parameters"),
        ("app:f -> topk(arg0, 0)", "0)", "1 to 100"),
        ("app:f -> topk(arg0, arg1)", "arg1)", "whole number"),
        ("app:f -> lhist(arg0, 10, 10, 1)", "lhist(arg0, 10, 10, 1)", "goes up"),
        ("app:f -> lhist(arg0, 0, 10000, 1)", "lhist(arg0, 0, 10000, 1)", "1000 steps"),
        ("app:f -> count() by arg0", "arg0", "by (expression, ...)"),
        ("app:f -> count() by ()", "()", "expected an expression"),
        ("app:f -> count() buy (arg0)", "buy (arg0)", "unexpected"),
        ("app:f -> count() by (pid,pid,pid,pid,pid,pid,pid,pid,pid)", "(pid,pid,pid,pid,pid,pid,pid,pid,pid)", "8"),
        ("app:f /pid == 3/", "/pid == 3/", "@ pid=N"),
        ("app:f nonsense", "nonsense", "unexpected"),
        ('app:"f', '"f', "not closed"),
        ("app:f {arg0, é, str(arg1, 0)}", "0)}", "from 1 to 4096"),
        ("app:f {str(arg0, arg1)}", "arg1)}", "buf(p, n)"),
        ("app:f {req->method}", "->method}", "did you mean `.method`"),
        ("app:f if req->n > 3", "->n > 3", "did you mean `.n`"),
        ("app:f {*p}", "*p}", "`p[0]`"),
        ("app:f {a[1:2]}", "1:2]}", "one element"),
        ("app:f {f(1)}", "f(1)}", "never called"),
        ("app:f {st(arg0)}", "st(arg0)}", "did you mean `str`"),
        ("app:f {str()}", "str()}", "takes a pointer"),
        ("app:f {count()}", "count()}", "after `->`"),
        ("app:f {ctx.pdi}", "ctx.pdi}", "`ctx.pid`"),
        ("app:f {1 << 99999999999999999999}", "99999999999999999999}", "64 bits"),
        ("app:f {a ** b}", "a ** b}", "`**`"),
        ("app:f {p is q}", "p is q}", "`==`"),
        ("app:f {x=matches(str(arg0), arg1)}", "arg1)}", "quoted"),
        ("app:f {x=str(arg0, n=3)}", "3)}", "no names"),
        ("app:f {None}", "None}", "None"),
    ],
)
def test_wrong_texts_say_what_and_where(text: str, at: str, says: str) -> None:
    with pytest.raises((SpecError, Unsupported)) as e:
        parse_probe(text)
    assert caret(e.value) == at
    assert says in str(e.value)


@pytest.mark.parametrize(
    ("text", "at", "feature"),
    [
        ("app:f {reg.ymm0}", "reg.ymm0}", "floating-point"),
        ("app:f {x=kstack()}", "kstack()}", "`kstack()`"),
        ("p:n /a:f %di:u32", "%di:u32", "`u32`"),
    ],
)
def test_captures_beyond_this_release_are_unsupported(text: str, at: str, feature: str) -> None:
    with pytest.raises(Unsupported) as e:
        parse_probe(text)
    assert caret(e.value) == at
    assert feature in e.value.detail
    assert e.value.reason == "NotInThisRelease"


@pytest.mark.parametrize(
    ("text", "at", "feature"),
    [
        ("app:f @ pid=3, label=a", ", label=a", "`label`"),
        ("app:f @ container=a", "@ container=a", "`container`"),
        ("app:f @ cgroup=a", "@ cgroup=a", "`cgroup`"),
        ("app:f {arg0} -> count()", "{arg0} -> count()", "beside an aggregate"),
    ],
)
def test_features_beyond_this_release_are_refused_by_name(text: str, at: str, feature: str) -> None:
    spec = parse_probe(text)
    with pytest.raises(Unsupported) as e:
        require_supported(spec)
    assert caret(e.value) == at
    assert feature in e.value.detail


@pytest.mark.parametrize(
    ("text", "aggregate"),
    [
        ("count()", Aggregate(text="count()", function="count")),
        (
            " hist( arg0 )  by  (comm , str(arg1)) ",
            Aggregate(text="hist(arg0) by (comm, str(arg1))", function="hist", value="arg0", by=["comm", "str(arg1)"]),
        ),
        (
            "topk(str(arg0)) by (tid)",
            Aggregate(text="topk(str(arg0)) by (tid)", function="topk", value="str(arg0)", parameters=[10], by=["tid"]),
        ),
        ("topk(pid, 3)", Aggregate(text="topk(pid, 3)", function="topk", value="pid", parameters=[3])),
        (
            "lhist(reg.rsi, -10, 100, 7)",
            Aggregate(text="lhist(reg.rsi, -10, 100, 7)", function="lhist", value="reg.rsi", parameters=[-10, 100, 7]),
        ),
    ],
)
def test_aggregates(text: str, aggregate: Aggregate) -> None:
    spec = parse_probe(f"app:f -> {text}")
    assert spec.aggregate == aggregate
    assert parse_probe(spec.text) == spec
    assert parse_probe(f"app:f -> {text} @ pid=3").text == f"app:f @ pid=3 -> {aggregate.text}"


def test_what_is_supported_passes() -> None:
    for text in (
        "app:f -> count() by (pid, comm)",
        "libc.so.6:malloc {arg0}",
        "*:f* @ pid=1, comm=a, exe=/x, uid=0, host=h",
        "app:0x10",
        "app:f @ tree=7",
    ):
        require_supported(parse_probe(text))


def test_too_long_and_not_text() -> None:
    with pytest.raises(SpecError):
        parse_probe("a:" + "b" * MAX_TEXT)
    with pytest.raises(SpecError, match="canonical"):
        parse_probe("a:'" + "\x01" * 2000 + "'")
    for text in ("a:\0", "a:\udce4"):
        with pytest.raises(SpecError) as e:
            parse_probe(text)
        e.value.text.encode()


def test_deep_nesting_is_an_error_not_a_crash() -> None:
    for source in (
        "(" * 2000 + "1" + ")" * 2000,
        "-" * 3000 + "1",
        "not " * 900 + "1",
        "a" + ".b" * 1900,
        "[" * 150 + "]" * 150,
    ):
        for text in (f"a:f if {source}", f"a:f {{{source}}}"):
            try:
                spec = parse_probe(text)
            except (SpecError, Unsupported):
                continue
            assert parse_probe(spec.text) == spec


# --- properties

_words = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), min_size=1, max_size=12)
_grammar = st.sampled_from(
    [
        *("u", "ur", "usdt", "p", "r", ":", ":", "::", "@", "pid=", "comm=", "=", ",", "{", "}", "->", "arg0", "str("),
        *("(", ")", "reg.rdi", "'", '"', "\\", "/", "*", "+", "0x1f", "7", "libc.so.6", "malloc", "app", "buildid="),
        *("abcd", "count()", "%return", "%di", "$arg1", "é", "#", "[", "]", "x", " ", " ", "@ ", "if ", " by ", "\n"),
        *("and ", "not ", "a.b", "in ", "<", "0xff"),
    ]
)


def _reads_or_refuses(text: str) -> None:
    error: SpecError | Unsupported | None = None
    try:
        spec = parse_probe(text)
    except (SpecError, Unsupported) as e:
        error = e
    else:
        assert parse_probe(spec.text) == spec
        try:
            require_supported(spec)
        except Unsupported as e:
            error = e
    if error is not None:
        assert error.position is not None
        assert 0 <= error.position <= len(error.text)
        error.text.encode()


@given(st.text(max_size=200))
def test_any_text_gives_a_spec_or_an_error(text: str) -> None:
    _reads_or_refuses(text)


@settings(max_examples=2000)
@given(st.lists(st.one_of(_grammar, _grammar, _grammar, _words), max_size=25).map("".join))
def test_any_jumble_of_the_grammar_gives_a_spec_or_an_error(text: str) -> None:
    _reads_or_refuses(text)


@settings(max_examples=1000)
@given(st.lists(_grammar, max_size=15).map("".join))
def test_any_tail_of_a_probe_gives_a_spec_or_an_error(text: str) -> None:
    _reads_or_refuses("app:f" + text)


_operands = st.sampled_from(["arg0", "arg5", *(f"reg.{r}" for r in REGISTERS)])
_expressions = st.one_of(
    st.sampled_from(["req.method[3]", "a + b * (c - 0xff)", "x if y else -1", "a < b < c and not d"]),
    st.sampled_from(["s in ('a', 'b')", "matches(s, '^a{2}')", "u32(reg.rdi + 8)"]),
    _operands,
    st.builds("str({})".format, _operands),
    st.builds("str({}, {})".format, _operands, st.integers(1, 4096)),
)
_column_names = st.from_regex(r"[a-z][a-z0-9_]{2,10}", fullmatch=True).filter(lambda n: n not in ("site", "pid", "tid"))
_columns = st.dictionaries(_column_names, _expressions, max_size=5)
_points = st.one_of(
    st.builds(Point, kind=st.just(PointKind.OFFSET), offset=st.integers(0, 2**63 - 1)),
    st.builds(Point, kind=st.just(PointKind.REGEX), value=st.from_regex(r"[a-z^$.*]{1,9}(\\[^/])?/?", fullmatch=True)),
    st.builds(Point, kind=st.just(PointKind.LINE), value=_words, offset=st.integers(1, 10**6)),
    st.builds(
        lambda v, o: Point(
            kind=PointKind.TEXT if "::" in v or any(c.isspace() for c in v) else PointKind.SYMBOL, value=v, offset=o
        ),
        _words,
        st.integers(0, 10**6),
    ),
)


@settings(max_examples=500)
@given(
    name=st.from_regex(r"([A-Za-z_][A-Za-z0-9_.-]{0,20})?", fullmatch=True).filter(lambda n: n != "buildid"),
    kind=st.sampled_from([ProbeKind.ENTRY, ProbeKind.RETURN]),
    object_=st.one_of(
        _words.map(lambda w: "/" + w),
        st.sampled_from(["libc.so.6", "u", "p", "*", "buildid=00ff00ff", "a=b", "kprobe"]),
    ),
    point=_points,
    where=st.dictionaries(st.sampled_from([k for k in WHERE_KEYS if k not in ("pid", "tree", "uid")]), _words),
    columns=_columns,
)
def test_spec_to_text_to_spec(
    name: str, kind: ProbeKind, object_: str, point: Point, where: dict[str, str], columns: dict[str, str]
) -> None:
    if kind is ProbeKind.RETURN:
        columns = {k: v if "arg" not in v else f"entry({v})" for k, v in columns.items()}
    captures = parse_probe(
        f"{kind.value}:a:f" + (" {" + ", ".join(f"{k}={v}" for k, v in columns.items()) + "}" if columns else "")
    ).captures
    spec = ProbeSpec(
        text="", name=name, kind=kind, object=object_, point=point,
        where={k: where[k] for k in WHERE_KEYS if k in where}, captures=captures,
    )  # fmt: skip
    spec.text = format_probe(spec)
    assert parse_probe(spec.text) == spec
