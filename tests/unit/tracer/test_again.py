"""Probes that are registered again while news of their former registration is on its way; marks that are set meanwhile."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from tests.support import needs
from tests.support.children import TIMEOUT_S
from tests.unit.tracer.test_rules import Bench, Control, OddError, register
from trapline_agent.engines.base import ProcessId
from trapline_agent.kernel import fanotify
from trapline_agent.plans import FileKey
from trapline_agent.targets.files import file_key_of
from trapline_agent.tracer.loop import Tracer
from trapline_agent.tracer.mappers import Held, MapperHook

OFFSET = 64


@needs.ptrace
def test_a_limit_that_was_reached_before_is_none_of_the_probe_that_came_since(tracer: Tracer) -> None:
    bench = Bench()
    control = Control(tracer, bench)
    message = register("p", [bench.file.plan(OFFSET)])
    message.max_hits = 1
    assert control.register(message) is None
    former = bench.table.consumer("p")
    assert former is not None
    former.ring.sink(0)(1, 2, 3, [0] * 27, -1)  # the limit is reached: that is among the news
    bench.table.withdraw("p")
    assert control.register(message) is None
    assert bench.table.consumer("p") not in (None, former)


@needs.ptrace
def test_a_look_that_failed_takes_out_no_probe_that_came_since(tracer: Tracer) -> None:
    bench = Bench()
    control = Control(tracer, bench)
    bench.world.spawn(bench.file)
    reconcile, failed = bench.engine.on_reconcile, threading.Event()

    def fail(process: ProcessId) -> None:
        bench.engine.on_reconcile = reconcile
        failed.set()
        raise OddError

    bench.engine.on_reconcile = fail
    message = register("p", [bench.file.plan(OFFSET)])
    answers: list[Exception | None] = []
    tracer._register(message, answers.append)
    assert failed.wait(TIMEOUT_S)
    bench.table.withdraw("p")
    assert control.register(register("p", [bench.file.plan(OFFSET)])) is None
    while not answers:
        os.read(tracer._wake_r, 1)
        while tracer._news:
            tracer._news.popleft()()
    assert isinstance(answers[0], OddError)
    assert bench.table.consumer("p") is not None


@needs.ptrace
def test_when_the_lease_ends_nobody_is_held_any_more(tracer: Tracer, monkeypatch: pytest.MonkeyPatch) -> None:
    bench, marked = Bench(), []
    control = Control(tracer, bench)
    bench.world.spawn(bench.file)
    monkeypatch.setattr(tracer._mappers, "sync", lambda wanted, loaders: marked.append(dict(wanted)))
    consumer = bench.register(OFFSET)
    consumer.held[bench.file.key] = os.open("/dev/null", os.O_RDONLY)
    assert control.register(consumer.register) is None
    assert marked[-1]
    tracer._end_lease()
    assert marked[-1] == {}


def test_who_waits_while_other_marks_are_set_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mark is in force from its own request on, not from the end of all of them."""
    monkeypatch.setattr(fanotify, "unsupported", lambda: "")
    held: list[FileKey] = []

    def hold(mapper: Held) -> bool:
        held.append(mapper.file)
        return True

    hook = MapperHook(is_meant=lambda pid, file: True, hold=hold, on_late=lambda mapper: None, on_lost=lambda: None)
    wanted = {}
    for name in "ab":
        (tmp_path / name).write_bytes(b"x")
        fd = os.open(tmp_path / name, os.O_RDONLY)
        wanted[file_key_of(fd, name)] = fd

    def mark(file: FileKey, fd: int) -> str:
        found = os.fstat(fd)
        mapper = Held("mmap", 1, 1, 0.0)
        mapper.deadline = float("inf")
        hook._told(mapper, (found.st_dev, found.st_ino))
        return "it is not"

    monkeypatch.setattr(hook, "_mark", mark)
    monkeypatch.setattr(hook, "_why_not", lambda *args: "")
    hook.sync(wanted, {})
    assert held == list(wanted)
    for fd in wanted.values():
        os.close(fd)
