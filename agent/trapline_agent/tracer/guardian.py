"""The guardian: a process that waits for the tracer to be killed, and takes out then what it left (semantics S2).

When a tracer is killed the kernel lets its tracees go, with our breakpoints in them, and nobody takes a trap any more: the
next thread to meet one ends its program. So this is about the time until the bytes are back:

- it is told by the kernel when the first thread of the tracer begins to die (``kernel.robust``), before the tracees are let
  go, and milliseconds before the tracer's socket is closed or its pidfd is readable;
- it has the descriptors of all memory that has a breakpoint in it, so that nothing is to be opened or looked up: two calls
  to the kernel for each;
- its memory is locked, and it runs before everybody else, where it may.

That is the first pass. When the tracer is gone altogether a second one looks at everything again, by /proc: a call of the
tracer may have been on its way still; a record may be of a memory whose descriptor did not come; and a child may have been
born that nobody was told of. Semaphores of USDT probes are lowered then, where the breakpoint was taken out.
Records of what is in order then are cleared; others are left to the next tracer.

It holds the lock of the journal, which it has of the tracer: no other tracer begins before it is done. It ends with it, by
its own alarm where a process hangs.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import mmap
import os
import select
import signal
import socket
import sys
import threading
from collections.abc import Iterable

from trapline_agent.engines import journal
from trapline_agent.engines.journal import Entry
from trapline_agent.engines.restoring import Outcome, claims, lower, restore, restore_all, restore_by_name
from trapline_agent.kernel import process, robust

log = logging.getLogger(__name__)

LIMIT_S = 5
"""So long it takes to be done at most, after the tracer was killed."""
PRIORITY = 50
NAME = "trapline-guard"
"""Of the process when it is ready."""
_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
"""A terminal's and a supervisor's: for the tracer, which takes everything out and then ends us."""


class Guardian:
    """See the module."""

    def __init__(self, tracer: socket.socket, file: int, tracer_pidfd: int) -> None:
        """
        Args:
            tracer: tells of memory (``journal.FD``); datagrams.
            file: the journal.
            tracer_pidfd: of the tracer.
        """
        self._socket = tracer
        self._file = file
        self._pidfd = tracer_pidfd
        self._memory: dict[int, int] = {}
        self._restored: set[tuple[int, int]] = set()
        """(space, address) of what the first pass has put back."""
        self._watch = robust.DeathWatch(mmap.mmap(file, journal.HEADER_BYTES), journal.WATCH_OFFSET)
        self._boot, self._namespace = journal.boot_id(), journal.pid_namespace()

    def run(self) -> None:
        """Returns when the tracer has ended, and what it left is out."""
        threading.Thread(target=self._listen, name="trapline-memory", daemon=True).start()
        try:
            self._watch.wait()
        except OSError as e:
            log.warning("there is no waiting for mutexes here (%s): breakpoints stay some milliseconds longer", e)
            select.select([self._pidfd], [], [])
        signal.alarm(LIMIT_S)
        # From now on this is about microseconds: first what can be done without asking anything.
        self._first_pass()
        select.select([self._pidfd], [], [])
        self._second_pass()

    def _listen(self) -> None:
        """Keeps the descriptors that the tracer sends."""
        while True:
            try:
                data, fds, _, _ = socket.recv_fds(self._socket, journal.FD.size, 1, socket.MSG_CMSG_CLOEXEC)
            except OSError:
                return
            if len(data) < journal.FD.size:
                return
            space, there = journal.FD.unpack(data)
            before = self._memory.pop(space, None)
            if there and fds:
                self._memory[space] = fds[0]
            if before is not None:
                os.close(before)

    def _entries(self) -> list[tuple[int, Entry]]:
        data = os.pread(self._file, os.fstat(self._file).st_size, 0)
        return journal.parse(data, self._boot, self._namespace).entries

    def _first_pass(self) -> None:
        memory = self._memory
        groups: dict[int, list[Entry]] = {}
        for _, entry in self._entries():
            groups.setdefault(entry.space, []).append(entry)
        for space in sorted(groups, key=lambda space: space not in memory):
            others = claims(groups[space])
            fd = memory.get(space)
            for entry in groups[space]:
                outcome = restore_by_name(entry, others) if fd is None else restore(entry, fd, others)
                if outcome is Outcome.RESTORED:
                    self._restored.add((space, entry.addr))

    def _second_pass(self) -> None:
        """Looks at all of it again, and clears what is in order."""
        contents = self._entries()
        for _, entry in contents:
            # Only now: the tracer may have been about to do it.
            if (entry.space, entry.addr) in self._restored:
                lower(entry, self._memory.get(entry.space, -1))
        numbers = {entry: number for number, entry in contents}
        left = []
        for entry, outcome in self._outcomes(numbers):
            if outcome is Outcome.FAILED:
                left.append(entry)
            elif entry in numbers:
                os.pwrite(self._file, b"\0\0\0\0", journal.HEADER_BYTES + numbers[entry] * journal.RECORD.size)
        report(left, "the next tracer tries again")

    def _outcomes(self, entries: Iterable[Entry]) -> Iterable[tuple[Entry, Outcome]]:
        by_space: dict[int, list[Entry]] = {}
        for entry in entries:
            by_space.setdefault(entry.space, []).append(entry)
        unsure: list[Entry] = []
        for space, group in by_space.items():
            others = claims(group)
            for entry in group:
                fd = self._memory.get(space)
                outcome = Outcome.UNSURE if fd is None else restore(entry, fd, others)
                if outcome in (Outcome.UNSURE, Outcome.FAILED):
                    unsure.append(entry)
                else:
                    if outcome is Outcome.RESTORED and fd is not None:
                        lower(entry, fd)
                    yield entry, outcome
        yield from restore_all(unsure, kin_of=entries)


def report(left: Iterable[Entry], then: str) -> None:
    """Says which breakpoints could not be taken out."""
    for entry in left:
        where = f"the breakpoint at {entry.addr:#x} of process {entry.pid}"
        log.error("%s could not be taken out after its tracer was killed; %s", where, then)


def main() -> None:
    """``python -m trapline_agent.tracer.guardian SOCKET JOURNAL PIDFD``: descriptors that it has of the tracer."""
    logging.basicConfig(format="%(asctime)s trapline-guardian %(levelname)s %(message)s", stream=sys.stderr)
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    tracer, file, pidfd = (int(arg) for arg in sys.argv[1:4])
    guardian = Guardian(socket.socket(fileno=tracer), file, pidfd)
    # All of these only make it quicker: where they are not permitted it does without.
    with contextlib.suppress(OSError):
        process.lock_memory(future=False)
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(PRIORITY))
    except OSError:
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, 0, -20)
    gc.disable()
    process.set_name(NAME)
    guardian.run()


if __name__ == "__main__":
    main()
