"""Who may begin to follow a process: one thread at a time in each address space.

Looks at processes go on side by side. Two threads that seized the threads of one process would each have a part of it, and
two that seized processes that share memory (vfork, CLONE_VM) would write into it without knowing of one another.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from trapline_agent.kernel import procfs, ptrace


class Attaching:
    """The processes that are being attached. Any thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._busy: dict[int, int] = {}
        """By pid: a thread that lived when it began."""
        self._paused = 0

    @contextlib.contextmanager
    def alone(self, pid: int, timeout: float | None = None) -> Iterator[None]:
        """To be around an attach: waits until nobody else is at this process, nor at one that shares its memory. Raises
        TimeoutError where that is not so within ``timeout`` s."""
        task = _live_task(pid)

        def free() -> bool:
            return not self._paused and not any(p == pid or _share_memory(t, task) for p, t in self._busy.items())

        with self._changed:
            if not self._changed.wait_for(free, timeout):
                raise TimeoutError(f"process {pid} is being attached to")
            self._busy[pid] = task
        try:
            yield
        finally:
            with self._changed:
                del self._busy[pid]
                self._changed.notify_all()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Lets no other attach begin; those that go on are not waited for."""
        with self._changed:
            self._paused += 1
        try:
            yield
        finally:
            with self._changed:
                self._paused -= 1
                self._changed.notify_all()

    def wait(self, timeout: float) -> bool:
        """Waits until none goes on, for ``timeout`` s at most; returns whether none does."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._busy, timeout)


def _live_task(pid: int) -> int:
    try:
        return procfs.live_task(pid)
    except OSError:
        return pid  # gone, or not to be known now: whoever attaches it finds out


def _share_memory(one: int, other: int) -> bool:
    try:
        return ptrace.same_address_space(one, other)
    except OSError:
        return False  # one of them has ended
