"""``trapline trace`` on programs nobody here wrote; the oracle is what the program counts itself."""

from __future__ import annotations

import json
import re
import signal
import sys
from pathlib import Path

import pytest

from tests.support import children, needs
from tests.support.children import Child
from tests.support.targets import Targets

SQLITE = """
import sqlite3, sys
db = sqlite3.connect(":memory:", isolation_level=None)
db.execute("create table t (a integer, b text)")
db.execute("delete from t")
print("ready", flush=True)
for line in sys.stdin:
    n = int(line)
    for i in range(n):
        db.execute("insert into t values (?, ?)", (i, f"value {i}"))
    print(n, db.execute("select count(*) from t").fetchone()[0], flush=True)
"""
STEPS_OF_COUNT = 2
"""``select count(*)`` steps twice: to its row, and to its end."""


def _trace(*args: str) -> Child:
    return Child([sys.executable, "-m", "trapline", "trace", *args], ready=None, session=True)


def _end(child: Child, number: int = signal.SIGINT) -> tuple[int, str, str]:
    """Signals a trace, and returns its status and all it said since."""
    child.signal(number)
    out, err = child.popen.communicate(timeout=children.TIMEOUT_S)
    return child.popen.returncode, out.decode(), err.decode()


def _stderr_line(child: Child) -> str:
    assert child.popen.stderr is not None
    return child.popen.stderr.readline().decode()


@needs.ptrace_any
@needs.sqlite
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_every_statement_of_a_running_python_is_one_line(number: int, tmp_path: Path) -> None:
    out = tmp_path / "hits"
    with children.python(SQLITE, interpreter=needs.SYSTEM_PYTHON) as target:
        with _trace("libsqlite3.so.0:sqlite3_step", "-p", str(target.pid), "--json", "-o", str(out)) as trace:
            assert "armed in 1 process" in _stderr_line(trace)
            assert target.ask("2000") == "2000 2000"
            status, _, summary = _end(trace, number)
        assert status == 0
        hits = [json.loads(line) for line in out.read_text().splitlines()]
        assert len(hits) == 2000 + STEPS_OF_COUNT
        assert [hit["seq"] for hit in hits] == list(range(len(hits)))
        assert {hit["pid"] for hit in hits} == {target.pid}
        row = summary.splitlines()[-1].split()
        assert row[:4] == ["libsqlite3.so.0:sqlite3_step", "1", f"{len(hits):,}", "0"]
        # As it was before: it goes on, and nobody counts.
        assert target.ask("10") == "10 2010"


@needs.ptrace_any
@needs.sqlite
def test_every_return_of_a_statement_with_its_result_and_its_time(tmp_path: Path) -> None:
    """SQLite says by the result what a step did: 100 is a row, 101 the end (sqlite3.h)."""
    out = tmp_path / "hits"
    with children.python(SQLITE, interpreter=needs.SYSTEM_PYTHON) as target:
        with _trace("ur:libsqlite3.so.0:sqlite3_step", "-p", str(target.pid), "--json", "-o", str(out)) as trace:
            assert "armed in 1 process" in _stderr_line(trace)
            assert target.ask("500") == "500 500"
            status, _, summary = _end(trace)
        assert status == 0
        hits = [json.loads(line)["args"] for line in out.read_text().splitlines()]
        assert [hit["retval"] for hit in hits] == [101] * 500 + [100, 101]
        assert all(0 < hit["latency"] < 60e9 for hit in hits)
        assert summary.splitlines()[-1].split()[:4] == ["ur:libsqlite3.so.0:sqlite3_step", "1", "502", "0"]
        assert target.ask("10") == "10 510"


@needs.ptrace_any
@needs.gcc
def test_calls_that_do_not_return_are_told_at_the_end(targets: Targets) -> None:
    with targets.run("returns") as target:
        probe = f"ur:{targets.build('returns')}:target_jumper"
        with _trace(probe, "-p", str(target.pid), "--json") as trace:
            assert "armed in 1 process" in _stderr_line(trace)
            target.ask("jump 20")
            status, out, summary = _end(trace)
        assert (status, out) == (0, "")
        assert summary.splitlines()[-1] == f"{probe}: of 20 calls, not seen to return: 20 abandoned"


@needs.ptrace_any
@needs.sqlite
def test_strings_come_as_they_were_bound() -> None:
    with children.python(SQLITE, interpreter=needs.SYSTEM_PYTHON) as target:
        probe = "libsqlite3.so.0:sqlite3_bind_text {column=arg1, text=str(arg2, 32)}"
        with _trace(probe, "-p", str(target.pid), "-n", "3", "--json") as trace:
            assert "armed in 1 process" in _stderr_line(trace)
            target.ask("5")
            out, _ = trace.popen.communicate(timeout=children.TIMEOUT_S)
    hits = [json.loads(line) for line in out.decode().splitlines()]
    assert [hit["args"] for hit in hits] == [{"column": 2, "text": f"value {i}"} for i in range(3)]


@needs.ptrace_any
@needs.gcc
def test_a_process_with_several_places_is_one(targets: Targets) -> None:
    with targets.run("returns") as target, _trace("returns:target_*", "-p", str(target.pid)) as trace:
        assert "armed in 1 process" in _stderr_line(trace)
        _end(trace)


@needs.ptrace
def test_what_a_pattern_leaves_out_is_told() -> None:
    done = children.run([sys.executable, "-m", "trapline", "trace", "libc.so.6:str*", "--json", "--", "/bin/true"])
    assert done.returncode == 0, done.stderr
    assert re.search(r"^libc\.so\.6:str\*: \d+ of \d+ places are not probed: \d+ IndirectFunction", done.stderr, re.M)


@needs.ptrace
def test_a_command_is_traced_from_its_first_instruction_and_its_status_is_ours() -> None:
    probe = "libc.so.6:write {text=str(arg1, 16)}"
    done = children.run(
        [sys.executable, "-m", "trapline", "trace", "--json", probe, "--", "/bin/sh", "-c", "echo one; exit 7"]
    )
    assert done.returncode == 7, done.stderr
    said = [line for line in done.stdout.splitlines() if not line.startswith("{")]
    hits = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert said == ["one"]
    assert [hit["args"]["text"] for hit in hits] == ["one\n"]


@needs.ptrace
def test_what_a_command_starts_is_traced_too() -> None:
    probe = "libc.so.6:write {text=str(arg1, 16)}"
    shell = "/bin/echo two; /bin/sh -c '/bin/echo three'; true"
    done = children.run([sys.executable, "-m", "trapline", "trace", "--json", probe, "--", "/bin/sh", "-c", shell])
    assert done.returncode == 0, done.stderr
    hits = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [hit["args"]["text"].rstrip("\n") for hit in hits] == ["two", "three"]


@needs.ptrace
def test_ctrl_c_is_the_command_s() -> None:
    code = """
import os, signal
try:
    os.write(1, b"waiting\\n")
    signal.pause()
except KeyboardInterrupt:
    os.write(1, b"interrupted\\n")
    raise SystemExit(5)
"""
    with _trace("libc.so.6:write", "--json", "--", sys.executable, "-c", code) as trace:
        trace.wait_for("waiting")
        status, out, _ = _end(trace)
    assert status == 5
    assert "interrupted" in out.splitlines()


@needs.ptrace
def test_a_command_that_is_killed_ends_as_in_a_shell() -> None:
    argv = [sys.executable, "-m", "trapline", "trace", "libc.so.6:write", "--", "/bin/sh", "-c", "kill -9 $$"]
    assert children.run(argv).returncode == 128 + signal.SIGKILL


@needs.ptrace_any
@needs.sqlite
def test_a_reader_that_has_enough_ends_it_and_nothing_is_harmed() -> None:
    with children.python(SQLITE, interpreter=needs.SYSTEM_PYTHON) as target:
        with _trace("libsqlite3.so.0:sqlite3_step", "-p", str(target.pid)) as trace:
            assert "armed in 1 process" in _stderr_line(trace)
            assert trace.popen.stdout is not None
            trace.popen.stdout.close()
            target.ask("5000")
            assert trace.popen.wait(children.TIMEOUT_S) == 0
        assert target.ask("1") == "1 5001"


@needs.ptrace_any
@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["libc.so.6:getpidd"], "did you mean `getpid`"),
        (["libc.so.6:getpid+1"], "in the middle of the instruction"),
        (["no-such-library.so:f"], "no-such-library.so"),
        (["libc.so.6:getpid", "-p", "4194304"], "4194304"),
        (["libc.so.6:getpid", "--", "/no/such/program"], "/no/such/program"),
    ],
)
def test_what_cannot_be_traced_is_one_line_and_status_2(args: list[str], said: str) -> None:
    with children.python("import sys; print('ready', flush=True); sys.stdin.read()") as target:
        here = [] if "-p" in args or "--" in args else ["-p", str(target.pid)]
        done = children.run([sys.executable, "-m", "trapline", "trace", args[0], *here, *args[1:]])
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("trapline: ")


@needs.ptrace_any
@needs.gdb
def test_a_process_of_another_tracer_is_left_to_it() -> None:
    with children.python("import sys; print('ready', flush=True); sys.stdin.read()") as target:
        gdb = ["gdb", "--nx", "-q", "-p", str(target.pid), "-ex", "echo attached\\n"]
        with Child(gdb, ready="attached") as other:
            done = children.run([sys.executable, "-m", "trapline", "trace", "libc.so.6:getpid", "-p", str(target.pid)])
            other.send("detach")
            other.send("quit")
            other.wait()
    assert done.returncode == 2
    assert "gdb" in done.stderr
