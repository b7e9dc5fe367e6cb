"""Hits of programs nobody here wrote, against what those programs count themselves."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.engines.host import untouched
from tests.support import children, needs
from tests.support.children import Child
from tests.system.stack import GETPPID, Stack, Subscription, breakpoints, caller, libc_of
from trapline.model import Phase, Target

pytestmark = [needs.ptrace_any, needs.x86_64]

SQLITE = """
import sys
db, statements, rows = None, 0, 0
def traced(sql):
    global statements
    statements += 1
print("ready", flush=True)
for line in sys.stdin:
    verb, *args = line.split()
    if verb == "connect":
        import sqlite3
        for _ in range(int(args[0])):
            db = sqlite3.connect(":memory:", isolation_level=None)
        db.execute("create table t (a integer, b text)")
        db.execute("select * from t").fetchall()
        db.set_trace_callback(traced)
    elif verb == "insert":
        for i in range(int(args[0])):
            db.execute("insert into t values (?, ?)", (i, f"value {i}"))
    elif verb == "select":
        rows += len(db.execute("select * from t").fetchall())
    print(rows + statements, flush=True)
"""
"""A step gives a row, or ends its statement: rows + statements, the latter as SQLite's own trace callback counts them."""


@contextmanager
def _sqlite(**env: str) -> Iterator[Child]:
    with caller(SQLITE, env=env) as child:
        yield child


def _libsqlite() -> Path:
    code = "import sqlite3; print(*{l.split()[5] for l in open('/proc/self/maps') if 'libsqlite3' in l})"
    return Path(children.run([needs.SYSTEM_PYTHON, "-c", code]).stdout.strip())


@needs.sqlite
def test_every_step_of_a_python_that_uses_sqlite(stack: Stack) -> None:
    with _sqlite() as target, untouched(target.pid):
        target.ask("connect 1")
        probe = stack.arm(f"libsqlite3.so.0:sqlite3_step @ pid={target.pid}")
        with Subscription(stack, [probe.id]) as stream:
            target.ask("insert 2000")
            target.ask("select")
            steps = int(target.ask("insert 1"))
            assert steps == 2000 + (2000 + 1) + 1
            hits = stream.take(steps)
        stack.exactly(probe.id, steps)
        assert [hit.seq for hit in hits] == list(range(steps))
        assert {(hit.pid, hit.tid, hit.host) for hit in hits} == {(target.pid, target.pid, stack.host)}
        assert all(a.ts_ns <= b.ts_ns for a, b in itertools.pairwise(hits))
        stack.client.delete_probe(probe.id)
        assert int(target.ask("insert 1")) == steps + 1


@needs.sqlite
def test_every_return_with_its_result(stack: Stack) -> None:
    with _sqlite() as target, untouched(target.pid):
        target.ask("connect 1")
        probe = stack.arm(f"ur:libsqlite3.so.0:sqlite3_step {{retval, ns=latency}} @ pid={target.pid}")
        steps = int(target.ask("insert 300"))
        stack.exactly(probe.id, steps)
        now = stack.client.wait_for(probe.id, lambda p: p.status.counters.calls >= steps)
        counters = now.status.counters
        assert (counters.calls, counters.unreturned, now.status.unreturned_by_reason) == (steps, 0, {})
        hits = stack.recorded(probe.id, steps)
        assert {hit.args["retval"] for hit in hits} == {101}
        assert all(isinstance(hit.args["ns"], int) and hit.args["ns"] > 0 for hit in hits)
        stack.client.delete_probe(probe.id)


@needs.sqlite
def test_what_a_condition_lets_go_is_counted(stack: Stack) -> None:
    with _sqlite() as target, untouched(target.pid):
        target.ask("connect 1")
        row, done = 100, 101  # SQLITE_ROW and SQLITE_DONE: sqlite.org/rescode.html
        probe = stack.arm(f"ur:libsqlite3.so.0:sqlite3_step if retval == {row} {{retval - 101}} @ pid={target.pid}")
        target.ask("insert 300")
        steps = int(target.ask("select"))
        assert steps == 300 + 300 + 1
        now = stack.client.wait_for(probe.id, lambda p: p.status.counters.hits + p.status.counters.filtered >= steps)
        counters = now.status.counters
        assert (counters.hits, counters.filtered, counters.calls, counters.dropped) == (300, 301, steps, 0)
        assert {hit.args["retval - 101"] for hit in stack.recorded(probe.id, 300)} == {row - done}
        assert "filtered" in stack.cli("probe", "show", now.name).stdout
        stack.client.delete_probe(probe.id)


@needs.sqlite
def test_a_library_that_is_opened_later_is_counted_from_its_first_call(stack: Stack) -> None:
    with _sqlite() as target, untouched(target.pid):
        library = _libsqlite()
        probe = stack.client.create_probe(f"{library}:sqlite3_open_v2 @ pid={target.pid}")
        assert stack.client.wait(probe.id).status.phase is Phase.NO_TARGETS
        assert not any("sqlite" in path for path in breakpoints(target.pid))
        target.ask("connect 25")  # dlopen and the first calls, with nobody waiting in between
        stack.exactly(probe.id, 25)
        where = stack.armed(probe.id, target.pid)
        assert (where.cause, where.may_have_missed) == ("mmap", False)
        stack.client.delete_probe(probe.id)


def _told_by_the_coverage_log(stack: Stack, name: str, pid: int, where: Target) -> None:
    (log,) = stack.client.coverage(name)
    (entry,) = [e for e in log.entries if e.pid == pid]
    assert (entry.cause, entry.hook, entry.may_have_missed) == (where.cause, where.hook, where.may_have_missed)
    assert (entry.symbol, entry.disarmed_at) == ("sqlite3_step", None)
    told = json.loads(stack.cli("probe", "coverage", name, "--json").stdout)
    assert [e["pid"] for e in told[0]["entries"] if e["pid"] == pid] == [pid]
    assert f"mmap ({where.hook})" in stack.cli("probe", "coverage", name).stdout


@needs.sqlite
def test_a_probe_without_a_selector_takes_what_starts_later(stack: Stack, tmp_path: Path) -> None:
    # A copy: the machine's own library is used by programs that are none of this test's business.
    library = Path(shutil.copy2(_libsqlite().resolve(), tmp_path / "libsqlite3.so.0"))
    with _sqlite(LD_LIBRARY_PATH=str(tmp_path)) as before:
        before.ask("connect 1")
        probe = stack.arm(f"{library}:sqlite3_step")
        expected = int(before.ask("insert 300"))
        with _sqlite(LD_LIBRARY_PATH=str(tmp_path)) as after, untouched(after.pid), untouched(before.pid):
            with Subscription(stack, [probe.id]) as stream:
                after.ask("connect 1")
                where = stack.armed(probe.id, after.pid, timeout=10)  # less than the hooks' safety net takes
                assert where.cause == "mmap"
                # Who maps the file is held until it is armed; or else it is found moments after it was mapped.
                assert where.may_have_missed == (where.hook != "fanotify")
                expected += int(after.ask("insert 200"))
                expected += int(before.ask("insert 100")) - 300
                while len([h for h in stream.hits if h.pid == after.pid]) < 200:
                    stream.take(len(stream.hits) + 1)
            now = stack.client.probe(probe.id).status
            assert now.coverage.armed == 2
            early = [h for h in stack.client.hits(probe.id, limit=10_000) if h.pid == after.pid]
            # The few steps of `create table` and `select` are more only if it was armed before them.
            assert 200 <= len(early) <= 220
            if not where.may_have_missed:
                stack.exactly(probe.id, 400 + len(early))
            _told_by_the_coverage_log(stack, probe.name, after.pid, where)
            assert len([h for h in stack.client.hits(probe.id, limit=10_000) if h.pid == before.pid]) == 400
            stack.client.delete_probe(probe.id)


def test_a_libc_function_of_two_processes_at_once(stack: Stack) -> None:
    with caller() as one, caller() as two, caller() as other:  # the site is the same, the processes are not
        probes = [stack.arm(f"{GETPPID} @ pid={target.pid}") for target in (one, two)]
        assert (one.ask("call 1500"), two.ask("call 700"), other.ask("call 50")) == ("1500", "700", "50")
        stack.exactly(probes[0].id, 1500)
        stack.exactly(probes[1].id, 700)
        assert breakpoints(other.pid) == []
        for probe, target in zip(probes, (one, two), strict=True):
            assert [t.pid for t in stack.client.targets(probe.id)] == [target.pid]
            assert stack.client.probe(probe.id).status.coverage.armed == 1
        for probe in probes:
            stack.client.delete_probe(probe.id)
        for target in (one, two):
            with untouched(target.pid):
                target.ask("call 10")


@pytest.mark.parametrize("shell", ["/bin/dash", "/bin/bash"])
def test_what_a_shell_writes(stack: Stack, shell: str) -> None:
    """Each line that a shell's `echo` prints is one write(2) through libc, and both ends of the pipe can be compared."""
    loop = 'echo ready; while read word; do echo "$word"; done'
    with Child([shell, "-c", loop]) as target, untouched(target.pid):
        probe = stack.arm(f"libc.so.6:write {{fd=arg0, text=str(arg1, 32), n=arg2}} @ pid={target.pid}")
        words = [f"word-{i}" for i in range(200)]
        assert [target.ask(word) for word in words] == words
        stack.exactly(probe.id, len(words))
        hits = stack.recorded(probe.id, len(words))
        assert [(h.args["fd"], str(h.args["text"])[: int(str(h.args["n"]))]) for h in hits] == [
            (1, f"{w}\n") for w in words
        ]
        stack.client.delete_probe(probe.id)


def test_paths_come_as_the_program_opened_them(stack: Stack, tmp_path: Path) -> None:
    names = ["plain", "with-ümläut", "x" * 200, "no/such/file", os.fsdecode(b"not-\xff-utf8")]
    paths = [str(tmp_path / name) for name in names]
    for name, path in zip(names, paths, strict=True):
        if name != "no/such/file":
            Path(path).touch()
    with caller() as target, untouched(target.pid):
        probe = stack.arm(f"libc.so.6:open64 {{path=str(arg0, 128)}} @ pid={target.pid}")
        target.popen.stdin.write(b"open " + b" ".join(map(os.fsencode, paths)) + b"\n")  # type: ignore[union-attr]
        target.ask("call 0")
        hits = stack.recorded(probe.id, len(paths))
        seen = [
            (h.args["path"], h.status.get("path", "ok")) for h in hits if str(h.args["path"]).startswith(str(tmp_path))
        ]
        whole = [os.fsencode(path) for path in paths]
        assert seen == [
            (p[:128].decode("utf-8", "backslashreplace"), "truncated")
            if len(p) > 128
            else (p.decode("utf-8", "backslashreplace"), "ok")
            for p in whole
        ]
        stack.client.delete_probe(probe.id)


class _Redis:
    """redis-server on a port of its own, asked in its own protocol."""

    def __init__(self, port: int) -> None:
        self._file = socket.create_connection(("127.0.0.1", port)).makefile("rwb")

    def command(self, *words: str) -> str:
        self._file.write(" ".join(words).encode() + b"\r\n")
        self._file.flush()
        head = self._file.readline().decode().strip()
        return self._file.read(int(head[1:]) + 2).decode() if head[0] == "$" else head

    def calls(self) -> int:
        """Returns how many commands it has processed, by its own statistics; this one is not in them yet."""
        lines = self.command("INFO", "commandstats").splitlines()
        return sum(int(line.partition("calls=")[2].partition(",")[0]) for line in lines if line.startswith("cmdstat_"))


@needs.redis
@needs.binutils
def test_every_command_of_redis_under_its_own_benchmark(stack: Stack, tmp_path: Path) -> None:
    program = Path(shutil.which("redis-server") or "").resolve()
    symbols = subprocess.run(["nm", "-D", str(program)], capture_output=True, text=True, check=True).stdout
    assert " T processCommand\n" in symbols, "Debian's redis-server exports its functions to its modules"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    argv = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(tmp_path)]
    with Child(argv, ready=None) as server, untouched(server.pid):
        while "Ready to accept connections" not in (server.lines.next() or "Ready to accept connections"):
            pass
        redis = _Redis(port)
        before = redis.calls()
        probe = stack.arm(f"redis-server:processCommand @ pid={server.pid}")
        benchmark = ["redis-benchmark", "-p", str(port), "-q", "-n", "3000", "-c", "8", "-P", "3", "-t", "set,get,incr"]
        done = children.run(benchmark)
        assert done.returncode == 0, done.stderr
        # Two commands offset one another: the first INFO came before the probe, the second is not in its own answer.
        commands = redis.calls() - before
        assert commands >= 9000
        stack.exactly(probe.id, commands)
        stack.client.delete_probe(probe.id)
        assert redis.command("PING") == "+PONG"
        assert libc_of(server.pid).exists()
