"""One tracer thread and the processes it follows: the only place that waits for them and lets them go on.

ptrace binds a tracee to the thread that seized it, and its forks and clones to the same thread. So each seized process
starts a group with a thread of its own, which blocks in waitpid and does everything for its group (semantics P10). Other
threads give it work with ``call``: the work is queued and a signal rings until it was taken, since a signal that comes just
before waitpid blocks would be lost.

The thread ends when nothing of ours is left in any of its processes; the kernel then detaches all of them without stopping
them (kernel/ptrace.c, exit_ptrace), which PTRACE_DETACH could not: it needs a stop, and a stop makes blocking system calls
return EINTR (semantics P5).

Here is what every stop passes through. What is done about it is elsewhere: ``hits`` serves SIGTRAPs, ``lifecycle`` births,
execs and ends, ``commands`` has what the engine wants, and ``resuming`` lets threads go on.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

from trapline_agent.arch.x86_64.registers import RIP
from trapline_agent.engines.base import Observer
from trapline_agent.engines.ptrace.arming import Arming
from trapline_agent.engines.ptrace.commands import Commands, Ended
from trapline_agent.engines.ptrace.directory import Directory
from trapline_agent.engines.ptrace.group import Group
from trapline_agent.engines.ptrace.hits import Hits
from trapline_agent.engines.ptrace.lifecycle import Lifecycle
from trapline_agent.engines.ptrace.pages import SlotPages
from trapline_agent.engines.ptrace.reaper import Reaper
from trapline_agent.engines.ptrace.resuming import GROUP_STOPS, SIGTRAP_STOP, Resumer
from trapline_agent.engines.ptrace.stepping import Stepper
from trapline_agent.kernel import ptrace
from trapline_agent.kernel.robust import DeathWatch

log = logging.getLogger(__name__)
T = TypeVar("T")

DOORBELL = signal.SIGUSR1
_TRIES = 3
"""How often something is tried that fails for want of memory, descriptors and the like."""


class _Command(Generic[T]):
    def __init__(self, run: Callable[[], T]) -> None:
        self._run = run
        self.taken = threading.Event()
        self._done = threading.Event()
        self._result: T | None = None
        self._error: BaseException | None = None

    def execute(self) -> None:
        self.taken.set()
        try:
            self._result = self._run()
        except BaseException as e:  # noqa: BLE001 - it is raised again where the command was given
            self._error = e
        self._done.set()

    def fail(self, error: BaseException) -> None:
        self._error = error
        self.taken.set()
        self._done.set()

    def result(self) -> T:
        self._done.wait()
        if self._error is not None:
            raise self._error
        return self._result  # type: ignore[return-value] # None only where T is None


class TraceThread(threading.Thread):
    """See the module. Methods that begin with an underscore run on the thread itself."""

    def __init__(self, engine: Directory, observer: Observer, reaper: Reaper, watch: DeathWatch | None = None) -> None:
        super().__init__(name="trapline-trace", daemon=True)
        self._engine = engine
        self._watch = watch
        self._lock = threading.Lock()
        self._queue: deque[_Command[object]] = deque()
        self._wake = threading.Event()
        self._ended = False
        self._closing = False
        self._waiter = ptrace.Waiter()
        registers = self._registers = ptrace.RegisterFile()
        group = self._group = Group(
            self._waiter,
            reaper,
            self._handle,
            lambda process: engine.adopted(process, self),
            engine.forgot,
            hurried=lambda: bool(self._queue),
        )
        stepper = self._stepper = Stepper(registers, self._waiter)
        pages = SlotPages(registers, self._waiter)
        resumer = self._resumer = Resumer(group, stepper, self._other)
        arming = self._arming = Arming(group, pages, observer, engine.again)
        self._hits = Hits(registers, stepper, pages, group, arming, resumer, observer, engine.again, self._handle)
        self._lifecycle = Lifecycle(stepper, group, arming, resumer, observer, engine, self._handle)
        self.commands = Commands(group, arming, resumer, observer, engine.again)
        """To be run by ``call``."""

    # --- from other threads ------------------------------------------------------------------------------------------

    def call(self, run: Callable[[], T]) -> T:
        """Runs something on this thread, and returns or raises what it does. Raises Ended."""
        command = _Command(run)
        with self._lock:
            if self._ended:
                raise Ended
            self._queue.append(command)  # type: ignore[arg-type] # the deque does not read results
        pause = 0.001
        while not command.taken.is_set():
            self.ring()
            command.taken.wait(pause)
            pause = min(2 * pause, 0.05)  # it is at work, or hangs
        return command.result()

    def ring(self) -> None:
        """Wakes it, to see what there is to do; the ring may be lost."""
        self._wake.set()
        with contextlib.suppress(ProcessLookupError):
            ptrace.thread_kill(os.getpid(), self.native_id or 0, DOORBELL)

    def wait_gone(self) -> None:
        """Waits until the kernel's thread has ended too: only that lets its tracees go, later than Python's thread ends."""
        while self.native_id is not None and os.path.exists(f"/proc/self/task/{self.native_id}"):
            os.sched_yield()

    @property
    def ended(self) -> bool:
        """It takes no more commands, and is letting its tracees go or has done so."""
        return self._ended

    # --- the thread --------------------------------------------------------------------------------------------------

    def run(self) -> None:
        held = self._watch.hold() if self._watch is not None else None
        try:
            self._run()
        finally:
            if self._watch is not None:
                self._watch.let_go(held)

    def _run(self) -> None:
        try:
            while not self._finished():
                tid, status = self._waiter.wait()
                # Hits change nothing of what is looked after below, and who wants something rings: they are served in a row.
                while tid > 0 and self._serve(tid, status) and not self._wake.is_set():
                    tid, status = self._waiter.wait()
                if tid < 0:
                    for process in list(self._group.processes.values()):
                        self._group.forget(process, None)
                    if not self._finished():
                        self._wake.wait()
                self._take_commands()
                try:
                    self._release_idle()
                except OSError:
                    log.exception("what nothing is wanted in cannot be let go yet")
        except BaseException:
            log.exception("tracer thread failed; its processes are let go")
            self.commands.take_out()
            raise
        finally:
            with self._lock:
                self._ended = True
                rest = list(self._queue)
                self._queue.clear()
            for process in list(self._group.processes.values()):
                self._group.forget(process, None)
            for command in rest:
                command.fail(Ended())

    def _serve(self, tid: int, status: int) -> bool:
        """Serves a stop, and with several threads all others that wait too, in turn: waitpid goes by the kernel's list, and
        one thread's next hit would overtake the others for ever. Returns whether all of them were hits of probes."""
        if len(self._group.threads) <= 2:
            return self._handle(tid, status)
        changes = [(tid, status)]
        while (change := self._waiter.wait(block=False))[0] > 0:
            changes.append(change)
        hits = [self._handle(*change) for change in changes]
        return all(hits)

    def _finished(self) -> bool:
        with self._lock:
            if self._queue:
                return False
            if self._closing and not self._lifecycle.expects_children():
                # no command can be added after this: ``call`` looks under the same lock
                self._ended = True
                return True
            return False

    def _release_idle(self) -> None:
        """Lets go what nothing is wanted in any more; the thread ends when that is all."""
        self._arming.release_idle()
        with self._lock:
            self._closing = all(p.released and not p.memory.sites for p in self._group.processes.values())

    def _take_commands(self) -> None:
        self._wake.clear()
        while True:
            with self._lock:
                if not self._queue:
                    return
                command = self._queue.popleft()
            command.execute()

    # --- stops -------------------------------------------------------------------------------------------------------

    def _handle(self, tid: int, status: int) -> bool:
        """Serves one change of state; returns whether it was a hit of a probe. A failure must not leave a thread stopped.

        One that failed is served again, so whoever serves it changes our tables only when all that may fail is done. (A
        thread that goes on already answers ESRCH to everything.)
        """
        for _ in range(_TRIES):
            try:
                if status == SIGTRAP_STOP and (thread := self._group.threads.get(tid)) is not None:
                    return self._hits.trap(thread)
                self._other(tid, status)
                return False
            except ProcessLookupError:
                return False  # killed meanwhile: its end is reported to us too
            except Exception:
                log.exception("serving thread %d failed", tid)
        with contextlib.suppress(OSError):
            self._let_go_on(tid, status)
        return False

    def _let_go_on(self, tid: int, status: int) -> None:
        """Lets a thread go on whose stop could not be served: with its signal, or to run into the trap again."""
        if not os.WIFSTOPPED(status):
            return
        if tid not in self._group.threads:
            self._lifecycle.turn_away(tid)
            return
        if status >> 16 == ptrace.PTRACE_EVENT_EXEC and tid in self._group.processes:
            # What we know of it is the old image's. It is found again as one that nobody follows.
            ptrace.detach(tid)
            self._group.forget(self._group.processes[tid], None)
            self._engine.again(tid)
            return
        sig = os.WSTOPSIG(status) if status >> 16 == 0 else 0
        if sig == signal.SIGTRAP and self._registers.signal_code(tid) == ptrace.SI_KERNEL:
            self._registers.load(tid)
            thread = self._group.threads.get(tid)
            at = self._registers.words[RIP] - 1
            if thread is not None and (at in thread.process.memory.sites or at in thread.process.memory.former):
                ptrace.poke_user(tid, 8 * RIP, at)
                sig = 0
        ptrace.cont(tid, sig)

    def _other(self, tid: int, status: int) -> None:
        """Serves what is no SIGTRAP of a thread of ours."""
        thread = self._group.threads.get(tid)
        if not os.WIFSTOPPED(status):
            self._lifecycle.ended(tid, thread, status)
            return
        stop, event = os.WSTOPSIG(status), status >> 16
        if event == ptrace.PTRACE_EVENT_EXEC and tid in self._group.processes:
            self._lifecycle.execed(tid)
        elif thread is None:
            self._lifecycle.newborn(tid, status)
        elif event == 0:
            thread.settled = True
            self._resumer.begin_again(thread, stop)
            self._resumer.deliver(thread, stop)
        elif event == ptrace.PTRACE_EVENT_STOP:
            thread.interrupted = False
            if self._stepper.owes_trap(thread):
                # That first: nobody would take it from a thread that is let go. It runs nothing until then.
                thread.stop_again = stop in GROUP_STOPS
                ptrace.cont(tid)
                return
            thread.settled = True
            if tid in thread.process.awaited and not thread.held:
                # Not from in here: settling serves stops itself.
                thread.held = True
                with self._lock:
                    self._queue.append(_Command(lambda: self.commands.arm_mapper(thread, stop)))
            else:
                self._resumer.leave_stop(thread, stop)
        else:
            if event in (ptrace.PTRACE_EVENT_FORK, ptrace.PTRACE_EVENT_VFORK, ptrace.PTRACE_EVENT_CLONE):
                self._lifecycle.forked(thread)
            self._resumer.resume(thread)
