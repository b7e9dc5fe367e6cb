"""Looks go on side by side: one that is slow, or hangs, holds up nobody that has nothing to do with it (semantics R6)."""

from __future__ import annotations

import socket
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.support import needs
from tests.support.children import TIMEOUT_S
from trapline_agent.engines.base import Capabilities, ProcessId
from trapline_agent.plans import FileKey, SitePlan
from trapline_agent.tracer import messages as m
from trapline_agent.tracer.looks import Looks
from trapline_agent.tracer.loop import Tracer

A, B = ProcessId(1, 1), ProcessId(2, 1)


class Engine:
    """Hangs in process A until it is let go."""

    floats = None

    def __init__(self) -> None:
        self.entered, self.go = threading.Event(), threading.Event()
        self.looked_at: Counter[ProcessId] = Counter()
        self.at_once: Counter[ProcessId] = Counter()
        self.overlapped = False
        self.closed = False
        self.comms: dict[int, str] = {}

    def capabilities(self) -> Capabilities:
        return Capabilities("hangs", True)

    def processes(self) -> list[ProcessId]:
        return []

    def reconcile(self, process: ProcessId, cause: str) -> None:
        self.at_once[process] += 1
        self.overlapped |= self.at_once[process] > 1
        if process == A:
            self.entered.set()
            self.go.wait(TIMEOUT_S)
        self.looked_at[process] += 1
        self.at_once[process] -= 1

    def tick(self) -> list[ProcessId]:
        return []

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = Engine()
    yield engine
    engine.go.set()


def test_r6_a_process_that_hangs_holds_up_no_other_round(engine: Engine) -> None:
    looks = Looks(engine, workers=2)
    over = threading.Event()
    looks.begin(lambda: [A], "scan", lambda error: over.set())
    assert engine.entered.wait(TIMEOUT_S)
    for _ in range(100):
        looks.run(lambda: [B], "scan")
    assert not over.is_set()
    engine.go.set()
    assert over.wait(TIMEOUT_S)
    assert engine.looked_at == {A: 1, B: 100}


def test_r6_a_long_round_holds_up_no_short_one() -> None:
    """With one worker only: the short one has its turn after one look of the long one."""
    done: list[str] = []
    gate, over = threading.Event(), threading.Event()

    class Slow(Engine):
        def reconcile(self, process: ProcessId, cause: str) -> None:
            gate.wait(TIMEOUT_S)

    looks = Looks(Slow(), workers=1)
    looks.begin(lambda: [ProcessId(n, 1) for n in range(1000)], "scan", lambda error: (done.append("long"), over.set()))
    looks.begin(lambda: [B], "scan", lambda error: done.append("short"))
    gate.set()
    assert over.wait(TIMEOUT_S)
    assert done == ["short", "long"]


def test_r6_a_process_is_looked_at_once_at_a_time_and_for_all_that_ask(engine: Engine) -> None:
    """A look that had begun is not good enough for a round that comes later; one look is, for all that wait."""
    looks = Looks(engine)
    rounds = [threading.Event() for _ in range(11)]
    looks.begin(lambda: [A], "scan", lambda error: rounds[0].set())
    assert engine.entered.wait(TIMEOUT_S)
    listed = threading.Semaphore(0)
    for over in rounds[1:]:
        looks.begin(lambda: (listed.release(), [A])[1], "scan", lambda error, over=over: over.set())
    for _ in rounds[1:]:
        assert listed.acquire(timeout=TIMEOUT_S)
    looks.run(lambda: [B], "scan")
    engine.go.set()
    for over in rounds:
        assert over.wait(TIMEOUT_S)
    assert not engine.overlapped
    assert 2 <= engine.looked_at[A] <= 11


def test_r5_a_failure_is_told_and_keeps_no_other_process_from_its_look(engine: Engine) -> None:
    class Fails(Engine):
        def reconcile(self, process: ProcessId, cause: str) -> None:
            self.looked_at[process] += 1
            if process.pid % 3 == 0:
                raise RuntimeError(f"odd {process.pid}")

    fails = Fails()
    with pytest.raises(RuntimeError, match="odd"):
        Looks(fails).run(lambda: [ProcessId(n, 1) for n in range(50)], "scan")
    assert set(fails.looked_at.values()) == {1}
    assert len(fails.looked_at) == 50
    with pytest.raises(ZeroDivisionError):
        Looks(fails).run(lambda: [ProcessId(1 // 0, 1)], "scan")


@needs.ptrace
@pytest.mark.parametrize("end", ["lease", "shutdown"])
def test_r6_a_hung_look_keeps_neither_others_nor_the_end_from_working(
    tracer: Tracer, engine: Engine, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    """A real control thread with an engine that hangs in one process."""
    tracer._engine, tracer._looks = engine, Looks(engine)  # type: ignore[assignment]
    plans = {A: SitePlan(0, FileKey("0:1", 1), "/a", 16, b"\x55"), B: SitePlan(0, FileKey("0:1", 2), "/b", 16, b"\x55")}
    monkeypatch.setattr(tracer._table, "candidates", lambda consumer: [p for p in plans if plans[p] in _of(consumer)])
    monkeypatch.setattr(tracer._table, "concerned", lambda consumer, _: [p for p in plans if plans[p] in _of(consumer)])
    agent = socket.socket(socket.AF_UNIX)
    agent.settimeout(TIMEOUT_S)
    agent.connect("s")

    def converse() -> str:
        _say(agent, m.Hello(agent_pid=1, host="h", lease_s=0.3 if end == "lease" else 30.0))
        _say(agent, m.Register(id=1, probe="a", generation=1, sites=["s"], plans=[plans[A]]))
        assert engine.entered.wait(TIMEOUT_S)
        _say(agent, m.Register(id=2, probe="b", generation=1, sites=["s"], plans=[plans[B]]))
        _until(agent, m.Done(id=2))
        _say(agent, m.Unregister(id=3, probe="b"))
        _until(agent, m.Done(id=3))
        if end == "lease":
            _until(agent, m.LeaseEnded())
        else:
            _say(agent, m.Shutdown(id=4))
            _until(agent, m.Done(id=4))
        return "it hangs still" if not engine.go.is_set() and engine.looked_at == {B: 2} else str(engine.looked_at)

    with ThreadPoolExecutor(1) as pool, agent:
        said = pool.submit(converse)
        said.add_done_callback(lambda _: tracer._post(tracer._stop))
        tracer.run()  # ends, since it is asked to
        assert said.result(TIMEOUT_S) == "it hangs still"
    assert engine.closed
    assert tracer._table.consumers == ()


def _of(consumer: object) -> list[SitePlan]:
    return list(consumer.plans.values())  # type: ignore[attr-defined]


def _say(agent: socket.socket, message: m.Message) -> None:
    agent.sendall(m.frame(message))


def _until(agent: socket.socket, message: m.Message) -> None:
    received = b""
    while m.frame(message) not in received:
        data = agent.recv(1 << 16)
        assert data, f"no {message} in {received!r}"
        received += data
