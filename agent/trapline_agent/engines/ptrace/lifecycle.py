"""Births, execs and ends of what is followed: a child has its parent's bytes, and a new image has none (semantics P1, P2).

All methods run on the tracer thread.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable

from trapline_agent.engines.base import Observer, SiteReport
from trapline_agent.engines.frames import EXECED, Frames
from trapline_agent.engines.ptrace.arming import Arming
from trapline_agent.engines.ptrace.directory import Directory
from trapline_agent.engines.ptrace.group import Group
from trapline_agent.engines.ptrace.memory import AddressSpace
from trapline_agent.engines.ptrace.resuming import Resumer
from trapline_agent.engines.ptrace.returns import Returns
from trapline_agent.engines.ptrace.stepping import Stepper
from trapline_agent.engines.ptrace.tracee import Thread, TracedProcess
from trapline_agent.kernel import procfs, ptrace

log = logging.getLogger(__name__)


class Lifecycle:
    """See the module."""

    def __init__(
        self,
        stepper: Stepper,
        group: Group,
        arming: Arming,
        resumer: Resumer,
        observer: Observer,
        engine: Directory,
        serve: Callable[[int, int], object],
    ) -> None:
        """
        Args:
            stepper: notes what a newborn thread blocks.
            group: the processes.
            arming: brings a child or a new image to what is wanted.
            resumer: lets threads go on.
            observer: told of sites that an exec took along.
            engine: told of execs, and of what could not be followed.
            serve: serves (tid, wait status) of a stop that proved to be no birth.
        """
        self._stepper = stepper
        self._group = group
        self._arming = arming
        self._resumer = resumer
        self._observer = observer
        self._engine = engine
        self._serve = serve
        self._expected: dict[int, tuple[TracedProcess, Frames]] = {}
        """By the id of a child or thread whose first stop has not come: its parent, and the calls in flight there at
        the fork. The parent may be gone by then; its tables stay."""
        self._bereft = False
        """One of our threads ended, and it may have been in a fork of which it told nothing."""

    def forked(self, thread: Thread) -> None:
        """A thread tells that it made a child or another thread."""
        child = ptrace.event_message(thread.tid)
        # It may have been born, and have ended, before this is told: its number may be another's next.
        if child not in self._group.threads and self._is_mine(child):
            self._expected[child] = thread.process, thread.process.memory.calls.frames.copy()

    def newborn(self, tid: int, status: int) -> None:
        """The first stop of a thread or child that the kernel attached for us."""
        fields = procfs.status(tid, "Tgid", "PPid")
        pid = int(fields["Tgid"])
        process = self._group.processes.get(pid)
        if process is not None:
            self._expected.pop(tid, None)
            thread = self._group.add(process, tid)
            thread.settled = True
            if process.memory.sites:
                self._stepper.note_mask(thread)
            if status >> 16 != ptrace.PTRACE_EVENT_STOP:
                self._serve(tid, status)  # it was known by another number before an exec: this is no birth
            else:
                self._resumer.leave_stop(thread, os.WSTOPSIG(status))
            return
        parent, calls = self._expected.get(tid, (None, None))
        parent = parent or self._group.processes.get(int(fields["PPid"])) or self._likely_parent(pid)
        shared = parent is not None and pid == tid and _has_memory_of(parent, pid)
        if parent is None or pid != tid or (shared and not parent.memory.users):
            # Of a process that was let go meanwhile, or with the memory of one: nothing of ours is there, and nothing may be
            # written there, since nobody has the others that run there.
            self._expected.pop(tid, None)
            ptrace.detach(tid)
            self._engine.again(pid)
            return
        if shared:
            child = TracedProcess.open(pid, parent.memory)
            parent.memory.users += 1
        else:
            child = TracedProcess.open(pid)
            child.memory.inherit(parent.memory)
            # The parent may have returned from some of them since; before its event it cannot have.
            child.memory.calls.frames = parent.memory.calls.frames.copy() if calls is None else calls
        self._adopt(child, tid, parent, status)
        self._expected.pop(tid, None)

    def _adopt(self, child: TracedProcess, tid: int, parent: TracedProcess, status: int) -> None:
        thread = self._group.add(child, tid)
        self._group.enter(child)
        thread.settled = True
        self._stepper.note_mask(thread)
        if child.memory is parent.memory and parent.released:
            child.lingering = child.released = True  # nothing of ours is there, and its parent is being let go
        else:
            self._arming.reconcile(child, "fork", parent.id)
        if status >> 16 == ptrace.PTRACE_EVENT_STOP:
            self._arming.let_go_if_idle(child)
            self._resumer.resume(thread)
        else:
            self._serve(tid, status)  # not its first stop: it could not be entered before

    def _likely_parent(self, pid: int) -> TracedProcess | None:
        """Whose memory a child has when its ppid does not tell (CLONE_PARENT, or the parent died at once)."""
        probe = AddressSpace(pid)
        try:
            for process in (*self._group.processes.values(), *self._group.forgotten):
                if any(probe.has_breakpoint(a) for a in (*process.memory.sites, *process.memory.former)):
                    return process
        finally:
            probe.close()
        return next(iter(self._group.processes.values()), None)

    def turn_away(self, tid: int) -> None:
        """Does without /proc what can be done for a newborn that could not be entered, for want of descriptors for example:
        it must not meet a breakpoint alone."""
        for process in self._group.processes.values():
            if _is_thread_of(process, tid):
                # One that only shares the memory is entered likewise: its hits are served, under the other's number.
                self._group.add(process, tid)
                self._group.threads[tid].settled = True
                ptrace.cont(tid)
                return
        for process in (*self._group.processes.values(), *self._group.forgotten):
            process.memory.purge_child(tid)
        log.error("process %d cannot be followed; it goes on without probes until it is found again", tid)
        ptrace.detach(tid)
        self._expected.pop(tid, None)
        self._engine.again(tid)

    def execed(self, tid: int) -> None:
        """A new image: the old address space is gone from this process, and with it all its sites (semantics P2). All other
        threads are gone, and the one that called has the leader's number now."""
        process = self._group.processes[tid]
        self._bereft |= len(process.threads) > 1
        fresh = AddressSpace(tid)
        awaited = process.awaited.pop(tid, None)
        self._group.abandon(process)
        thread = self._group.add(process, tid)
        thread.settled = True
        process.unsettled = False
        old, process.memory = process.memory, fresh
        # What was written while the exec was on its way may have met the new image already.
        fresh.inherit(old)
        gone = [SiteReport(a, s.plan, "gone") for a, s in old.sites.items() if a not in fresh.sites and not s.is_hook]
        Returns.left(process, old, EXECED)
        self._group.leave(old)
        with contextlib.suppress(OSError):
            process.comm = procfs.comm(tid)
        process.execs += 1
        self._engine.renamed(process)
        self._observer.report(process.id, gone, "exec")
        process.released = False  # all that is left of it stands here
        self._arming.reconcile(process, "exec" if awaited is None else awaited.mapper.cause())
        if process.held:
            thread.held = True
            self._engine.held(process.id.pid)
            return
        self._arming.let_go_if_idle(process)
        self._resumer.resume(thread)

    def ended(self, tid: int, thread: Thread | None, status: int) -> None:
        """A thread ended, which may not be entered (None)."""
        self._group.threads.pop(tid, None)
        self._expected.pop(tid, None)
        if thread is None:
            return
        process = thread.process
        process.drop(tid)
        if os.WIFSIGNALED(status) or process.threads:
            self._bereft = True  # not by its own exit: by a signal, or by another thread's exit or exec
        Returns.thread_ended(process.memory, tid)
        # The leader's end is reported last, when all other threads have gone (ptrace(2), "Death under ptrace").
        # One that ended before it was followed is not reported at all.
        if tid == process.id.pid or (not process.threads and not process.lives()):
            self._group.forget(process, status)

    def expects_children(self) -> bool:
        """Whether a child was forked whose first stop has not come: it may have bytes of ours."""
        if not self._group.followed:
            return False
        for tid in list(self._expected):
            # Its first stop may have come before its parent's event, and it may have been let go since.
            if tid in self._group.threads or not self._is_mine(tid):
                del self._expected[tid]
        if not self._expected and self._bereft:
            # A parent that is killed in its fork tells of no child.
            if any(pid not in self._group.threads and self._is_mine(pid) for pid in procfs.pids()):
                return True
            self._bereft = False
        return bool(self._expected)

    def _is_mine(self, tid: int) -> bool:
        with contextlib.suppress(OSError):
            return self._group.is_ours(tid)
        return False


def _is_thread_of(process: TracedProcess, tid: int) -> bool:
    """Whether a thread is one of a process', or has its memory; asks the kernel, not /proc."""
    with contextlib.suppress(OSError):
        ptrace.thread_kill(process.id.pid, tid, 0)
        return True
    with contextlib.suppress(OSError):
        return ptrace.same_address_space(process.id.pid, tid)
    return False


def _has_memory_of(parent: TracedProcess, pid: int) -> bool:
    """Whether a child shares its parent's memory. Raises OSError where that cannot be known now."""
    try:
        return ptrace.same_address_space(procfs.live_task(parent.id.pid), pid)
    except OSError as e:
        if e.errno not in ptrace.NO_KCMP:
            raise
        return False
