"""Breaks a deadlock that a seize can run into.

A thread in execve holds ``cred_guard_mutex`` while it waits for the other threads of its process to be gone (fs/exec.c,
de_thread), which they are when their tracer has reaped them. PTRACE_SEIZE of another thread of that process waits for the
same mutex (kernel/ptrace.c, ptrace_attach): on the one thread that would reap. So another thread of ours does, when a seize
takes longer than it should; without __WNOTHREAD any may (wait(2)).
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator

from trapline_agent.kernel import procfs, ptrace

_PATIENCE_S = 0.05


class Reaper:
    """One for the engine; its thread sleeps while nobody seizes."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._seizing: dict[int, tuple[int, list[int]]] = {}
        self._thread: threading.Thread | None = None

    @contextlib.contextmanager
    def seizing(self, pid: int) -> Iterator[list[int]]:
        """To be around the seizing of a process' threads, on any thread; yields the list of those that were reaped."""
        reaped: list[int] = []
        me = threading.get_ident()
        with self._changed:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="trapline-reap", daemon=True)
                self._thread.start()
            self._seizing[me] = (pid, reaped)
            self._changed.notify()
        try:
            yield reaped
        finally:
            with self._changed:
                del self._seizing[me]

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._seizing:
                    self._changed.wait()
                before = dict(self._seizing)
                self._changed.wait(_PATIENCE_S)
                late = [v for k, v in before.items() if self._seizing.get(k) is v]
            for pid, reaped in late:
                self._reap(pid, reaped)

    def _reap(self, pid: int, reaped: list[int]) -> None:
        with contextlib.suppress(OSError):
            for tid in procfs.tasks(pid):
                if tid != pid and procfs.has_ended(pid, tid):
                    with contextlib.suppress(ChildProcessError):
                        if os.waitpid(tid, os.WNOHANG | ptrace.WALL)[0] == tid:
                            reaped.append(tid)
