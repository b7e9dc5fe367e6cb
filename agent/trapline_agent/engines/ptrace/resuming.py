"""Letting a stopped thread go on, as the program expects it: with its signal, or in its group-stop; or for good.

All methods run on the tracer thread.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable

from trapline_agent.engines.ptrace.group import Group
from trapline_agent.engines.ptrace.stepping import Stepper
from trapline_agent.engines.ptrace.tracee import Thread
from trapline_agent.kernel import ptrace

SIGTRAP_STOP = signal.SIGTRAP << 8 | 0x7F
"""The wait status of a thread that stopped with SIGTRAP."""
GROUP_STOPS = frozenset((signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU))


class Resumer:
    """See the module."""

    def __init__(self, group: Group, stepper: Stepper, serve: Callable[[int, int], object]) -> None:
        """``serve`` serves (tid, wait status) of another stop, not SIGTRAP's, that came as a thread was to go on."""
        self._group = group
        self._stepper = stepper
        self._serve = serve

    def resume(self, thread: Thread, sig: int = 0) -> None:
        """Lets a thread run, with a signal or with none (0); for good where its process is released."""
        if thread.process.released:
            self._detach(thread, sig)
            return
        if thread.stop_again:
            thread.stop_again = False
            ptrace.interrupt(thread.tid)
        ptrace.cont(thread.tid, sig)

    def _detach(self, thread: Thread, sig: int) -> None:
        ptrace.detach(thread.tid, sig)
        process = thread.process
        self._group.drop(process, thread.tid)
        if not process.threads:
            self._group.forget(process, None)

    def deliver(self, thread: Thread, sig: int) -> None:
        """Lets a stopped thread go on with a signal, or with none (0); a handler never sees an address inside a slot."""
        later = self._stepper.leave_slot(thread, sig)
        if later in (0, SIGTRAP_STOP):
            self.resume(thread, sig)
        else:
            self._serve(thread.tid, later)

    def leave_stop(self, thread: Thread, stop: int) -> None:
        """Ends a PTRACE_EVENT_STOP: a group stop goes on as the program's own."""
        if stop not in GROUP_STOPS:
            if not thread.listening:
                self.begin_again(thread, 0)  # who was stopped by job control sees EINTR, as without us
            thread.listening = False
            self.deliver(thread, 0)
            return
        # It may be let go in this stop, and the slots with it.
        thread.settled = self._stepper.step_aside(thread)
        if thread.process.released:
            self._detach(thread, 0)
        else:
            thread.listening = True
            ptrace.listen(thread.tid)

    def begin_again(self, thread: Thread, sig: int) -> None:
        """As ``Stepper.begin_again``, where that can be done."""
        with contextlib.suppress(OSError, KeyError):  # what cannot be looked at is left as the kernel has it
            self._stepper.begin_again(thread, sig)
