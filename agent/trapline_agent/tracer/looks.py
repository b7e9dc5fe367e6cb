"""Looking at processes: what brings them to what the table wants, beside the control thread (docs/adr/0009).

A *round* is one look at all processes in which something changed: it lists them, has the engine reconcile each, and lists
again until there is none that it has not seen, since one may have been forked between the listing and the seize of its
parent. It begins after the table was changed (semantics R2), and whoever waits for it is told when it is over.

Rounds go on side by side, each in turn by one process, so that a long one holds up no short one (R6). A process is looked at
by one worker at a time, and all rounds that wait for the same look share it: looks are level-triggered, one that begins
after the table was changed is as good for each of them. A worker that hangs in a process holds up the rounds that have to do
with this process, and no others.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from trapline_agent.engines.base import Engine, ProcessId

log = logging.getLogger(__name__)

_WORKERS = 16
"""Looks at once. They wait for the kernel and for tracer threads rather than compute; so many processes may keep theirs
waiting before rounds that have nothing to do with these wait too."""
_MAX_PASSES = 100
"""Against a host that forks faster than we look; the periodic look goes on from there."""


@dataclass(eq=False)
class _Round:
    find: Callable[[], Iterable[ProcessId]]
    cause: str
    done: Callable[[Exception | None], None]
    pending: set[ProcessId] = field(default_factory=set)
    """To be looked at."""
    seen: set[ProcessId] = field(default_factory=set)
    looking: int = 0
    passes: int = 0
    error: Exception | None = None


class Looks:
    """The workers. Threads are started when they are needed, and end with the process."""

    def __init__(self, engine: Engine, workers: int = _WORKERS) -> None:
        self._engine = engine
        self._max = workers
        self._changed = threading.Condition()
        self._turn: deque[_Round] = deque()
        """Rounds with something to begin, the next one first."""
        self._busy: set[ProcessId] = set()
        self._behind: dict[ProcessId, list[_Round]] = {}
        """Rounds that ask for a process while it is looked at: that look may have begun before their change."""
        self._workers = 0
        self._idle = 0

    def begin(
        self,
        find: Callable[[], Iterable[ProcessId]],
        cause: str,
        done: Callable[[Exception | None], None] = lambda error: None,
    ) -> None:
        """Begins a round, and returns at once. Any thread.

        Args:
            find: lists the processes to be looked at; called on a worker, again after each pass. What is followed by then is
                left out of the later passes: it asked the table when it was adopted, after the change.
            cause: for the engine.
            done: called on a worker when it is over, with the first failure. A process that the kernel fails us at (OSError)
                is logged and is none; no failure keeps the other processes from being looked at.
        """
        with self._changed:
            self._turn.append(_Round(find, cause, done))
            self._wake()

    def run(self, find: Callable[[], Iterable[ProcessId]], cause: str) -> None:
        """Begins a round and waits until it is over. Raises what failed."""
        over = threading.Event()
        errors: list[Exception | None] = []

        def done(error: Exception | None) -> None:
            errors.append(error)
            over.set()

        self.begin(find, cause, done)
        over.wait()
        if errors[0] is not None:
            raise errors[0]

    def _wake(self) -> None:
        if not self._idle and self._workers < self._max:
            self._workers += 1
            threading.Thread(target=self._run, name="trapline-look", daemon=True).start()
        self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._turn:
                    self._idle += 1
                    self._changed.wait()
                    self._idle -= 1
                round = self._turn.popleft()
                process = round.pending.pop() if round.pending else None
                if round.pending:
                    self._turn.append(round)
                if self._turn:
                    self._wake()  # one more worker, for the next
                if process is None:
                    sharers = []
                elif process in self._busy:
                    self._behind.setdefault(process, []).append(round)
                    continue
                else:
                    self._busy.add(process)
                    sharers = [r for r in self._turn if r.cause == round.cause and process in r.pending]
                    for other in sharers:
                        other.pending.discard(process)
                        if not other.pending:
                            self._turn.remove(other)
                    sharers.append(round)
            if process is None:
                self._list(round)
            else:
                self._look(process, round.cause, sharers)

    def _list(self, round: _Round) -> None:
        """Lists what a round has not seen; a round for which there is none is over."""
        found: set[ProcessId] = set()
        try:
            if round.passes < _MAX_PASSES:
                found = set(round.find()) - round.seen
                if round.passes:
                    found -= set(self._engine.processes())
            else:
                log.warning("processes appear faster than they are looked at: the rest is left to the next look")
        except Exception as e:  # noqa: BLE001 - it is told to whoever waits
            round.error = round.error or e
        if not found:
            self._tell(round)
            return
        with self._changed:
            round.passes += 1
            round.seen |= found
            round.pending = found
            round.looking = len(found)
            self._turn.append(round)
            self._wake()

    def _look(self, process: ProcessId, cause: str, rounds: list[_Round]) -> None:
        error: Exception | None = None
        try:
            self._engine.reconcile(process, cause)
        except OSError as e:
            log.error("process %d could not be looked at: %s", process.pid, e)
        except Exception as e:  # noqa: BLE001 - it is told to whoever waits
            error = e
        with self._changed:
            self._busy.discard(process)
            for round in self._behind.pop(process, ()):
                if not round.pending:
                    self._turn.append(round)
                round.pending.add(process)
                self._wake()
            for round in rounds:
                round.error = round.error or error
                round.looking -= 1
                if not round.looking:
                    self._turn.append(round)  # to be listed again
                    self._wake()

    def _tell(self, round: _Round) -> None:
        try:
            round.done(round.error)
        except Exception:
            log.exception("what waited for a look failed")
