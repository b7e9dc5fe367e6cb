"""Aggregates of real programs: against bpftrace on the same calls, and against what the programs count themselves."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
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


def _bpftrace(script: str, child: Child, calls: Callable[[Child], None] = _calls) -> dict[str, Any]:
    """Returns bpftrace's maps after the calls, as its JSON has them."""
    with Child(["bpftrace", "-f", "json", "-e", script], ready=None) as other:
        while '"attached\\n' not in (
            other.lines.next() or ""
        ):  # printed once it has attached all and reads what they say
            pass
        calls(child)
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


STACKS = """
uprobe:%s:target_here /pid == %d/ { @[ustack()] = count(); }
interval:ms:100 { printf("attached\\n"); }
"""
FRAME_POINTERS = ("-O0", "-fno-omit-frame-pointer")
"""What bpftrace follows stacks by."""


def _deep_calls(child: Child) -> None:
    for command in ("deep 3", "deep 5", "deep 3", "realign", "spin 4 50", "deep 1"):
        child.ask(command)


def _up_to_main(names: Sequence[str]) -> tuple[str, ...]:
    """Beyond it is libc, which has no frame pointers."""
    return tuple(names[: names.index("main") + 1])


@needs.bpftrace
@needs.gcc
def test_bpftrace_counts_the_same_stacks(targets: Targets, tmp_path: Path) -> None:
    program = targets.build("stacks", *FRAME_POINTERS)
    with Child([program]) as child:
        maps = _bpftrace(STACKS % (program, child.pid), child, _deep_calls)
    theirs: Counter[tuple[str, ...]] = Counter()
    for stack, count in maps["@"].items():
        theirs[_up_to_main([line.strip().rpartition("+")[0] for line in stack.strip().splitlines()])] += count
    with Child([program]) as child, untouched(child.pid):
        probe = f"{program}:target_here @ pid={child.pid} -> count() by (ustack())"
        with _trace(probe, json=False, more=["--folded"]) as trace:
            _deep_calls(child)
            assert child.ask("count") == "count here=55 wrong=0"
            ours = {
                _up_to_main(line.rpartition(" ")[0].split(";")[::-1]): int(line.rpartition(" ")[2])
                for line in _end(trace).splitlines()
            }
    assert sum(ours.values()) == 55
    # At a function's first instruction its own frame is not there yet; older kernels take the caller's for it (fixed up in
    # Linux 6.11, perf/x86: "fix up user-space stack trace on function entry").
    without_callers: Counter[tuple[str, ...]] = Counter()
    for stack, count in ours.items():
        without_callers[stack[:1] + stack[2:]] += count
    assert theirs in (without_callers, ours)


@needs.gcc
def test_stacks_are_printed_with_their_counts(targets: Targets) -> None:
    """The program's own counter is the oracle of all of them; gdb's of the walks is in tests/unwind."""
    program = targets.build("stacks")
    with Child([program]) as child, untouched(child.pid):
        probe = f"{program}:target_here if arg0 < 100000 -> sum(arg0) by (ustack(3), comm)"
        with _trace(probe, f"{program}:target_here -> count() by (caller)", json=False) as trace:
            for command in ("deep 3", "deep 3", "sort", "spin 2 4"):
                child.ask(command)
            here = int(child.ask("count").split()[1].partition("=")[2])
            shown = _end(trace)
    rows = shown.split("\n\n")
    assert "comm=stacks: 2 hits, sum(arg0) 2\n    target_here\n    target_down\n    target_down" in rows
    assert "comm=stacks: 4 hits, sum(arg0) 6\n    target_here\n    target_spin\n    target_spin" in [
        block.removeprefix(f"{probe}\n") for block in rows
    ]
    callers = {line.split()[0]: int(line.split()[1]) for line in rows[-1].splitlines()[2:]}
    assert callers == {"compare": here - 6, "target_spin": 4, "target_down": 2}


@needs.root
@needs.gcc
def test_stacks_of_several_programs_over_the_service(stack: Stack, targets: Targets) -> None:
    """Two files with one build-id, in which the same places are the same: a row each, whatever their paths."""
    program = targets.build("stacks")
    with Child([program]) as child, Child([targets.copy(program)]) as other:
        probe = stack.arm(f"{program}:target_here -> count() by (ustack(4))")
        stack.armed(probe.id, child.pid)
        for _ in range(3):
            child.ask("deep 3")
        table = _exactly(stack, probe.id, 3)
        (row,) = table.rows
        frames = [table.frames[i] for i in row.stacks["ustack(4)"]]
        assert [f.path for f in frames] == [str(program)] * 4
        assert frames[0].build_id
        assert str(row.key[0]).count(" <- ") == 3
        assert table.hosts == [stack.host]
        names = stack.client.symbolize(stack.host, frames)
        assert [n for (n,) in names] == ["target_here", "target_down", "target_down", "target_down"]
        shown = stack.cli("probe", "aggregate", probe.name).stdout.splitlines()
        assert shown == ["3 hits", *(f"    {n}" for (n,) in names)]
        assert stack.cli("probe", "aggregate", probe.name, "--folded").stdout == (
            "target_down;target_down;target_down;target_here 3\n"
        )
        again = stack.arm(f"{Path(other.argv[0])}:target_here -> count() by (ustack(4))")
        stack.armed(again.id, other.pid)
        other.ask("deep 3")
        assert _exactly(stack, again.id, 1).rows[0].key == row.key
        # It is there again after the service's end, and in stretches of time.
        stack.client.aggregate(probe.id, since=probe.created_at)
        stack.service.kill()
        stack.start_service()
        stack.client.wait_host(stack.host)
        child.ask("deep 3")
        whole = _exactly(stack, probe.id, 4)
        assert [(r.key, r.count) for r in whole.rows] == [(row.key, 4)]
        stretch = stack.client.aggregate(probe.id, since=probe.created_at)
        assert [(r.count, [stretch.frames[i].offset for i in r.stacks["ustack(4)"]]) for r in stretch.rows] == [
            (4, [f.offset for f in frames])
        ]
        for each in (probe, again):
            stack.client.delete_probe(each.id)


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
