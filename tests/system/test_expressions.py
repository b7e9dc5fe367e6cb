"""Every example of docs/expressions.md says what it says there, at -O0 and at -O2; and gdb says the same of the calls."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import needs
from tests.support.targets import Targets
from trapline.cli.rows import format_hit
from trapline.errors import TraplineError
from trapline.model import Hit, HostResolution
from trapline.protocol.hits import ValueStatus
from trapline.spec import parse_probe
from trapline_agent.capture.compute import parts
from trapline_agent.capture.redaction import redaction
from trapline_agent.debuginfo.files import DebugFiles
from trapline_agent.plans import Load, Missing, Value
from trapline_agent.resolve import Resolver

PAGE = Path(__file__).resolve().parents[2] / "docs/expressions.md"
EXAMPLES = re.findall(r"^```probe\n(.*)\n```\n```text\n(.*)\n```$", PAGE.read_text(), re.M)
REAL = re.findall(r"^```probe-real\n(.*)\n```$", PAGE.read_text(), re.M)
PYTHON = """
def inner(x):
    return x + 1

def outer(n):
    return list(map(inner, range(n)))

list(map(outer, [2, 3]))
"""
ORACLE = {
    "handle": (
        *(
            "attempt",
            "rate",
            "order->id",
            "(int)order->state",
            "order->urgent",
            "order->priority",
            "(int)order->retries",
        ),
        *("(int)order->gift", "order->items->count", "order->items->next->price", "order->history[2]", "handled"),
        *("order->previous->id", "first.id", "attempt * 7 - 3"),
    ),
    "pay": ("total.amount", "total.currency", "(int)sign"),
    "deliver": ("delivered", "distance", "by.s_addr"),
    "weigh": ("kilos", "a", "b", "c", "d", "e", "f", "g"),
}


def _run(tmp_path: Path, probes: list[str], command: list[str]) -> str:
    """Traces a command with some probes, called e0, e1, ...; returns what it has printed. The hits are in ``hits``."""
    named = [a for i, text in enumerate(probes) for a in ("-e", f"e{i}={text}")]
    done = subprocess.run(
        [sys.executable, "-m", "trapline", "trace", "--json", "-o", str(tmp_path / "hits"), *named, "--", *command],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={
            "PATH": "/usr/bin:/bin",
            "PYTHONPATH": ":".join(sys.path),
            "TRAPLINE_STATE_DIR": str(tmp_path / "state"),
            **{k: v for k, v in os.environ.items() if k == "TRAPLINE_AGENT_POLICY"},
        },
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def _traced(tmp_path: Path, probes: list[str], command: list[str]) -> dict[str, list[Hit]]:
    """Traces a command likewise; returns the hits of each probe."""
    _run(tmp_path, probes, command)
    found: dict[str, list[Hit]] = {f"e{i}": [] for i in range(len(probes))}
    for line in (tmp_path / "hits").read_text().splitlines():
        hit = Hit.model_validate_json(line)
        found[hit.probe].append(hit)
    return found


@needs.ptrace_any
@needs.gcc
@pytest.mark.parametrize("flag", ["-O0", "-O2"])
def test_every_example_says_what_the_page_says(targets: Targets, tmp_path: Path, flag: str) -> None:
    assert len(EXAMPLES) >= 15
    program = targets.build("orders", flag)
    probes = [text.replace("orders:", f"{program}:") for text, _ in EXAMPLES]
    found = _traced(tmp_path, probes, [str(program), "2"])
    said = [format_hit(found[f"e{i}"][0], "").partition("orders:")[2] for i in range(len(probes))]
    assert said == [wanted for _, wanted in EXAMPLES]


@needs.ptrace_any
@needs.gcc
@needs.gdb
@pytest.mark.parametrize("flag", ["-O0", "-O2"])
def test_gdb_says_the_same(targets: Targets, tmp_path: Path, flag: str) -> None:
    program = targets.build("orders", flag)
    ours = [
        f"{program}:{function} {{{', '.join(f'v{i}={_ours(e)}' for i, e in enumerate(expressions))}}}"
        for function, expressions in ORACLE.items()
    ]
    found = _traced(tmp_path, ours, [str(program), "1"])
    script = []
    for function, expressions in ORACLE.items():
        script += [f"break {function}", "commands", "silent"]
        script += [f'printf "{function} {i} "\noutput {e}\necho \\n' for i, e in enumerate(expressions)]
        script += ["continue", "end"]
    commands = tmp_path / "script"
    commands.write_text("\n".join(["set debuginfod enabled off", "set confirm off", *script, "run 1"]) + "\n")
    said = subprocess.run(
        ["gdb", "-q", "-batch", "-nx", "-x", str(commands), str(program)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    ).stdout
    for n, (function, expressions) in enumerate(ORACLE.items()):
        (hit,) = found[f"e{n}"]
        for i, expression in enumerate(expressions):
            answer = re.search(rf"^{function} {i} (\S+)$", said, re.M)
            assert answer, f"gdb does not say {expression} in {function}: {said}"
            value = hit.args[f"v{i}"]
            if value is None:
                assert answer[1] == "<optimized", expression
                continue
            assert float(answer[1]) == pytest.approx(float(value)), f"{function}: {expression}"


def _ours(expression: str) -> str:
    """A C expression as it is written here."""
    casts = re.sub(r"^\((\w+)\)(.+)$", r"\2 + 0", expression)
    return casts.replace("->", ".")


@needs.ptrace_any
@needs.libc6_dbg
def test_the_arguments_of_fopen_by_name(tmp_path: Path) -> None:
    (probe,) = [text for text in REAL if "fopen" in text]
    code = "import ctypes; l = ctypes.CDLL(None); [l.fopen(b'/nonexistent/%d' % i, b'rb') for i in range(5)]"
    (hits,) = _traced(tmp_path, [probe], [needs.SYSTEM_PYTHON, "-c", code]).values()
    ours = [h.args for h in hits if str(h.args["filename"]).startswith("/nonexistent")]
    assert ours == [{"filename": f"/nonexistent/{i}", "mode": "rb"} for i in range(5)]


@needs.ptrace_any
@needs.gcc
@pytest.mark.parametrize("link", ["-dynamic", "-static"])
def test_errno_is_what_the_program_says(targets: Targets, tmp_path: Path, link: str) -> None:
    """Of the C library's own file, and of a program that it is linked into."""
    (probe,) = [text for text in REAL if "access" in text]
    program = targets.build("errnos", "-O1", link)
    if link == "-static":
        probe = probe.replace("libc.so.6", str(program))
    out = subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout
    said = [line.split() for line in out.splitlines()]
    (hits,) = _traced(tmp_path, [probe], [str(program)]).values()
    ours = [[h.args["path"], str(h.args["result"]), str(h.args["errno"])] for h in hits]
    assert [row for row in ours if row[0] in {path for path, *_ in said}] == said
    assert {number for _, _, number in said} >= {"2", "20", "36", "77"}


@needs.gcc
def test_errno_is_refused_where_it_is_not_known(targets: Targets) -> None:
    resolver = Resolver("h", "h", {os.getpid()}, 0, debug=DebugFiles(None).of)
    answer = resolver.resolve_dry(parse_probe(f"{targets.build('orders', '-O2')}:handle {{errno}}"))
    (refused,) = [site.refused for site in answer.sites if site.refused]
    assert refused["reason"] == "NoErrno"
    assert refused["text"][refused["position"] :] == "errno}"


@needs.ptrace_any
@needs.python3_dbg
def test_the_functions_that_python_enters_by_their_own_names(tmp_path: Path) -> None:
    script = tmp_path / "names.py"
    script.write_text(PYTHON)
    (probe,) = [text for text in REAL if "python" in text]
    (hits,) = _traced(tmp_path, [probe], [probe.split(":")[0], str(script)]).values()
    ours = [h.args["name"] for h in hits if h.args["file"] == str(script)[:64]]
    assert ours == ["<module>", "outer", "inner", "inner", "outer", "inner", "inner", "inner"]


@needs.ptrace_any
@needs.gcc
def test_a_condition_lets_go_and_counts(targets: Targets, tmp_path: Path) -> None:
    program = targets.build("orders", "-O2")
    done = subprocess.run(
        [sys.executable, "-m", "trapline", "trace", "--json", "-e", f"n={program}:handle if attempt % 10 == 0 {{attempt}}",
         "--", str(program), "1000"],
        capture_output=True, text=True, timeout=120, check=False,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(sys.path), "TRAPLINE_STATE_DIR": str(tmp_path / "state")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [hit["args"]["attempt"] for hit in lines] == list(range(10, 1001, 10))
    assert "n: 900 more did not match the condition" in done.stderr
    assert "1000 " in done.stdout  # the program's own count


LANGUAGES = {
    "c++": {
        "_ZN4shop6Basket3add": (
            "{what, where, tag.text, tag.weight, c, this.owner, this.total, this.colour, this.id, n=len(what)}",
            {
                "what": "lamp", "where": "cell", "tag.text": "fragile", "tag.weight": -3, "c": "red", "this.total": 2.5,
                "this.owner": "a name that is much too long to be kept in place", "this.colour": "green", "this.id": 5,
                "n": 4,
            },
        ),
        "_ZN4shop5greet": ("{name, loud, much}", {"name": "bob", "loud": True, "much": 1.5}),
        "_ZN4shop5count": (
            "{n, id=basket._M_t._M_t._M_head_impl.id, basket.id, basket.owner, there=basket != 0}",
            {"n": -2, "id": 5, "basket.id": 5, "basket.owner": "", "there": True},
        ),
        "_ZN4shop5stock": (
            "{n=len(tags), tags[1].text, tags[1].weight, beyond=tags[2].text, before=tags[n - 3].weight, shared.id, none.id,"
            " words[0], m=len(words), len(numbers), s=u64(shared) == this_one}",
            {
                "n": 2, "tags[1].text": "heavy", "tags[1].weight": 900, "beyond": None, "before": None, "shared.id": 5,
                "none.id": None, "words[0]": "first", "m": 1, "len(numbers)": 0, "s": False,
            },
        ),
        "ur:_ZN4shop5greet": ("{retval}", {"retval": "hello bob!"}),
    },
    "rust": {
        "greet": (
            "{name, user.name, user.age, user.at.x, user.at.n, owned, times, loud, n=len(name)}",
            {
                "name": "bob", "user.name": "alice", "user.age": 30, "user.at.x": 1.5, "user.at.n": -4,
                "owned": "a text of its own", "times": 2, "loud": True, "n": 3,
            },
        ),
        "paint": (
            "{colour, shade, n=len(numbers), numbers[1]}", {"colour": "Green", "shade": 0.25, "n": 3, "numbers[1]": 20},
        ),
        "hold": (
            "{a[0], b[0], c[0], d[0], a.Move.y, b.Move.y, c.Write.__0, d.Write.__0, d.Numbers.__1, some.age, some.name,"
            " none.age}",
            {
                "a[0]": "Move", "b[0]": "Quit", "c[0]": "Write", "d[0]": "Numbers", "a.Move.y": -2, "b.Move.y": None,
                "c.Write.__0": "a note", "d.Write.__0": None, "d.Numbers.__1": 600, "some.age": 30, "some.name": "alice",
                "none.age": None,
            },
        ),
        "keep": (
            "{n=len(ages), ages[1], beyond=ages[3], boxed.age, boxed.name, few[0], little[0], times}",
            {
                "n": 3, "ages[1]": 31, "beyond": None, "boxed.age": 31, "boxed.name": "carol", "few[0]": 7,
                "little[0]": None, "times": -9,
            },
        ),
        "ur:paint": ("{retval}", {"retval": -10}),
    },
    "go": {
        "main.greet": (
            "{name, u.Name, u.Age, u.At.N, u.Next.Name, times, rate, loud}",
            {
                "name": "bob", "u.Name": "alice", "u.Age": 30, "u.At.N": -4, "u.Next.Name": "carol", "times": -2,
                "rate": 0.25, "loud": True,
            },
        ),
        "main.find": (
            "{n=len(ages), len(none), key, len(users), users[1].Name, beyond=users[2].Name, len(name)}",
            {
                "n": 3, "len(none)": None, "key": "bob", "len(users)": 2, "users[1].Name": "carol", "beyond": None,
                "len(name)": 4,
            },
        ),
        "main.total": ("{numbers[1], n=len(numbers), p.X, p.N}", {"numbers[1]": 20, "n": 3, "p.X": 2.5, "p.N": -7}),
        "ur:main.greet": ("{retval}", {"retval": 31}),
    },
}  # fmt: skip


def _built(language: str, optimised: bool, into: Path) -> Path:
    sources = Path(__file__).resolve().parents[1] / "targets"
    output = into / "words"
    command = {
        "c++": ["g++", "-O2" if optimised else "-O0", "-g", f"{sources}/words.cpp", "-o", str(output)],
        "rust": [
            "rustc",
            "-g",
            "-C",
            f"opt-level={2 if optimised else 0}",
            f"{sources}/words_rust.rs",
            "-o",
            str(output),
        ],
        "go": ["go", "build", *([] if optimised else ["-gcflags=-N -l"]), "-o", str(output), f"{sources}/words_go.go"],
    }[language]
    environment = {**os.environ, "GOCACHE": str(into / "cache"), "GO111MODULE": "off"}
    subprocess.run(command, check=True, timeout=300, cwd=into, env=environment)
    return output


@needs.ptrace_any
@pytest.mark.parametrize("optimised", [False, True], ids=["O0", "O2"])
@pytest.mark.parametrize(
    "language",
    [
        pytest.param("c++", marks=needs.gxx),
        pytest.param("rust", marks=needs.rustc),
        pytest.param("go", marks=needs.go),
    ],
)
def test_values_of_other_languages(tmp_path: Path, language: str, optimised: bool) -> None:
    program = _built(language, optimised, tmp_path)
    symbols = _symbols(program)
    probes, wanted = [], []
    for name, (captures, values) in LANGUAGES[language].items():
        kind, _, function = name.rpartition(":")
        symbol = next(s for s in symbols if s == function or (language == "c++" and s.startswith(function)))
        probes.append(f'{kind}{":" if kind else ""}{program}:"{symbol}" {captures}')
        wanted.append(values)
    found = _traced(tmp_path, probes, [str(program)])
    assert [found[f"e{i}"][0].args for i in range(len(probes))] == wanted


def _symbols(program: Path) -> list[str]:
    listed = subprocess.run(["nm", str(program)], capture_output=True, text=True, check=True).stdout
    return [line.split()[-1] for line in listed.splitlines()]


@needs.ptrace_any
@needs.gcc
@needs.gdb
@pytest.mark.parametrize("flag", ["-O0", "-O2"])
def test_locals_in_the_middle_of_a_function(targets: Targets, tmp_path: Path, flag: str) -> None:
    program = targets.build("orders", flag)
    source = (Path(__file__).resolve().parents[1] / "targets/orders.c").read_text().splitlines()
    line = next(i for i, text in enumerate(source, 1) if "name_of(i % 2" in text)
    names = ("sum", "i", "times", "order.id", "lamp.count", "argc")
    script = [f"break orders.c:{line}", "run 2", "info symbol $pc"]
    script += [f'printf "{name} "\noutput {name}\necho \\n' for name in names]
    commands = tmp_path / "script"
    commands.write_text("\n".join(["set debuginfod enabled off", *script]) + "\n")
    said = subprocess.run(
        ["gdb", "-q", "-batch", "-nx", "-x", str(commands), str(program)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    ).stdout
    place = re.search(r"main \+ (\d+) in", said)
    assert place, said
    columns = ", ".join(f"v{i}={name}" for i, name in enumerate(names))
    found = _traced(tmp_path, [f"{program}:main+{place[1]} {{{columns}, line}}"], [str(program), "2"])
    first = found["e0"][0]
    assert first.args["line"] == line
    for i, name in enumerate(names):
        answer = re.search(rf"^{re.escape(name)} (.+)$", said, re.M)
        assert answer, said
        if "optimized out" in answer[1]:
            assert first.status[f"v{i}"] == "optimised-out", name
        else:
            assert first.args[f"v{i}"] == int(answer[1]), name
    assert len(found["e0"]) == 2


@needs.ptrace_any
@needs.gcc
def test_the_most_and_longest_texts_hold_a_target_up_for_a_bounded_time(targets: Targets, tmp_path: Path) -> None:
    """32 texts of 4,096 bytes at each call, no two alike, and chains of 36 pointers into garbage: none is lost."""
    program = targets.build("longtexts", "-O2")
    texts = ", ".join(f"c{i}=str(arg0 + {4096 * i}, 4096)" for i in range(32))
    chains = ", ".join(f"c{i}={'u64(' * 36}arg1 + {8 * i}{')' * 36}" for i in range(16))
    for captured, calls, status in ((texts, 100, {"truncated"}), (chains, 1000, {"", "fault", "null"})):
        done = _run(tmp_path, [f"{program}:look {{{captured}}}"], [str(program), str(calls)])
        hits = [Hit.model_validate_json(line) for line in (tmp_path / "hits").read_text().splitlines()]
        assert len(hits) == calls
        assert {hit.status.get(f"c{i}", "") for hit in hits for i in range(16)} <= status
        counted, begins, ns = done.split()
        assert int(counted) == calls
        assert int(ns) < 20_000_000, f"{ns} ns a call"  # on a busy machine; 0.3 ms are measured
        if captured == texts:
            first, last = str(hits[0].args["c0"]), str(hits[-1].args["c0"])
            assert first.startswith(begins)
            assert len(first) == len(last) == 4096
            assert first[99:] == last[:-99]


@needs.gcc
def test_places_of_one_probe_share_its_columns(targets: Targets, tmp_path: Path) -> None:
    program = targets.build("orders", "-O2")
    resolver = Resolver("h", "h", {os.getpid()}, 0, debug=DebugFiles(None).of)

    def resolved(text: str) -> HostResolution:
        return resolver.resolve_dry(parse_probe(text))

    plan = resolver.resolve(parse_probe(f"ur:{program}:[hw]e*"))  # weigh alone
    assert [(f.name, f.column) for f in plan.fetches] == [("retval", "f64"), ("latency", "u64")]
    for text in ("[hw][ae]* {retval}", "[hn]a* {retval}", "[hwnp][ae]*"):  # an int, a double, a text, a struct
        plan = resolver.resolve(parse_probe(f"ur:{program}:{text}"))
        assert not any(site.refused for site in plan.resolved)
        assert len(plan.plans) >= 2
        assert (plan.fetches[0].name, plan.fetches[0].column, plan.fetches[0].register) == ("retval", "i64", "")
        assert all(p.program is not None for p in plan.plans)
        assert "as words" in plan.notes[0]
    plan = resolver.resolve(parse_probe(f"ur:{program}:pay"))  # a struct, of which nothing was asked
    assert [f.name for f in plan.fetches] == ["retval", "latency"]
    answer = resolved(f"{program}:[hw][ae]* {{x=user if 1 else user}}")  # weigh has none
    assert [site.refused["code"] for site in answer.sites if site.refused] == ["not-found"]
    answer = resolved(f"ur:{program}:[hn]a* {{x=retval[0]}}")  # an int has no elements
    assert [site.refused["code"] for site in answer.sites if site.refused] == ["spec-invalid"]
    answer = resolved(f"{program}:[hn]a* {{user}}")  # name_of has none
    (refused,) = [site.refused for site in answer.sites if site.refused]
    assert refused["code"] == "not-found"
    assert refused["text"][refused["position"] :] == "user}"


@needs.gcc
def test_a_policy_hides_what_it_names(targets: Targets, tmp_path: Path) -> None:
    program = targets.build("orders", "-O2")
    policy = redaction(["*TOKEN*", "pass*", "struct item", "user"])
    resolver = Resolver("h", "h", {os.getpid()}, 0, debug=DebugFiles(None).of, redact=policy)
    hidden = Missing(int(ValueStatus.REDACTED))
    for text, wanted in (
        ("handle {order.items.name, order.id}", [True, False]),
        ("handle {arg2, str(reg.rdx), user, arg1}", [True, True, True, False]),
        ("handle {password, str(password), x=len(password)}", [True, True, True]),
        ("handle {my_token=order.id, order.items[0].count}", [True, True]),
        ("pay {token, str(arg0), total.currency}", [True, False, False]),
    ):
        plan = resolver.resolve(parse_probe(f"{program}:{text}"))
        (site,) = plan.plans
        assert site.program is not None
        assert [_hidden(value, hidden) for value in site.program.values] == wanted, text


@needs.ptrace_any
@needs.gcc
def test_a_policy_holds_for_a_trace_too(targets: Targets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text('redact = ["token", "user"]')
    monkeypatch.setenv("TRAPLINE_AGENT_POLICY", str(policy))
    program = targets.build("orders", "-O2")
    found = _traced(tmp_path, [f"{program}:handle {{user, x=str(arg2), attempt}}"], [str(program), "2"])
    assert [(h.status, h.args["attempt"]) for h in found["e0"][:1]] == [({"user": "redacted", "x": "redacted"}, 1)]


@needs.gcc
def test_a_policy_holds_where_debug_information_cannot_be_read(targets: Targets) -> None:
    def unreadable(file: object) -> None:
        raise TraplineError("its reader died", reason="DebugInfoUnreadable")

    program = targets.build("orders", "-O2")
    for redact, text, refused in (
        (redaction(["user"]), "{arg2}", True),
        (redaction(["user"]), "if arg2 == 0", True),
        (redaction(["user"]), "", False),
        (None, "{arg2}", False),
    ):
        resolver = Resolver("h", "h", {os.getpid()}, 0, debug=unreadable, redact=redact)
        spec = parse_probe(f"{program}:handle {text}")
        if refused:
            with pytest.raises(TraplineError, match="its reader died"):
                resolver.resolve(spec)
        else:
            assert resolver.resolve(spec).plans


def _hidden(value: Value, hidden: Missing) -> bool:
    """Whether nothing is fetched for a value, and it has the status."""
    stack, found = [value], False
    while stack:
        one = stack.pop()
        found = found or one == hidden
        assert not (found and isinstance(one, Load)), one
        stack += parts(one)
    return found
