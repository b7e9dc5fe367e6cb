"""The processes that one tracer thread follows, and how a process comes to be followed without being stopped.

Three things could harm a process that is not followed with all it has to do with: a child of a fork that began before the
seize inherits our bytes untraced; a process that shares the address space runs into them; a descriptor of its memory from
before an exec leads to somebody else's. So before the first byte is written every thread has been seen where none of that
can be on its way (semantics P5); that is called *settling* here.

All methods run on the tracer thread.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable

from trapline_agent.engines.frames import ENDED
from trapline_agent.engines.ptrace.memory import AddressSpace
from trapline_agent.engines.ptrace.reaper import Reaper
from trapline_agent.engines.ptrace.returns import Returns
from trapline_agent.engines.ptrace.tracee import Thread, TracedProcess
from trapline_agent.kernel import procfs, ptrace
from trapline_agent.kernel.procfs import Whereabouts

SETTLE_S = 2.0
"""How long a process may take to settle."""
_SETTLE_THREAD_S = 0.02
_STAND_STILL_S = 0.05
"""How long it is waited for threads that do not stop: in the kernel, for a disk for example."""
_STANDING = (b"t", b"T", b"Z", b"X")
"""proc_pid_stat(5), field 3."""
_PATIENCE_S = 0.002
"""How long a running thread is only looked at before it is interrupted: most block in between, and then need not be."""


class TracedBeside(PermissionError):
    """Another thread of this tracer has a thread that was to be seized; it is about to let it go."""


class Group:
    """See the module."""

    def __init__(
        self,
        waiter: ptrace.Waiter,
        reaper: Reaper,
        serve: Callable[[int, int], object],
        adopted: Callable[[TracedProcess], None],
        forgot: Callable[[TracedProcess, int | None], None],
        hurried: Callable[[], bool] = lambda: False,
    ) -> None:
        """
        Args:
            waiter: of the tracer thread.
            reaper: of the engine.
            serve: handles (tid, wait status) of a stop that comes while settling.
            adopted: told of each process that is entered.
            forgot: told of each process that ended (wait status) or was let go (None).
            hurried: whether there is something to do that must not wait until a process has settled that is to be let go.
        """
        self._waiter = waiter
        self._reaper = reaper
        self._serve = serve
        self._adopted = adopted
        self._forgot = forgot
        self.hurried = hurried
        """See above."""
        self.processes: dict[int, TracedProcess] = {}
        self.threads: dict[int, Thread] = {}
        """By tid, of all processes."""
        self.forgotten: deque[TracedProcess] = deque(maxlen=16)
        """The last ones with bytes of ours that ended or were let go: a child of theirs may still have to be born."""
        self.followed = False
        """A process was followed once. One whose seize failed half-way never was: nothing was written to it."""
        self.is_apart: Callable[[int], bool] = lambda pid: False
        """Whether a process is known not to share memory with the one that is being attached."""

    def seize(self, process: TracedProcess) -> bool:
        """Seizes all threads, until no new one is seen (semantics P5). Returns whether there was any to seize.

        Raises:
            ProcessLookupError: it is gone.
            PermissionError: the kernel says no.
        """
        with self._reaper.seizing(process.id.pid) as reaped:
            seized = self._seize(process)
        for tid in reaped:
            self.drop(process, tid)
        return seized

    def _seize(self, process: TracedProcess) -> bool:
        pid = process.id.pid
        seized = False
        while True:
            # The kernel's word, not ours: a thread that execs takes the leader's number, followed or not.
            tids = [t for t in procfs.tasks(pid) if not self.is_ours(t) and not procfs.has_ended(pid, t)]
            if not tids:
                if not self.is_ours(procfs.live_task(pid)):
                    continue  # those that were listed are gone: one of them has the leader's number now
                if procfs.start_time(pid) != process.id.start_time:
                    raise ProcessLookupError(f"process {pid} was replaced by another of that number")
                return seized
            for tid in tids:
                self.drop(process, tid)
                try:
                    ptrace.seize(tid)
                except OSError:
                    if procfs.has_ended(pid, tid) or self.is_ours(tid):
                        continue  # ours: a clone that the kernel attached for us, whose first stop will tell
                    with contextlib.suppress(ProcessLookupError):
                        if (by := procfs.tracer(tid)) and procfs.is_own_thread(by):
                            raise TracedBeside(f"thread {tid} is being let go") from None
                    raise
                self.add(process, tid)
                seized = process.unsettled = True

    def is_ours(self, tid: int) -> bool:
        """Whether this thread traces it. Raises OSError where that cannot be known now."""
        with contextlib.suppress(ProcessLookupError):
            return procfs.tried(lambda: procfs.tracer(tid)) == threading.get_native_id()
        return False

    def settle_all(self, process: TracedProcess) -> None:
        """Settles a process that was just seized, with all that share its memory, and makes sure that the memory at hand is
        the one that it has.

        A descriptor of /proc/PID/mem that was opened before an exec leads to the old address space, which after a vfork is
        the parent's. So it is opened after the seize, from which on an exec is reported, and all threads have to be seen
        outside of execve once more after the sharers were looked for, with no exec in between.

        Raises TimeoutError.
        """
        memory = process.memory
        while True:
            self.settle_group(memory)
            if process.memory is memory and not memory.sites and not memory.slots:
                memory.reopen(process.id.pid)
            execs = process.execs
            found = self.seize_sharers(process)
            self.settle_group(memory)
            if not found and process.execs == execs:
                for sharer in self.sharers(memory):
                    sharer.unsettled = False
                return
            memory = process.memory

    def is_unsettled(self, memory: AddressSpace) -> bool:
        """Whether threads that have this memory were seized and have not settled since."""
        return any(p.unsettled for p in self.sharers(memory))

    def settle_group(self, memory: AddressSpace) -> None:
        for process in self.sharers(memory):
            if not self.settle(process):
                raise TimeoutError(f"a thread of process {process.id.pid} stays inside fork, clone or execve")

    def settle(self, process: TracedProcess, *, again: bool = True) -> bool:
        """Waits until every thread was seen outside of fork and clone, and outside of traps and slots.

        A fork that began before the seize is not followed, and its child would inherit a byte written meanwhile. Blocked
        threads are only looked at; running and forking ones are interrupted after a moment.

        Args:
            process: one of ours.
            again: since now; else since the last write is enough, so that a try that ran out of time is gone on with.

        Returns:
            Whether it did within ``SETTLE_S`` and a little for each thread.
        """
        pid = process.id.pid
        if again or process.dirty:
            for thread in process.threads.values():
                thread.settled = thread.held
            process.dirty = False
        started = time.monotonic()
        deadline = started + SETTLE_S + _SETTLE_THREAD_S * len(process.threads)
        patient = True
        while True:
            pending = [t for t in process.threads.values() if not t.settled]
            if not pending:
                return True
            for thread in pending:
                try:
                    place = procfs.whereabouts(pid, thread.tid)
                except ProcessLookupError:
                    thread.settled = True
                    continue
                except PermissionError:
                    place = Whereabouts.STOPPED
                except OSError:
                    continue  # no descriptors, for example: it is looked at again
                if place is Whereabouts.BLOCKED:
                    thread.settled = True
                elif patient or place is Whereabouts.EXECUTING:
                    continue
                elif place is Whereabouts.STOPPED and self._has_ended(thread):
                    thread.settled = True  # a zombie: the leader, whose end is reported when the others have gone
                elif place is Whereabouts.FORKING and self._is_followed_vfork(process, thread):
                    thread.settled = True
                elif not thread.interrupted:
                    # A fork that is interrupted begins again by itself (kernel/fork.c: ERESTARTNOINTR).
                    thread.interrupted = True
                    with contextlib.suppress(ProcessLookupError):
                        ptrace.interrupt(thread.tid)
            while (change := self._waiter.wait(block=False))[0] > 0:
                self._serve(*change)
            if all(t.settled for t in list(process.threads.values())):
                return True
            now = time.monotonic()
            if now > deadline or (not again and self.hurried()):
                return False
            patient = now - started < _PATIENCE_S
            os.sched_yield() if patient else time.sleep(0.0002)

    def stand_still(self, memory: AddressSpace) -> bool:
        """Has nobody run in a memory until the stops are served that this makes: what is mapped stays so, to the end of what
        the tracer thread does at the moment.

        Returns:
            Whether that was so within ``_STAND_STILL_S``.
        """
        deadline = time.monotonic() + _STAND_STILL_S
        pending = [thread for process in self.sharers(memory) for thread in process.threads.values()]
        for thread in pending:
            if not self._stands(thread):
                thread.interrupted = True
                with contextlib.suppress(OSError):
                    ptrace.interrupt(thread.tid)
        while pending := [thread for thread in pending if not self._stands(thread)]:
            if time.monotonic() > deadline:
                return False
            os.sched_yield()
        return True

    def _stands(self, thread: Thread) -> bool:
        """Whether a thread runs nothing of its program before we let it: in a ptrace-stop, a group-stop (it stops once
        more as it leaves that), its end; or waiting in a vfork for one that does."""
        pid = thread.process.id.pid
        try:
            state = procfs.stat_fields(pid, thread.tid)[0]
            return state in _STANDING or (state == b"D" and self._is_followed_vfork(thread.process, thread))
        except ProcessLookupError:
            return True
        except OSError:
            return False  # not to be known now

    def _has_ended(self, thread: Thread) -> bool:
        with contextlib.suppress(OSError):
            return procfs.has_ended(thread.process.id.pid, thread.tid)
        return False

    def _is_followed_vfork(self, process: TracedProcess, thread: Thread) -> bool:
        """Whether a thread waits for its vfork's child, and that is followed: then nothing untraced is on its way."""
        try:
            if not procfs.waits_for_vfork(process.id.pid, thread.tid, process.memory.fd):
                return False
            return len(self.sharers(process.memory)) > 1 or self.seize_sharers(process)
        except OSError:
            return False

    def seize_sharers(self, process: TracedProcess) -> bool:
        """Follows the processes that share this one's address space (vfork, CLONE_VM): they would meet our bytes untraced.

        Only those that were made before the seize are looked for; later ones are followed by the kernel. Returns whether
        there was a new one. Raises OSError where one cannot be followed: nothing may be written then.
        """
        found = False
        # A leader that has ended has no memory, as kernel threads have none: those would all be the same.
        asker = procfs.live_task(process.id.pid)
        others = [p for p in procfs.pids() if p not in self.processes and not self.is_apart(p)]
        for pid in ptrace.sharers(asker, others)[0]:
            with contextlib.suppress(ProcessLookupError):  # ended meanwhile
                if not procfs.has_memory(pid):
                    # The one that is asked about has ended meanwhile: it shares nothing with kernel threads.
                    return self.seize_sharers(process) or found
                self.join(pid, process.id.pid)
                found = True
        return found

    def join(self, pid: int, sharer: int) -> None:
        """Follows a process that has the address space of one that is followed here. Raises OSError."""
        if sharer not in self.processes:
            raise ProcessLookupError(f"process {sharer} ended meanwhile")
        memory = self.processes[sharer].memory
        child = TracedProcess.open(pid, memory)
        try:
            self.seize(child)
            # An exec before the seize was not reported; after it, it will be.
            if ptrace.same_address_space(procfs.live_task(pid), procfs.live_task(sharer)):
                memory.users += 1
            else:
                child.memory = AddressSpace(pid)
        except OSError:
            self.abandon(child)
            raise
        self.enter(child)

    def sharers(self, memory: AddressSpace) -> list[TracedProcess]:
        return [p for p in self.processes.values() if p.memory is memory]

    def soil(self, memory: AddressSpace) -> None:
        """Notes that something was written: every thread that can run there has to be seen anew, whosesoever it is."""
        for process in self.sharers(memory):
            process.dirty = True

    def add(self, process: TracedProcess, tid: int) -> Thread:
        """Enters a thread that is followed."""
        thread = self.threads[tid] = process.add(tid)
        return thread

    def drop(self, process: TracedProcess, tid: int) -> None:
        """Strikes off a thread; one that is not entered is fine."""
        self.threads.pop(tid, None)
        process.drop(tid)

    def abandon(self, process: TracedProcess) -> None:
        """Strikes off all threads of a process."""
        for tid in list(process.threads):
            self.drop(process, tid)

    def enter(self, process: TracedProcess) -> None:
        """Enters a process that is followed from now on."""
        self.processes[process.id.pid] = process
        self.followed = True
        self._adopted(process)

    def forget(self, process: TracedProcess, status: int | None) -> None:
        """Strikes off a process that ended (wait status) or is let go (None); one that is not entered is fine."""
        if self.processes.get(process.id.pid) is not process:
            return
        self.abandon(process)
        self.processes.pop(process.id.pid, None)
        if process.memory.sites or process.memory.former:
            self.forgotten.append(process)
        # (Of one that is let go no call is wanted any more; it has none.)
        Returns.left(process, process.memory, ENDED)
        self.leave(process.memory)
        self._forgot(process, status)

    def leave(self, memory: AddressSpace) -> None:
        """A process that had this memory has it no more; others may."""
        memory.close()
        if rest := self.sharers(memory):
            memory.belongs_to(*rest[0].id)
