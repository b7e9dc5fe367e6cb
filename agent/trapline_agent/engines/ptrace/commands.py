"""What the engine has a tracer thread do: attach to a process, look at it anew, wait for one that maps a file, let go.

All methods run on the tracer thread: see ``TraceThread.call``.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from trapline.errors import Unsupported
from trapline_agent.engines.base import Mapper, Observer
from trapline_agent.engines.ptrace.arming import Arming
from trapline_agent.engines.ptrace.group import Group
from trapline_agent.engines.ptrace.resuming import Resumer
from trapline_agent.engines.ptrace.returns import Returns
from trapline_agent.engines.ptrace.tracee import Awaited, Thread, TracedProcess
from trapline_agent.kernel import procfs, ptrace
from trapline_agent.kernel.procfs import Whereabouts

log = logging.getLogger(__name__)


class Ended(Exception):
    """The thread let its processes go before it took the command."""


class Commands:
    """See the module."""

    def __init__(
        self, group: Group, arming: Arming, resumer: Resumer, observer: Observer, again: Callable[[int], None]
    ) -> None:
        """
        Args:
            group: the processes.
            arming: brings them to what is wanted.
            resumer: lets threads go on.
            observer: told of mappers that were missed.
            again: told the pid of a process that is to be reconciled once more in a while.
        """
        self._group = group
        self._arming = arming
        self._resumer = resumer
        self._observer = observer
        self._again = again

    def attach(
        self,
        pid: int,
        cause: str,
        is_apart: Callable[[int], bool] = lambda pid: False,
        *,
        held: bool = False,
        parent: int = 0,
    ) -> None:
        """Follows a process and arms what is wanted in it.

        Args:
            pid: the process.
            cause: for the report.
            is_apart: whether another process is known not to share its memory.
            held: it is a command of ours that has not begun.
            parent: its parent, where that is followed here: what it has of its parent's breakpoints is ours.

        Raises:
            PermissionError: the kernel says no.
            ProcessLookupError: it is gone.
            TimeoutError: a thread stayed inside fork.
        """
        process = self._group.processes.get(pid) or TracedProcess.open(pid)
        process.held = held
        try:
            self._group.seize(process)
        except OSError:
            if pid not in self._group.processes:
                self._group.abandon(process)
                process.memory.close()
            raise
        self._group.enter(process)
        try:
            if not held:
                self._group.is_apart = is_apart
                self._group.settle_all(process)
            if parent in self._group.processes and not process.memory.sites:
                process.memory.inherit(self._group.processes[parent].memory)
                cause = "fork" if process.memory.sites else cause
            self._arming.reconcile(process, cause)
        except BaseException:
            process.lingering = True
            process.retry_at = 0.0
            raise
        finally:
            self._group.is_apart = lambda pid: False

    def reconcile(self, pid: int, cause: str) -> bool:
        """Brings a process of this group to what is wanted; False where it is no longer here."""
        process = self._group.processes.get(pid)
        if process is None:
            return False
        if process.awaited and cause.startswith("mmap"):
            return True  # the mapper stops before it runs what it maps, and it is looked at then
        sharers = self._group.sharers(process.memory)
        if any(sharer.released for sharer in sharers):
            # They may have been let go in part already; from here on no stop is the last.
            seized = False
            try:
                for sharer in sharers:
                    sharer.released = False
                    seized |= self._group.seize(sharer)
                if self._group.seize_sharers(process) or seized or self._group.is_unsettled(process.memory):
                    self._group.settle_all(process)
            except OSError:
                for sharer in sharers:
                    sharer.released = True  # nothing was written: all of this is to be done again first
                raise
        elif self._group.is_unsettled(process.memory) and not process.memory.sites:
            self._group.settle_all(process)  # whoever seized it has not come to that, or it took too long
        self._arming.reconcile(process, cause)
        return True

    def await_mapper(self, mapper: Mapper) -> None:
        """Follows a process one of whose threads waits as it maps a file, so that it stops before it goes on in the program:
        at the end of its execve, or of the system call that maps. There it is armed. Returns at once.

        Raises:
            PermissionError: the kernel says no.
            ProcessLookupError: it is gone.
            TimeoutError: the thread may have gone on meanwhile.
        """
        pid = mapper.pid
        process = self._group.processes.get(pid) or TracedProcess.open(pid)
        fresh = pid not in self._group.processes
        try:
            self._group.seize(process)
            for sharer in self._group.sharers(process.memory):
                sharer.released = False
                self._group.seize(sharer)
        except OSError:
            if fresh:
                self._group.abandon(process)
                process.memory.close()
            raise
        if fresh:
            self._group.enter(process)
        if mapper.tid not in process.threads:
            raise ProcessLookupError(f"thread {mapper.tid} is gone")
        # A thread in mmap is stopped on its way out, and its mmap is done then: it waits where only a kill ends the wait
        # (fs/notify/fanotify/fanotify.c, fanotify_get_response). One in execve stops at its end, since it is followed.
        if mapper.event == "mmap":
            if time.monotonic() > mapper.deadline:
                process.lingering = not process.memory.sites
                raise TimeoutError(f"thread {mapper.tid} may have mapped the file already")
            ptrace.interrupt(mapper.tid)
        elif procfs.whereabouts(pid, mapper.tid) is not Whereabouts.EXECUTING:
            process.lingering = not process.memory.sites
            raise TimeoutError(f"the execve of process {pid} may have ended before it was followed")
        process.awaited[mapper.tid] = Awaited(mapper, process.unsettled or self._group.is_unsettled(process.memory))
        process.lingering = False

    def join_process(self, pid: int, sharer: int) -> None:
        """Follows a process that shares the address space of one that is followed here. Raises Ended where that one no
        longer is."""
        if pid in self._group.processes:
            # It was born to us after it was looked at, and may have an image of its own by now.
            self.reconcile(pid, "reconcile")
            return
        if sharer not in self._group.processes:
            raise Ended
        self._group.join(pid, sharer)

    def release(self, pid: int) -> None:
        """Lets a held command run. Raises Unsupported where none is held by that number."""
        process = self._group.processes.get(pid)
        if process is None:
            raise Unsupported(f"process {pid} is not held", reason="NotHeld")
        process.held = False
        for thread in list(process.threads.values()):
            if thread.held:
                thread.held = False
                self._arming.reconcile(process, "exec")
                self._arming.let_go_if_idle(process)
                self._resumer.resume(thread)

    def take_out(self) -> None:
        """Takes every byte out and lets every process go, whatever is wanted. Needs no answer of /proc."""
        for process in self._group.processes.values():
            Returns.retain(process.memory, (), ())
            self._arming.lower(process, process.memory.sites)
            for site in list(process.memory.sites.values()):
                process.memory.disarm(site)
                process.dirty = True
            process.held = False
            process.awaited.clear()
            process.lingering = True

    # --- from the thread itself --------------------------------------------------------------------------------------

    def arm_mapper(self, thread: Thread, stop: int) -> None:
        """Arms what is wanted in a process one of whose threads has mapped something, and is stopped."""
        process = thread.process
        awaited = process.awaited.get(thread.tid)
        try:
            if awaited is not None:
                if awaited.settle:
                    self._group.settle_all(process)
                process.awaited.pop(thread.tid, None)
                self._arming.reconcile(process, awaited.mapper.cause())
        except TimeoutError as e:
            log.warning("process %d maps a probed file and is not armed in time: %s", process.id.pid, e)
            if (given_up := process.awaited.pop(thread.tid, None)) is not None:
                mapper = given_up.mapper
                self._observer.missed(mapper.pid, mapper.file, f"{mapper.event}:unsettled")
            self._again(process.id.pid)
        finally:
            thread.held = False
            if thread.tid in self._group.threads:
                self._resumer.leave_stop(thread, stop)
