"""The coverage log of a probe: when each process was armed, by which hook, and whether calls may have been missed."""

from __future__ import annotations

import copy
from collections import deque

from trapline_agent.tracer.messages import CoverageEntry, TargetState

Key = tuple[int, int, int, int]
"""Of a target: (pid, start time, site, address)."""
MAX_ENTRIES = 1000
"""That a probe keeps, and that wait to be sent."""


class CoverageLog:
    """Of one probe. The caller locks."""

    def __init__(self) -> None:
        self._entries: deque[CoverageEntry] = deque(maxlen=MAX_ENTRIES)
        self._count = 0
        """Entries so far, those that were forgotten included."""
        self.pending: dict[int, CoverageEntry] = {}
        """Entries that are new or have ended since ``take``, by number."""
        self._open: dict[Key, CoverageEntry] = {}
        """Of targets that are armed now."""

    def begin(self, key: Key, target: TargetState) -> None:
        """Enters that a target is armed; or (``state`` gone) that it was not when it was due."""
        entry = CoverageEntry(
            number=self._count,
            pid=target.pid,
            start_time=target.start_time,
            comm=target.comm,
            site=target.site,
            path=target.path,
            addr=target.addr,
            cause=target.cause,
            hook=target.hook,
            begun_ns=target.since_ns,
            may_have_missed=target.may_have_missed,
            message=target.message,
        )
        self._count += 1
        self._entries.append(entry)
        self.pending[entry.number] = entry
        if target.state == "armed":
            self._open[key] = entry
        else:
            entry.ended_ns = target.since_ns
        while len(self.pending) > MAX_ENTRIES:
            del self.pending[next(iter(self.pending))]

    def __contains__(self, key: Key) -> bool:
        """Whether a target is entered as armed now."""
        return key in self._open

    def end(self, key: Key, at_ns: int) -> None:
        """Enters that a target is armed no more; ``at_ns`` is CLOCK_REALTIME."""
        entry = self._open.pop(key, None)
        if entry is not None:
            entry.ended_ns = at_ns
            self.pending[entry.number] = entry

    def tell_again(self) -> None:
        """All of it is news again: to another agent than the one that was told."""
        self.pending = {entry.number: entry for entry in self._entries}

    def take(self) -> list[CoverageEntry]:
        """Returns the entries that are new or have ended since the last call."""
        unsent, self.pending = self.pending, {}
        return [copy.copy(entry) for entry in unsent.values()]
