"""Keeps the overhead breaker informed, and does as it says. On the control thread of the tracer, so that it works whatever
has become of the agent and the service."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable

from trapline_agent.engines.base import ProcessId
from trapline_agent.tracer.breaker import Breaker
from trapline_agent.tracer.messages import Budgets
from trapline_agent.tracer.table import Table

LOOK_S = 0.5
PRESSED_LOOK_S = 0.1
"""Between two looks when a budget is largely used up: a point in a hot loop has its turn for about as long."""


class Guard:
    """The breaker of one tracer."""

    def __init__(
        self,
        table: Table,
        look_at: Callable[[ProcessId, Callable[[], None]], None],
        *,
        clock: Callable[[], float] = time.monotonic,
        cpu_s: Callable[[], float] = time.process_time,
    ) -> None:
        """
        Args:
            table: what is spent, and what is left out.
            look_at: has a process brought to what the table wants, at its own pace, and then calls the function that it is
                given, on the control thread.
            clock: seconds, monotonic.
            cpu_s: CPU time that this process has used, in seconds.
        """
        self._table = table
        self._look_at = look_at
        self._clock = clock
        self._cpu_s = cpu_s
        self._cpu_before = cpu_s()
        self._breaker = Breaker(clock())
        self._next = 0.0

    @property
    def budgets(self) -> Budgets:
        return self._breaker.budgets

    @budgets.setter
    def budgets(self, budgets: Budgets) -> None:
        self._breaker.budgets = budgets

    @property
    def due(self) -> float:
        """When the next look is due."""
        return self._next if self._table.consumers or self._table.verdicts else math.inf

    def look(self) -> None:
        """Looks at what was spent since the last time, and makes what the breaker says so."""
        now, cpu = self._clock(), self._cpu_s()
        self._next = now + LOOK_S  # if this look fails
        for process in self._table.meters.take_ended():
            self._breaker.forget(process)
        verdicts = self._breaker.step(
            now,
            self._table.meters.take(),
            {c.probe: c.register.overhead for c in self._table.consumers},
            cpu - self._cpu_before,
        )
        self._cpu_before = cpu
        before = self._table.verdicts
        if verdicts or before:
            began = time.monotonic_ns()
            self._table.judge(verdicts)
            points = before.points() | verdicts.points()
            differing = before.differ(verdicts)
            if staying := [p for p in points if p.process not in differing]:
                self._table.settle(staying, began)
            for process in differing:
                theirs = [p for p in points if p.process == process]
                self._look_at(process, functools.partial(self._table.settle, theirs, began))
        self._next = self._clock() + (PRESSED_LOOK_S if self._breaker.pressed else LOOK_S)
