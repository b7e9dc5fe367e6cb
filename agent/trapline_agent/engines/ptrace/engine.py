"""The ptrace engine: which tracer thread follows which process."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable

from trapline.errors import EngineError, PermissionDenied, Unsupported
from trapline_agent.engines.base import Capabilities, Mapper, Observer, ProcessId, SiteReport, Wanted
from trapline_agent.engines.journal import Journal
from trapline_agent.engines.ptrace.attaching import Attaching
from trapline_agent.engines.ptrace.commands import Ended
from trapline_agent.engines.ptrace.group import TracedBeside
from trapline_agent.engines.ptrace.loop import DOORBELL, TraceThread
from trapline_agent.engines.ptrace.reaper import Reaper
from trapline_agent.engines.ptrace.tracee import TracedProcess
from trapline_agent.kernel import procfs, ptrace

log = logging.getLogger(__name__)

CLOSE_PATIENCE_S = 30.0
_PATIENCE_S = 2.0
_PAUSE_S = 0.001
_ENDS = 5
"""How often a process is taken to be there still that was said to have ended."""
_HOLD_TIMEOUT_S = 10.0
_MAX_COMMS = 8192
"""Names of processes that are remembered, of ended ones too: hits are drained later than they are made."""


class PtraceEngine:
    """An ``Engine``. Make it on the main thread: it takes SIGUSR1 as the doorbell of its threads."""

    name = "ptrace"
    traps = True
    """See ``Capabilities``."""
    floats = staticmethod(ptrace.floating_registers)

    def __init__(self, observer: Observer, journal: Journal | None = None) -> None:
        """
        Args:
            observer: asked and told.
            journal: of what is written into processes; None: nobody is to clean up after our being killed.
        """
        signal.signal(DOORBELL, lambda signum, frame: None)
        self.observer = observer
        self._journal = journal
        self._lock = threading.Lock()
        self._threads: dict[int, TraceThread] = {}
        self._processes: dict[int, TracedProcess] = {}
        self._started: set[TraceThread] = set()
        """Tracer threads that run, or have ended and were not waited for."""
        self._reaper = Reaper()
        self.attaching = Attaching()
        self._retry: set[int] = set()
        """Pids of processes that could not be brought to what is wanted."""
        self._held: dict[int, threading.Event] = {}
        self.comms: dict[int, str] = {}
        """Names of the processes that are or were followed, by pid."""

    # --- Engine ------------------------------------------------------------------------------------------------------

    def capabilities(self) -> Capabilities:
        """Seizes a child of its own to find out."""
        pid = os.fork()
        if pid == 0:
            signal.pause()
            os._exit(0)
        try:
            ptrace.seize(pid)
        except OSError as e:
            return Capabilities(self.name, False, f"ptrace is refused here: {e.strerror}")
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        return Capabilities(self.name, True, _restriction())

    def reconcile(self, process: ProcessId, cause: str) -> None:
        """See ``Engine``. Refusals by the kernel are reported for each wanted site."""
        patience = time.monotonic() + _PATIENCE_S
        ends = 0
        while True:
            with self._lock:
                thread = self._threads.get(process.pid)
            try:
                if thread is not None:
                    if thread.call(lambda t=thread: t.commands.reconcile(process.pid, cause)):  # type: ignore[misc]
                        return
                    self._unmap(process.pid, thread)
                    continue
                image = procfs.tried(lambda: procfs.image(process.pid))
                wanted = procfs.tried(lambda: self.observer.wanted(process, cause))
                if not wanted.sites and _is_new(process.pid, image) and time.monotonic() < patience:
                    time.sleep(_PAUSE_S)
                    continue
                if not wanted.keep and all(r.refusal for r in wanted.sites if not r.is_hook):
                    # Also where nothing is wanted at all. What will be refused needs no attaching.
                    self._refuse_each(process, wanted, cause)
                    return
                with self.attaching.alone(process.pid):
                    with self._lock:
                        meanwhile = process.pid in self._threads
                    if not meanwhile:
                        # Asked once more: all may have been taken out while this waited.
                        wanted = procfs.tried(lambda: self.observer.wanted(process, cause))
                        if wanted.sites or wanted.keep:
                            self._attach(process, cause, wanted)
                        return
            except Ended:
                if thread is not None:
                    self._unmap(process.pid, thread)
            except ProcessLookupError:
                # In the midst of an execve it may only look like that: a thread takes another's number.
                ends += 1
                if ends > _ENDS or not _is_there(process):
                    return
                time.sleep(_PAUSE_S)
            except TracedBeside as e:
                # A thread or child that was born as its parent was let go is not entered there: it goes at its first stop.
                if time.monotonic() > patience:
                    self._busy(process, cause, str(e))
                    return
                time.sleep(_PAUSE_S)
            except TimeoutError as e:
                self._busy(process, cause, str(e))
                return
            except OSError:
                log.exception("process %d cannot be brought to what is wanted; it is tried again", process.pid)
                self.again(process.pid)
                return

    def await_mapper(self, mapper: Mapper) -> bool:
        """Has a process followed one of whose threads waits as it maps a file, and armed when that goes on, before it runs.

        Returns at once, with the thread waiting still; or False: there is no need, the process' loader tells of it in time.
        Raises PermissionError, ProcessLookupError, TimeoutError (it may have gone on meanwhile).
        """
        pid = mapper.pid
        while True:
            with self._lock:
                thread, process = self._threads.get(pid), self._processes.get(pid)
            if process is not None and process.hooked and mapper.event == "mmap":
                return False
            try:
                if thread is not None:
                    thread.call(lambda t=thread: t.commands.await_mapper(mapper))  # type: ignore[misc]
                    return True
                with self.attaching.alone(pid, max(0.0, mapper.deadline - time.monotonic())):
                    if pid in self._threads:
                        continue
                    thread = self._start()
                    thread.call(lambda t=thread: t.commands.await_mapper(mapper))  # type: ignore[misc]
                    return True
            except Ended:
                if thread is not None:
                    self._unmap(pid, thread)

    def _unmap(self, pid: int, thread: TraceThread) -> None:
        with self._lock:
            if self._threads.get(pid) is thread:
                del self._threads[pid]

    def _busy(self, process: ProcessId, cause: str, why: str) -> None:
        self.again(process.pid)
        with contextlib.suppress(ProcessLookupError):
            wanted = self.observer.wanted(process, cause)
            self._refuse(process, wanted, cause, "BusyForking", f"{why}; it is tried again every second")

    def _attach(self, process: ProcessId, cause: str, wanted: Wanted) -> None:
        with self._lock:
            followed = {p.live_task(): p for p in self._processes.values() if p.id != process}
        sharing, unknown = ptrace.sharers(procfs.live_task(process.pid), list(followed)) if followed else ([], [])
        for task in sharing:
            other = followed[task].id
            with self._lock:
                sharer = self._threads.get(other.pid)
            if sharer is not None:
                sharer.call(lambda s=sharer, o=other: s.commands.join_process(process.pid, o.pid))  # type: ignore[misc]
                return
        # The others do not share its memory, and while they are followed their numbers are not given to some that might.
        apart = {p.id.pid: p for task, p in followed.items() if task not in unknown}

        def is_apart(pid: int) -> bool:
            return pid in apart and self._processes.get(pid) is apart[pid]

        seizer = 0
        try:
            if not self._attach_beside_parent(process, cause, is_apart):
                thread = self._start()
                seizer = thread.native_id or 0
                thread.call(lambda: thread.commands.attach(process.pid, cause, is_apart))
        except TracedBeside:
            raise
        except PermissionError as e:
            reason, message = _why_not(process.pid, e, seizer)
            if reason:
                self._refuse(process, wanted, cause, reason, message)
        except (ProcessLookupError, TimeoutError):
            raise
        except OSError as e:
            self._refuse(process, wanted, cause, "AttachFailed", str(e))

    def _attach_beside_parent(self, process: ProcessId, cause: str, is_apart: Callable[[int], bool]) -> bool:
        """Attaches to a child of a followed process on the thread that follows that: it may have been made with
        CLONE_UNTRACED, and then has its parent's breakpoints. Returns whether there was such a thread."""
        parent = int(procfs.stat_fields(process.pid)[1])
        with self._lock:
            thread = self._threads.get(parent)
        if thread is None:
            return False
        try:
            thread.call(lambda: thread.commands.attach(process.pid, cause, is_apart, parent=parent))
        except Ended:
            return False
        return True

    def _start(self) -> TraceThread:
        """Starts a tracer thread, when those that are ending have let all their tracees go: one of them half let go would
        look like one that the kernel attached to the new thread."""
        ending = [t for t in list(self._started) if t.ended]
        for old in ending:
            old.wait_gone()
        thread = TraceThread(
            self, self.observer, self._reaper, self._journal.watch if self._journal is not None else None
        )
        with self._lock:
            self._started.difference_update(ending)
            self._started.add(thread)
        thread.start()
        return thread

    def _refuse(self, process: ProcessId, wanted: Wanted, cause: str, reason: str, message: str) -> None:
        reports = [SiteReport(r.addr, r.plan, "refused", reason, message) for r in wanted.sites if not r.is_hook]
        self.observer.report(process, reports, cause)

    def _refuse_each(self, process: ProcessId, wanted: Wanted, cause: str) -> None:
        """Reports the refusals that the observer knows of already."""
        reports = [
            SiteReport(r.addr, r.plan, "refused", *r.refusal) for r in wanted.sites if r.refusal and not r.is_hook
        ]
        if reports:
            self.observer.report(process, reports, cause)

    def processes(self) -> list[ProcessId]:
        with self._lock:
            return [p.id for p in self._processes.values()]

    def is_hooked(self, pid: int) -> bool:
        """Whether a process is followed and its dynamic loader reports to us."""
        with self._lock:
            process = self._processes.get(pid)
        return process is not None and process.hooked

    def tick(self) -> list[ProcessId]:
        """Tries again to let go what it could not before, and returns what could not be armed: the caller is to reconcile
        that again. To be called every second or so."""
        with self._lock:
            retry, self._retry = self._retry, set()
            idle = [p.id.pid for p in self._processes.values() if p.lingering and not p.released]
            threads = {self._threads.get(pid) for pid in idle} - {None}
        for thread in threads:
            assert thread is not None
            thread.ring()
        again = []
        for pid in retry:
            try:
                again.append(ProcessId(pid, procfs.start_time(pid)))
            except ProcessLookupError:
                continue
            except OSError:
                self.again(pid)
        return again

    def close(self, patience_s: float = CLOSE_PATIENCE_S) -> None:
        """See ``Engine``; takes everything out, whatever the observer wants. Returns when every thread has let its processes
        go, but for those that hang: when none has gone for ``patience_s``, the rest is logged and left."""
        with self.attaching.paused():
            if self._close_all(patience_s) and self.attaching.wait(patience_s):
                self._close_all(patience_s)  # those that were being attached meanwhile

    def _close_all(self, patience_s: float) -> bool:
        with self._lock:
            threads = set(self._started)
        closers = {t: threading.Thread(target=self._close, args=(t,), daemon=True) for t in threads}
        for closer in closers.values():
            closer.start()
        while closers:
            before = len(closers)
            deadline = time.monotonic() + patience_s
            while len(closers) == before and time.monotonic() < deadline:
                next(iter(closers.values())).join(0.05)
                closers = {t: c for t, c in closers.items() if c.is_alive()}
            if len(closers) == before:
                with self._lock:
                    pids = sorted(pid for pid, t in self._threads.items() if t in closers)
                log.error("processes %s could not be let go in %.3g s; they hang, and are left", pids, patience_s)
                return False
        return True

    def _close(self, thread: TraceThread) -> None:
        with contextlib.suppress(Ended):
            thread.call(thread.commands.take_out)  # also waits for one that is only about to start
        while thread.is_alive():
            with contextlib.suppress(Ended):
                thread.call(thread.commands.take_out)
            thread.join(0.05)
        thread.wait_gone()
        with self._lock:
            self._started.discard(thread)

    # --- launched commands -------------------------------------------------------------------------------------------

    def hold(self, pid: int) -> Callable[[], None]:
        """Follows a child that is about to exec and stops it there.

        Args:
            pid: a child of this process, which is blocked in a system call and will exec next.

        Returns:
            A function that waits until it has; it raises EngineError where it does not, in 10 s.

        Raises:
            PermissionDenied: the kernel refuses to let us trace our own child.
        """
        arrived = self._held[pid] = threading.Event()
        thread = self._start()
        try:
            thread.call(lambda: thread.commands.attach(pid, "exec", held=True))
        except PermissionError as e:
            raise PermissionDenied(f"the kernel does not let us trace our own child: {e.strerror}") from e

        def wait() -> None:
            if not arrived.wait(_HOLD_TIMEOUT_S):
                raise EngineError(f"process {pid} did not start its command")

        return wait

    def release(self, pid: int) -> None:
        """Lets a held command run. Raises Unsupported where none is held by that number."""
        with self._lock:
            thread = self._threads.get(pid)
        if thread is None:
            raise Unsupported(f"process {pid} is not held", reason="NotHeld")
        with contextlib.suppress(Ended):
            thread.call(lambda: thread.commands.release(pid))

    # --- from the tracer threads -------------------------------------------------------------------------------------

    def adopted(self, process: TracedProcess, thread: TraceThread) -> None:
        self._enter(process)
        with self._lock:
            self._threads[process.id.pid] = thread
            self._processes[process.id.pid] = process
        self.comms[process.id.pid] = process.comm
        if len(self.comms) > _MAX_COMMS:
            # Those that ended long ago: their hits have been drained.
            for pid in [p for p in list(self.comms)[: _MAX_COMMS // 2] if p not in self._processes]:
                self.comms.pop(pid, None)

    def renamed(self, process: TracedProcess) -> None:
        self._enter(process)
        self.comms[process.id.pid] = process.comm

    def _enter(self, process: TracedProcess) -> None:
        if self._journal is not None and process.memory.records is None:
            process.memory.journal(self._journal.space(*process.id, process.memory.fd))

    def again(self, pid: int) -> None:
        with self._lock:
            self._retry.add(pid)

    def held(self, pid: int) -> None:
        if (event := self._held.get(pid)) is not None:
            event.set()

    def forgot(self, process: TracedProcess, status: int | None) -> None:
        with self._lock:
            if self._processes.get(process.id.pid) is process:
                del self._processes[process.id.pid]
                self._threads.pop(process.id.pid, None)
        self._held.pop(process.id.pid, None)
        self.observer.exited(process.id, status)


def _is_new(pid: int, image: tuple[int, int]) -> bool:
    """Whether a process took on another image since, or is about to: what was mapped tells nothing then."""
    now = procfs.tried(lambda: procfs.image(pid))
    return now != image or (not now[0] and procfs.tried(lambda: procfs.has_memory(pid)))


def _is_there(process: ProcessId) -> bool:
    try:
        procfs.live_task(process.pid)
        return procfs.start_time(process.pid) == process.start_time
    except OSError:
        return False


def _why_not(pid: int, error: OSError, seizer: int) -> tuple[str, str]:
    """Returns (reason, message) for a refused seize; an empty reason where another thread of ours than the one that was to
    seize it follows it already. (That one may have some of its threads, and has given up.)"""
    try:
        tracer = next((by for tid in procfs.tasks(pid) if (by := procfs.tracer(tid)) not in (0, seizer)), 0)
        if tracer and procfs.is_own_thread(tracer):
            return "", ""
        owner = procfs.status(pid, "Uid").get("Uid", "").split("\t")[0]
    except ProcessLookupError:
        return "", ""
    if tracer:
        with contextlib.suppress(ProcessLookupError):
            name = procfs.comm(tracer)
            return (
                "TracedByOther",
                f"process {pid} is traced by {name} (pid {tracer}), and a process has one tracer; end that one first",
            )
    return (
        "PermissionDenied",
        f"the kernel refuses to let uid {os.geteuid()} trace process {pid} of uid {owner}: {error.strerror or error}; "
        "run the agent as root or with CAP_SYS_PTRACE",
    )


def _restriction() -> str:
    if os.geteuid() == 0:
        return ""
    try:
        scope = procfs.read("/proc/sys/kernel/yama/ptrace_scope").strip()
    except OSError:
        scope = b"0"
    which = "not root: only processes of the same user"
    if scope != b"0":
        which = "not root, and Yama restricts tracing: only commands that it starts itself"
    # Kernel: security/commoncap.c, cap_bprm_creds_from_file. It cannot be prevented: the exec stop comes afterwards.
    return f"{which}; setuid programs that these execute get no privileges meanwhile"
