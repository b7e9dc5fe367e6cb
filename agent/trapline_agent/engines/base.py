"""The protocol between the uprobe table and an engine.

The protocol is level-triggered. The table (an ``Observer``) answers one question, *what is wanted in this process now*, and
an engine has one verb, ``reconcile``: bring the process to that state. Register, unregister, a new mapping, a fork, an exec
and a retry are all the same call, so that each is idempotent and a lost or doubled event is harmless.

An engine that traps (ptrace) calls a site's sinks at each hit. One that fills rings elsewhere (kernel uprobes, in-process
trampolines) keeps the sinks' ``HitRing`` and extends it in bulk when it drains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from trapline_agent.capture.compute import Floats
from trapline_agent.capture.evaluate import Kept
from trapline_agent.plans import FileKey, SitePlan


@dataclass(frozen=True)
class Capabilities:
    """What an engine can do on this host; found out by trying."""

    name: str
    available: bool
    reason: str = ""
    """Why not, or what is restricted."""
    traps: bool = True
    """A hit is served while the thread stands at the instruction: registers and memory are those of the call, and the
    mechanics of traps matter to the program (signals, system calls, displaced instructions)."""


class ProcessId(NamedTuple):
    """A process, for as long as the host is up."""

    pid: int
    start_time: int
    """Clock ticks after boot (proc_pid_stat(5), field 22)."""


class Sink(Protocol):
    """Records one hit for one consumer. Called by the thread that serves the trap, in the traced thread's stop."""

    def __call__(self, ts: int, pid: int, tid: int, words: Sequence[int], memory: int, /) -> None:
        """
        Args:
            ts: CLOCK_MONOTONIC ns.
            pid: the process.
            tid: the thread.
            words: its registers (``arch`` order).
            memory: descriptor of its /proc/PID/mem; reads at an unmapped address raise OSError.
        """


class ReturnSink(Protocol):
    """Records the calls of one function for one consumer. Called as ``Sink`` is.

    Each ``enter`` is followed by one ``leave`` or one ``lose``, or the call is in flight still. A fork copies the calls that
    are in flight: the child's copies count (``inherit``) only if they return there.
    """

    def enter(self, words: Sequence[int], memory: int, /) -> Kept:
        """Takes a call at its entry; ``words`` and ``memory`` as in ``Sink``. Returns what it keeps for ``leave``."""

    def leave(
        self, ts: int, pid: int, tid: int, words: Sequence[int], memory: int, latency_ns: int, kept: Kept, /
    ) -> None:
        """Takes a call at its return.

        Args:
            ts, pid, tid, words, memory: as in ``Sink``, at the instruction that it returned to.
            latency_ns: from when the thread was let go on at the entry to the trap at the return.
            kept: what ``enter`` returned.
        """

    def inherit(self) -> None:
        """A call that began in a parent process returns: comes just before its ``leave``."""

    def lose(self, reason: str, /) -> None:
        """A call that was entered will not be seen to return."""


@dataclass(eq=False, slots=True)
class Tally:
    """What one site of one process has cost: the overhead breaker goes by it. It outlives the breakpoint, which may be taken
    out and put back meanwhile."""

    traps: int = 0
    """Only ever counts up, by the one thread that serves the process; other threads may read it at any time."""


class Counter(NamedTuple):
    """The semaphore of a USDT probe in one address space: see ``plans.Semaphore``."""

    addr: int
    file: FileKey
    offset: int
    """In the file."""


@dataclass(frozen=True)
class SiteRequest:
    """One instruction that is wanted in one process."""

    addr: int
    plan: SitePlan
    sinks: tuple[Sink, ...] = ()
    returns: tuple[ReturnSink, ...] = ()
    """Who wants the calls of the function that begins here, when they return."""
    is_hook: bool = False
    """The engine's own look-out (the loader's ``_dl_debug_state``): each hit there reconciles the process."""
    unwinds: bool = False
    """The engine's look-out for calls that are left: the C library's longjmp."""
    slack_addr: int = 0
    """Where the plan's slack is mapped executable in this process; 0 where it is not."""
    tally: Tally = field(default_factory=Tally)
    """Where the engine counts its traps, whoever records them."""
    refusal: tuple[str, str] | None = None
    """(reason, message) where this mapping may not be armed: writable or shared."""
    semaphore: Counter | None = None
    """To be raised by one while it is armed. Whether it is mapped, ``Wanted.holds`` says."""


@dataclass(frozen=True)
class Wanted:
    """Answer of the table about one process."""

    sites: list[SiteRequest] = field(default_factory=list)
    keep: bool = False
    """True: go on following it though nothing is wanted yet (it was chosen by name, or is held)."""
    still_mapped: Callable[[int, SitePlan], bool] = lambda addr, plan: True
    """Whether the plan's instruction is (still) mapped at an address, by the same snapshot of the mappings."""
    places: Callable[[SitePlan], Sequence[int]] = lambda plan: ()
    """Where the plan's instruction is mapped, by the same snapshot."""
    holds: Callable[[Counter], bool] = lambda counter: False
    """Whether a counter lies in its file's own writable private mapping, by the same snapshot."""


@dataclass(frozen=True)
class SiteReport:
    """What became of one site of one process."""

    addr: int
    plan: SitePlan
    state: str
    """``armed``, ``refused`` or ``gone``."""
    reason: str = ""
    message: str = ""


class Observer(Protocol):
    """What an engine asks and tells the table. Called from any of the engine's threads; must not call the engine back."""

    def wanted(self, process: ProcessId, cause: str, parent: ProcessId | None = None) -> Wanted:
        """Says what is wanted in a process, by its mappings now. ``parent`` is given at a fork. Raises ProcessLookupError
        when it is gone."""

    def place(self, process: ProcessId, addr: int) -> SiteRequest:
        """Says what is at an address that a call will return to, so that it can be armed.

        Raises:
            Unsupported: with the reason why it cannot be.
            ProcessLookupError: the process is gone.
        """

    def is_wanted(self, plan: SitePlan) -> bool:
        """Says whether anybody wants an instruction in any process; needs to look at none."""

    def report(self, process: ProcessId, reports: Iterable[SiteReport], cause: str) -> None:
        """Takes what changed in a process."""

    def missed(self, pid: int, file: FileKey, cause: str) -> None:
        """A process mapped a file and may have run what is wanted there before that could be armed, if it ever is."""

    def sampled(self, plan: SitePlan, held_ns: int) -> None:
        """Takes a sample of how long the engine held a thread for one hit of a site, in ns."""

    def exited(self, process: ProcessId, status: int | None) -> None:
        """A process that was followed ended (wait status where known) or was let go (None)."""


class Mapper(Protocol):
    """A thread that waits in a system call which maps a file, and goes on when the hook that holds it is told to."""

    event: str
    """``mmap``, or ``exec``: its new image has nothing mapped yet."""
    pid: int
    tid: int
    file: FileKey
    """What it maps."""
    deadline: float
    """CLOCK_MONOTONIC seconds after which it may have gone on by itself, and must not be stopped any more."""

    def cause(self) -> str:
        """Asked once it has gone on and was stopped: the cause of what is armed then."""


class Engine(Protocol):
    """Arms and disarms sites. Methods may be called from any thread but the engine's own, and from several at once: what has
    to be done one after the other in a process, or in those that share memory, the engine sees to."""

    @property
    def floats(self) -> Floats | None:
        """Reads the floating-point registers of a thread while its trap is served; None where they cannot be had."""

    def capabilities(self) -> Capabilities:
        """What it can do here."""

    def reconcile(self, process: ProcessId, cause: str) -> None:
        """Brings a process to what the observer wants there; returns when that is done and reported.

        Idempotent. After it returned, no handler of a sink that is no longer wanted runs in that process. A process that is
        gone is no error.
        """

    def processes(self) -> list[ProcessId]:
        """Processes that it follows now."""

    def close(self) -> None:
        """Takes everything out of every process and lets them go; may be used again. A process that hangs is left in the
        end, and logged."""
