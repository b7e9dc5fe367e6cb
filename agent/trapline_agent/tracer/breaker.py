"""The overhead breaker: what a probe may cost the programs, and what is done where it costs more (semantics S4).

Pure: it is told what each point has cost since the last look, and says which points are to be left out for now.
``tracer.guard`` joins it to the table and the engine.

A *fuse* guards one budget: a probe's, a process', or the host's. It is a token bucket of time. Each second puts ``share``
seconds of a CPU's time in, up to ``burst_s``; what the probes add to the programs' time is taken out. So in any time T no
more than ``burst_s + share * T`` is added, and a burst that fits costs no hit::

              empty                    empty for the MAX_CUTS-th time
      ARMED ---------> THROTTLED -------------------------------------> TRIPPED
        ^                |   ^                                             |
        +----------------+   +---------------------------------------------+
          RESUME * burst_s         after a cool-down, twice as long each time
           saved up again

*Throttled*, the heaviest points are left out while the bucket is empty, until it holds what about a second gives; then they
are in again, until it is empty again. *Tripped*, they are left out for the whole cool-down. The two marks, empty and
``RESUME``, are what keeps it from flapping: a fuse that is armed again has ``RESUME * burst_s`` to spend before it can be
throttled, and had to save that before.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple

from trapline_agent.engines.base import ProcessId
from trapline_agent.plans import FileKey
from trapline_agent.tracer.messages import DEFAULT_BUDGETS, Budgets

MAX_CUTS = 30
"""Times that a throttled fuse may find its bucket empty before it trips: half a minute of a hot loop."""
RESUME = 0.5
"""Share of the burst that has to be saved up before a fuse is armed again."""
FIRST_COOL_DOWN_S = 30.0
MAX_COOL_DOWN_S = 600.0
_SLICE_S = 1.0
"""How long the budget is saved up before a throttled point gets its turn: a turn is ``share`` of it, or longer."""
_QUIET = 0.5
"""Share of a budget that points which are not among the heaviest may go on using."""
_MEMORY_S = 0.2
"""Time constant of the points' rates."""
_NOTHING = 1e-6
"""Seconds a second below which a point is forgotten."""


class Point(NamedTuple):
    """One instruction in one process."""

    process: ProcessId
    addr: int
    file: FileKey
    offset: int


class Load(NamedTuple):
    """What the traps at a point have added to its process' time since the last look."""

    point: Point
    probes: tuple[str, ...]
    """Whose consumers are there."""
    seconds: float


class State(IntEnum):
    """Of a fuse; the greater, the graver."""

    ARMED = 0
    THROTTLED = 1
    TRIPPED = 2

    @property
    def text(self) -> str:
        return self.name.lower()


class Fuse:
    """One budget; see the module. Times are in seconds of any monotonic clock.

    Attributes:
        share: seconds of a CPU's time that may be added each second.
        burst_s: seconds that may be saved up.
        level: seconds that are left; negative where more was spent than there was.
        cut: the points that are left out now.
        blamed: the points that were cut since it was last armed.
    """

    def __init__(self, share: float, burst_s: float) -> None:
        self.share = share
        self.burst_s = burst_s
        self.level = burst_s
        self.state = State.ARMED
        self.cut: frozenset[Point] = frozenset()
        self.blamed: set[Point] = set()
        self.demand = 0.0
        """Seconds a second that were asked for when it was last cut."""
        self.resumes_at = math.inf
        self.out_s = 0.0
        """The last cool-down."""
        self._rates: dict[Point, float] = {}
        self._cuts = 0
        self._trips = 0

    @property
    def quantum(self) -> float:
        """What a throttled point's turn begins with."""
        return min(self.share * _SLICE_S, self.burst_s * RESUME)

    @property
    def calm(self) -> bool:
        """Whether it has nothing to remember."""
        return self.state is State.ARMED and self.level >= self.burst_s and not self._rates

    def step(self, now: float, dt: float, spent: Mapping[Point, float], beside: float = 0.0) -> None:
        """Takes what was spent in the last ``dt`` seconds, by point, and ``beside`` it what no point is to blame for."""
        self.level = min(self.burst_s, self.level + self.share * dt - sum(spent.values()) - beside)
        self._remember(dt, spent)
        if self.state is State.TRIPPED:
            # Nothing is saved up meanwhile: afterwards it is on probation.
            self.level = min(self.level, self.quantum)
            if now >= self.resumes_at:
                self.state, self._cuts, self.resumes_at = State.THROTTLED, 0, math.inf
                self.cut = frozenset()
            elif self.level < 0:
                self._cut_more()
        elif self.cut:
            if self.level < 0:
                self._cut_more()
            elif self.level >= self.quantum:
                self.cut = frozenset()
        elif self.level < 0:
            self.demand = max(sum(self._rates.values()), sum(spent.values()) / dt if dt > 0 else 0.0)
            if self._cut_more():
                self._count_cut(now)
        elif self.state is State.THROTTLED and self.level >= self.burst_s * RESUME:
            self.state, self._cuts, self._trips = State.ARMED, 0, 0
            self.blamed.clear()

    def forget(self, process: ProcessId) -> None:
        """A process has ended."""
        for point in [p for p in self._rates if p.process == process]:
            del self._rates[point]
        self.blamed = {p for p in self.blamed if p.process != process}
        self.cut = frozenset(p for p in self.cut if p.process != process)

    def _remember(self, dt: float, spent: Mapping[Point, float]) -> None:
        """Keeps each point's rate; of one that is cut, the rate that it was cut for."""
        if dt <= 0:
            return
        weight = 1 - math.exp(-dt / _MEMORY_S)
        for point in {*self._rates, *spent}:
            if point in self.cut:
                continue
            before = self._rates.get(point, 0.0)
            rate = before + weight * (spent.get(point, 0.0) / dt - before)
            if rate > _NOTHING:
                self._rates[point] = rate
            else:
                self._rates.pop(point, None)

    def _cut_more(self) -> bool:
        """Cuts the heaviest points until the others fit well into the budget; returns whether there were any."""
        running = sorted(((rate, p) for p, rate in self._rates.items() if p not in self.cut), reverse=True)
        rest = sum(rate for rate, _ in running)
        chosen: set[Point] = set()
        for rate, point in running:
            if rest <= self.share * _QUIET:
                break
            chosen.add(point)
            rest -= rate
        self.cut |= chosen
        self.blamed |= chosen
        return bool(chosen)

    def _count_cut(self, now: float) -> None:
        self._cuts += 1
        if self._cuts <= MAX_CUTS:
            self.state = State.THROTTLED
            return
        self.state = State.TRIPPED
        self.out_s = min(FIRST_COOL_DOWN_S * 2.0**self._trips, MAX_COOL_DOWN_S)
        self.resumes_at = now + self.out_s
        self._trips += 1


class Verdict(NamedTuple):
    """What is to be done about a point, or about one probe's interest in it."""

    state: State
    out: bool
    """It is to be left out now."""
    message: str


@dataclass(frozen=True)
class Verdicts:
    """An answer of the breaker: points that it says nothing of are as they are wanted."""

    common: Mapping[Point, Verdict] = field(default_factory=dict)
    """Whatever the probe: by the budgets of process and host."""
    own: Mapping[tuple[Point, str], Verdict] = field(default_factory=dict)
    """By the budget of a probe."""

    def of(self, point: Point, probe: str) -> Verdict | None:
        """Returns what is to be done; None: nothing."""
        return _graver(self.common.get(point), self.own.get((point, probe)))

    def without(self, probe: str) -> Verdicts:
        """Returns it as it is without a probe."""
        return Verdicts(self.common, {key: v for key, v in self.own.items() if key[1] != probe})

    def points(self) -> set[Point]:
        return {*self.common, *(point for point, _ in self.own)}

    def differ(self, other: Verdicts) -> set[ProcessId]:
        """Returns the processes in which the other answer leaves out something else."""
        ours, theirs = self._out(), other._out()
        return {point.process for point, _ in ours ^ theirs}

    def _out(self) -> set[tuple[Point, str]]:
        return {(p, "") for p, v in self.common.items() if v.out} | {key for key, v in self.own.items() if v.out}

    def __bool__(self) -> bool:
        return bool(self.common or self.own)


def _graver(one: Verdict | None, other: Verdict | None) -> Verdict | None:
    if one is None or other is None:
        return one or other
    graver = max(one, other, key=lambda v: v.state)
    return Verdict(graver.state, one.out or other.out, graver.message)


class Breaker:
    """All fuses of a tracer. Belongs to one thread."""

    def __init__(self, now: float, budgets: Budgets = DEFAULT_BUDGETS) -> None:
        self.budgets = budgets
        self._now = now
        self._probes: dict[str, Fuse] = {}
        self._processes: dict[ProcessId, Fuse] = {}
        self._host: Fuse | None = None

    @property
    def pressed(self) -> bool:
        """Whether a budget is so far used up that it has to be looked at more often."""
        return any(f.state is not State.ARMED or f.level < f.burst_s * RESUME for f in self._fuses())

    def _fuses(self) -> Iterable[Fuse]:
        yield from self._probes.values()
        yield from self._processes.values()
        if self._host is not None:
            yield self._host

    def step(
        self, now: float, loads: Sequence[Load], shares: Mapping[str, float | None], cpu_s: float = 0.0
    ) -> Verdicts:
        """Looks at what was spent since the last look.

        Args:
            now: seconds of a monotonic clock.
            loads: the points that cost something.
            shares: the probes there are, and the budget of each: None the usual one, 0 none.
            cpu_s: CPU time that the tracer used meanwhile. Beyond what the traps cost it counts for the host alone, and at
                most as much again: work that is not for hits cannot be saved by leaving some out.

        Returns:
            What is to be left out from now on.
        """
        dt, self._now = now - self._now, now
        self._set_up(shares, loads)
        for probe, fuse in self._probes.items():
            fuse.step(now, dt, {load.point: load.seconds for load in loads if probe in load.probes})
        by_process: dict[ProcessId, dict[Point, float]] = {}
        for load in loads:
            by_process.setdefault(load.point.process, {})[load.point] = load.seconds
        for process, fuse in list(self._processes.items()):
            fuse.step(now, dt, by_process.get(process, {}))
            if fuse.calm:
                del self._processes[process]
        if self._host is not None:
            spent = {load.point: load.seconds for load in loads}
            total = sum(spent.values())
            self._host.step(now, dt, spent, beside=min(max(0.0, cpu_s - total), total))
        return self._verdicts()

    def forget(self, process: ProcessId) -> None:
        """A process has ended: the budget of its own goes with it; of others it has used what it has used."""
        self._processes.pop(process, None)
        for fuse in (*self._probes.values(), *((self._host,) if self._host is not None else ())):
            fuse.forget(process)

    def _set_up(self, shares: Mapping[str, float | None], loads: Sequence[Load]) -> None:
        budgets = self.budgets
        wanted = {probe: budgets.probe if share is None else share for probe, share in shares.items()}
        for probe in [p for p in self._probes if not wanted.get(p)]:
            del self._probes[probe]
        for probe, share in wanted.items():
            if share:
                self._probes[probe] = self._fitted(self._probes.get(probe), share)
        if not budgets.process:
            self._processes.clear()
        for process in {*self._processes, *(load.point.process for load in loads)} if budgets.process else ():
            self._processes[process] = self._fitted(self._processes.get(process), budgets.process)
        self._host = self._fitted(self._host, budgets.host) if budgets.host else None

    def _fitted(self, fuse: Fuse | None, share: float) -> Fuse:
        if fuse is None:
            return Fuse(share, self.budgets.burst_s)
        fuse.share, fuse.burst_s = share, self.budgets.burst_s
        return fuse

    def _verdicts(self) -> Verdicts:
        common: dict[Point, Verdict] = {}
        own: dict[tuple[Point, str], Verdict] = {}
        for process, fuse in self._processes.items():
            what = f"probes add {{}} to the time of process {process.pid}, which may have {{}}"
            common |= _verdicts_of(fuse, what)
        if self._host is not None:
            for point, verdict in _verdicts_of(
                self._host, "probes cost this host {}, of which they may have {}"
            ).items():
                common[point] = _graver(common.get(point), verdict) or verdict
        for probe, fuse in self._probes.items():
            what = "the probe adds {} to the time of programs, and may add {}"
            own |= {(point, probe): verdict for point, verdict in _verdicts_of(fuse, what).items()}
        return Verdicts(common, own)


def _verdicts_of(fuse: Fuse, what: str) -> dict[Point, Verdict]:
    if fuse.state is State.ARMED:
        return {}
    message = what.format(f"{fuse.demand:.0%} of a CPU", _percent(fuse.share))
    verdicts: dict[Point, Verdict] = {}
    for point in fuse.blamed:
        out = point in fuse.cut
        # Of a fuse that tripped, only what it holds out is; another one may have become quiet.
        tripped = fuse.state is State.TRIPPED and out
        verdicts[point] = Verdict(
            State.TRIPPED if tripped else State.THROTTLED,
            out,
            f"{message}: it is out for {fuse.out_s:.0f} s, and tried again then" if tripped else message,
        )
    return verdicts


def _percent(share: float) -> str:
    return f"{share * 100:.3g}%"
