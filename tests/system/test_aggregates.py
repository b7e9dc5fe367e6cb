"""Aggregates of real programs: against bpftrace on the same calls, and against what the programs count themselves."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.engines.host import untouched
from tests.support import children, needs
from tests.support.children import Child
from tests.support.targets import Targets
from tests.system.stack import GETPPID, Stack, breakpoints, caller
from tests.system.test_counts import _Redis
from trapline.model import AggregateTable

pytestmark = [needs.ptrace_any, needs.x86_64]


@contextmanager
def _trace(*probes: str, json: bool = True, more: Sequence[str] = ()) -> Iterator[Child]:
    given = [word for probe in probes for word in ("-e", probe)]
    argv = [
        sys.executable,
        "-m",
        "trapline",
        "trace",
        *given,
        *(["--json"] if json else []),
        "--overhead",
        "off",
        *more,
    ]
    with Child(argv, ready=None, session=True) as trace:
        assert trace.popen.stderr is not None
        for _ in probes:
            assert "armed in 1 process" in trace.popen.stderr.readline().decode()
        yield trace


def _end(trace: Child) -> str:
    trace.signal(signal.SIGINT)
    out, err = trace.popen.communicate(timeout=children.TIMEOUT_S)
    assert trace.popen.returncode == 0, err
    return out.decode()


def _tables(out: str) -> list[AggregateTable]:
    return [AggregateTable.model_validate_json(line) for line in out.splitlines()]


def _calls(child: Child) -> None:
    """The same calls for whoever looks on."""
    child.ask("call 1000 one")
    child.ask("call 37 two")
    child.ask("six")


BPFTRACE = """
uprobe:%s:target_hot /pid == %d/ {
    @count = count();
    @by[str(arg1)] = count();
    @hist[str(arg1)] = hist(arg0);
    @lhist = lhist(arg0, 10, 910, 50);
    @sum[str(arg1)] = sum(arg0);
    @max = max(arg0);
    @avg = avg(arg0);
}
interval:ms:100 { printf("attached\\n"); }
"""


def _bpftrace(script: str, child: Child) -> dict[str, Any]:
    """Returns bpftrace's maps after the calls, as its JSON has them."""
    with Child(["bpftrace", "-f", "json", "-e", script], ready=None) as other:
        while '"attached\\n' not in (
            other.lines.next() or ""
        ):  # printed once it has attached all and reads what they say
            pass
        _calls(child)
        other.signal(signal.SIGINT)
        out, _ = other.popen.communicate(timeout=children.TIMEOUT_S)
    maps: dict[str, Any] = {}
    for line in out.decode().splitlines():
        if line.startswith('{"type"') and isinstance(data := json.loads(line)["data"], dict):
            maps |= data
    return maps


def _as_bpftrace(table: AggregateTable) -> Any:
    """Returns a table as bpftrace's JSON has a map: buckets have their last value, and are left out where nothing is."""

    def value(row: Any) -> Any:
        if not row.buckets:
            return row.value
        return [
            {k: v for k, v in (("min", b.low), ("max", None if b.high is None else b.high - 1)) if v is not None}
            | {"count": b.count}
            for b in row.buckets
        ]

    by_key = {str(row.key[0]) if row.key else "": value(row) for row in table.rows}
    return by_key[""] if set(by_key) == {""} else by_key


@needs.bpftrace
@needs.gcc
def test_bpftrace_says_the_same(targets: Targets) -> None:
    program = targets.build("hot")
    with targets.run("hot", "1") as child:
        theirs = _bpftrace(BPFTRACE % (program, child.pid), child)
    clauses = {
        "@count": "count()",
        "@by": "count() by (str(arg1))",
        "@hist": "hist(arg0) by (str(arg1))",
        "@lhist": "lhist(arg0, 10, 910, 50)",
        "@sum": "sum(arg0) by (str(arg1))",
        "@max": "max(arg0)",
        "@avg": "avg(arg0)",
    }
    with targets.run("hot", "1") as child, untouched(child.pid):
        probes = [f"{program}:target_hot @ pid={child.pid} -> {clause}" for clause in clauses.values()]
        with _trace(*probes) as trace:
            _calls(child)
            tables = _tables(_end(trace))
    ours = {name: _as_bpftrace(table) for name, table in zip(clauses, tables, strict=True)}
    ours["@avg"] = int(ours["@avg"])  # theirs are whole numbers
    assert set(theirs) == set(ours)
    for name, said in theirs.items():
        assert ours[name] == said, name
    assert all(table.lost == 0 for table in tables)
    assert theirs["@count"] == 1037


@needs.gcc
def test_a_table_is_printed_at_the_end(targets: Targets) -> None:
    program = targets.build("hot")
    with targets.run("hot", "1") as child:
        probe = f"{program}:target_hot -> hist(arg0) by (comm, str(arg1))"
        with _trace(probe, json=False, more=["-p", str(child.pid)]) as trace:
            child.ask("call 9 one")
            shown = _end(trace).splitlines()
    assert shown[:2] == [probe, "comm=hot, str(arg1)=one: 9 hits"]
    assert [line.split("|")[0].split() for line in shown[2:7]] == [
        ["[0]", "1"], ["[1]", "1"], ["[2,", "4)", "2"], ["[4,", "8)", "4"], ["[8,", "16)", "1"],
    ]  # fmt: skip


@needs.gcc
def test_after_so_many_hits_it_ends(targets: Targets) -> None:
    program = targets.build("hot")
    with targets.run("hot", "1") as child:
        with _trace(f"{program}:target_hot -> sum(arg0)", more=["-p", str(child.pid), "-n", "10"]) as trace:
            child.ask("call 100")
            out, _ = trace.popen.communicate(timeout=children.TIMEOUT_S)
        (table,) = _tables(out.decode())
    assert (table.count, table.rows[0].value) == (10, sum(range(10)))


def _exactly(stack: Stack, probe: str, count: int) -> AggregateTable:
    """Waits until the service has so many hits of an aggregate; returns it."""
    stack.client.wait_for(probe, lambda p: p.status.counters.hits >= count)
    table = stack.client.aggregate(probe)
    while table.count < count:
        table = stack.client.aggregate(probe)
    assert (table.count, table.lost) == (count, 0)
    assert sum(row.count for row in table.rows) + (table.other.count if table.other else 0) == count
    counters = stack.client.probe(probe).status.counters
    assert (counters.hits, counters.dropped) == (count, 0)
    return table


def test_a_hot_loop_sends_no_hits_and_all_are_counted(stack: Stack) -> None:
    with caller() as target, untouched(target.pid):
        probe = stack.arm(f"{GETPPID} @ pid={target.pid} -> count() by (tid)")
        target.ask("call 500")
        target.ask("start")
        while stack.client.probe(probe.id).status.counters.hits < 3000:
            pass
        calls = int(target.ask("stop"))
        table = _exactly(stack, probe.id, calls)
        by_thread = {row.key[0]: row.count for row in table.rows}
        assert len(by_thread) == 2
        assert by_thread[target.pid] == 500
        assert stack.client.hits(probe.id) == []
        assert f"{target.pid}" in stack.cli("probe", "aggregate", probe.name).stdout
        said = json.loads(stack.cli("probe", "aggregate", probe.name, "--json").stdout)
        assert said["count"] == calls
        stack.client.delete_probe(probe.id)


def test_a_service_that_is_away_costs_nothing(stack: Stack) -> None:
    """It is killed and comes back: what was counted meanwhile arrives, and nothing of it twice."""
    with caller() as target:
        probe = stack.arm(f"{GETPPID} @ pid={target.pid} -> count()")
        target.ask("call 1000")
        _exactly(stack, probe.id, 1000)
        stack.client.aggregate(probe.id, since=probe.created_at)  # all of it is written now
        stack.service.kill()
        target.ask("call 2000")
        stack.start_service()
        stack.client.wait_host(stack.host)
        _exactly(stack, probe.id, 3000)
        stack.client.delete_probe(probe.id)


@needs.redis
def test_commands_of_redis_under_its_own_benchmark(stack: Stack, tmp_path: Path) -> None:
    """Its own statistics are the oracle."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    argv = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(tmp_path)]
    assert shutil.which("redis-server")
    with Child(argv, ready=None) as server:
        while "Ready to accept connections" not in (server.lines.next() or "Ready to accept connections"):
            pass
        redis = _Redis(port)
        before = redis.calls()
        probe = stack.arm(f"redis-server:processCommand @ pid={server.pid} -> count() by (comm, tid)")
        times = stack.arm(f"ur:redis-server:processCommand @ pid={server.pid} -> quantiles(latency)")
        done = children.run(["redis-benchmark", "-p", str(port), "-q", "-n", "1500", "-c", "8", "-t", "set,get"])
        assert done.returncode == 0, done.stderr
        commands = redis.calls() - before
        (row,) = _exactly(stack, probe.id, commands).rows
        assert row.key == ["redis-server", server.pid]
        (row,) = _exactly(stack, times.id, commands).rows
        shares = [row.quantiles[q] for q in ("0", "0.5", "0.9", "0.99", "1")]
        assert shares == sorted(shares)
        assert shares[0] > 0
        for each in (probe, times):
            stack.client.delete_probe(each.id)
        assert breakpoints(server.pid) == []
        assert redis.command("PING") == "+PONG"


PYTHON = """
import sys
def once(x): pass
def often(x): pass
print("ready", flush=True)
for line in sys.stdin:
    list(map(often, range(int(line))))
    list(map(once, [1]))
    print("done", flush=True)
"""
"""What map() calls from C is a call of the evaluator each; a Python function that calls another is not, since 3.11."""
NAME = "str(cast(frame.f_code.co_name, 'PyASCIIObject *') + 1)"


@needs.python3_dbg
def test_python_functions_are_counted_by_their_own_names() -> None:
    """A chain of struct fields down to the string, at each call of the interpreter's evaluator; nothing is sent of each."""
    evaluator = f"{Path('/usr/bin/python3-dbg').resolve()}:_PyEval_EvalFrameDefault"
    with (
        Child(["/usr/bin/python3-dbg", "-S", "-c", PYTHON], env={"PYTHONPATH": ""}) as target,
        _trace(
            f"{evaluator} @ pid={target.pid} -> count() by ({NAME})",
            f"{evaluator} @ pid={target.pid} if {NAME} == 'often' -> count()",
        ) as trace,
    ):
        assert target.ask("400") == "done"
        by_name, often = _tables(_end(trace))
    counts = {row.key[0]: row.count for row in by_name.rows}
    assert (counts["often"], counts["once"]) == (400, 1)
    assert sum(counts.values()) == by_name.count
    assert often.count == 400


@needs.libc6_dbg
def test_what_is_opened_is_counted_by_name() -> None:
    code = "import sys\nprint('ready', flush=True)\nfor line in sys.stdin:\n    "
    code += (
        "import ctypes; [ctypes.CDLL(None).fopen(p.encode(), b'r') for p in line.split()]; print('done', flush=True)"
    )
    with caller(code) as target, _trace(f"libc.so.6:fopen @ pid={target.pid} -> count() by (filename, mode)") as trace:
        assert target.ask("/no/a /no/b /no/a") == "done"
        (table,) = _tables(_end(trace))
    counts = {tuple(row.key): row.count for row in table.rows}
    assert (counts["/no/a", "r"], counts["/no/b", "r"]) == (2, 1)


@needs.gcc
def test_a_text_has_no_sum(targets: Targets) -> None:
    program = targets.build("hot")
    with targets.run("hot", "1") as child:
        probe = f"{program}:target_hot -> sum(str(arg1)) by (pid)"
        done = children.run([sys.executable, "-m", "trapline", "trace", probe, "-p", str(child.pid)])
    assert done.returncode == 2
    said = done.stderr.splitlines()
    assert "sum is of a number, and `str(arg1)` is a text" in said[0]
    assert said[2].index("^") == said[1].index("str(arg1)")
