"""One tracer thread and the processes it follows: the only place that waits for them and lets them go on.

ptrace binds a tracee to the thread that seized it, and its forks and clones to the same thread. So each seized process
starts a group with a thread of its own, which blocks in waitpid and does everything for its group (semantics P10). Other
threads give it work with ``call``: the work is queued and a signal rings until it was taken, since a signal that comes just
before waitpid blocks would be lost.

The thread ends when nothing of ours is left in any of its processes; the kernel then detaches all of them without stopping
them (kernel/ptrace.c, exit_ptrace), which PTRACE_DETACH could not: it needs a stop, and a stop makes blocking system calls
return EINTR (semantics P5).
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from trapline.errors import TraplineError, Unsupported
from trapline_agent.arch.x86_64.registers import RIP
from trapline_agent.engines.base import Mapper, Observer, ProcessId, SiteReport, SiteRequest
from trapline_agent.engines.frames import ENDED, EXECED, Frames
from trapline_agent.engines.ptrace.group import SETTLE_S, Group
from trapline_agent.engines.ptrace.memory import AddressSpace, Site
from trapline_agent.engines.ptrace.pages import Diverted, SlotPages
from trapline_agent.engines.ptrace.reaper import Reaper
from trapline_agent.engines.ptrace.returns import Returns
from trapline_agent.engines.ptrace.stepping import TRAP_BIT, Stepper, state_of
from trapline_agent.engines.ptrace.tracee import Awaited, Thread, TracedProcess
from trapline_agent.kernel import procfs, ptrace
from trapline_agent.kernel.procfs import Whereabouts
from trapline_agent.kernel.robust import DeathWatch
from trapline_agent.targets import maps

log = logging.getLogger(__name__)
T = TypeVar("T")

DOORBELL = signal.SIGUSR1
_SIGTRAP_STOP = signal.SIGTRAP << 8 | 0x7F
_GROUP_STOPS = frozenset((signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU))
_AFFINITY_MASK = 63
_SAMPLE_MASK = 15
_STANDING = frozenset(("fork", "exec"))
"""Causes for which the process, of one thread, is stopped while it is looked at: its mappings stay as they are."""
_TRIES = 3
"""How often something is tried that fails for want of memory, descriptors and the like."""
_MAX_FOREIGN = 1024


class Ended(Exception):
    """The thread let its processes go before it took the command."""


class Directory(Protocol):
    """Where a tracer thread enters the processes it follows: the engine. Called on the tracer thread; must not block."""

    def adopted(self, process: TracedProcess, thread: TraceThread) -> None:
        """It follows this process from now on."""

    def renamed(self, process: TracedProcess) -> None:
        """An exec gave it another name."""

    def held(self, pid: int) -> None:
        """A launched command stands before its first instruction."""

    def again(self, pid: int) -> None:
        """A process could not be brought to what is wanted, and is to be reconciled once more in a while."""

    def forgot(self, process: TracedProcess, status: int | None) -> None:
        """It ended (wait status) or was let go (None)."""


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
        self._observer = observer
        self._watch = watch
        self._lock = threading.Lock()
        self._commands: deque[_Command[object]] = deque()
        self._wake = threading.Event()
        self._ended = False
        self._closing = False
        self._followed = False
        """A process was followed once. One whose seize failed half-way never was: nothing was written to it."""
        self._waiter = ptrace.Waiter()
        self._registers = ptrace.RegisterFile()
        self._words = self._registers.words
        self._stepper = Stepper(self._registers, self._waiter)
        self._pages = SlotPages(self._registers, self._waiter)
        self._group = Group(
            self._waiter,
            reaper,
            self._handle,
            lambda process: engine.adopted(process, self),
            hurried=lambda: bool(self._commands),
        )
        self._returns = Returns(observer, self._arm)
        self._fork_calls: dict[int, Frames] = {}
        """Calls that were in flight in a parent when it forked, by the id of the child."""
        self._fork_parents: dict[int, TracedProcess] = {}
        """By the id of a child or thread whose first stop has not come; a parent may be gone by then, its tables stay."""
        self._bereft = False
        """One of our threads ended, and it may have been in a fork of which it told nothing."""
        self._forgotten: deque[TracedProcess] = deque(maxlen=16)
        self._cpus = os.sched_getaffinity(0)
        self._cpu = -1

    # --- from other threads ------------------------------------------------------------------------------------------

    def call(self, run: Callable[[], T]) -> T:
        """Runs something on this thread, and returns or raises what it does. Raises Ended."""
        command = _Command(run)
        with self._lock:
            if self._ended:
                raise Ended
            self._commands.append(command)  # type: ignore[arg-type] # the deque does not read results
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
                        self._forget(process, None)
                    if not self._finished():
                        self._wake.wait()
                self._take_commands()
                try:
                    self._release_idle()
                except OSError:
                    log.exception("what nothing is wanted in cannot be let go yet")
        except BaseException:
            log.exception("tracer thread failed; its processes are let go")
            self.take_out()
            raise
        finally:
            with self._lock:
                self._ended = True
                rest = list(self._commands)
                self._commands.clear()
            for process in list(self._group.processes.values()):
                self._forget(process, None)
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
            if self._commands:
                return False
            if self._closing and not self._expects_children():
                # no command can be added after this: ``call`` looks under the same lock
                self._ended = True
                return True
            return False

    def _expects_children(self) -> bool:
        """Whether a child was forked whose first stop has not come: it may have bytes of ours."""
        if not self._followed:
            return False
        for tid in list(self._fork_parents):
            # Its first stop may have come before its parent's event, and it may have been let go since.
            if tid in self._group.threads or not self._is_mine(tid):
                del self._fork_parents[tid]
        if not self._fork_parents and self._bereft:
            # A parent that is killed in its fork tells of no child.
            for entry in os.listdir("/proc"):
                if entry.isdigit() and int(entry) not in self._group.threads and self._is_mine(int(entry)):
                    return True
            self._bereft = False
        return bool(self._fork_parents)

    def _is_mine(self, tid: int) -> bool:
        with contextlib.suppress(OSError):
            return procfs.tried(lambda: procfs.tracer(tid)) == self.native_id
        return False

    def _take_commands(self) -> None:
        self._wake.clear()
        while True:
            with self._lock:
                if not self._commands:
                    return
                command = self._commands.popleft()
            command.execute()

    def take_out(self) -> None:
        """Takes every byte out and lets every process go, whatever is wanted. On this thread; asks /proc nothing."""
        for process in self._group.processes.values():
            self._returns.retain(process.memory, (), ())
            for site in list(process.memory.sites.values()):
                process.memory.disarm(site)
                process.dirty = True
            process.held = False
            process.awaited.clear()
            process.lingering = True

    def _handle(self, tid: int, status: int) -> bool:
        """Serves one change of state; returns whether it was a hit of a probe. A failure must not leave a thread stopped.

        One that failed is served again, so whoever serves it changes our tables only when all that may fail is done. (A
        thread that goes on already answers ESRCH to everything.)
        """
        for _ in range(_TRIES):
            try:
                if status == _SIGTRAP_STOP and (thread := self._group.threads.get(tid)) is not None:
                    return self._trap(thread)
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
            self._turn_away(tid)
            return
        if status >> 16 == ptrace.PTRACE_EVENT_EXEC and tid in self._group.processes:
            # What we know of it is the old image's. It is found again as one that nobody follows.
            ptrace.detach(tid)
            self._forget(self._group.processes[tid], None)
            self._engine.again(tid)
            return
        sig = os.WSTOPSIG(status) if status >> 16 == 0 else 0
        if sig == signal.SIGTRAP and self._registers.signal_code(tid) == ptrace.SI_KERNEL:
            self._registers.load(tid)
            thread = self._group.threads.get(tid)
            at = self._words[RIP] - 1
            if thread is not None and (at in thread.process.memory.sites or at in thread.process.memory.former):
                ptrace.poke_user(tid, 8 * RIP, at)
                sig = 0
        ptrace.cont(tid, sig)

    def _turn_away(self, tid: int) -> None:
        """Does without /proc what can be done for a newborn that could not be entered, for want of descriptors for example:
        it must not meet a breakpoint alone."""
        for process in self._group.processes.values():
            if _is_thread_of(process, tid):
                # One that only shares the memory is entered likewise: its hits are served, under the other's number.
                self._group.add(process, tid)
                self._group.threads[tid].settled = True
                ptrace.cont(tid)
                return
        for process in (*self._group.processes.values(), *self._forgotten):
            process.memory.purge_child(tid)
        log.error("process %d cannot be followed; it goes on without probes until it is found again", tid)
        ptrace.detach(tid)
        self._fork_parents.pop(tid, None)
        self._engine.again(tid)

    # --- hits --------------------------------------------------------------------------------------------------------

    def _trap(self, thread: Thread) -> bool:
        """Serves a SIGTRAP; returns whether it was a hit of a probe that is wanted."""
        ts = time.monotonic_ns()
        tid = thread.tid
        registers, words = self._registers, self._words
        registers.load(tid)
        memory = thread.process.memory
        addr = words[RIP] - 1
        site = memory.sites.get(addr)
        if site is None or registers.signal_code(tid) != ptrace.SI_KERNEL:
            self._foreign_trap(thread, addr)
            return False
        # First of all the ip leaves the trap: whatever happens to us from here on, the thread goes on right.
        if not site.paged or memory.runs_paged(site):
            self._stepper.leave_trap(thread, site)
        elif not self._leave_by_new_slot(thread, site):
            return False
        call = None
        site.tally.traps += 1
        try:
            if thread.uncounted is not None and thread.uncounted == state_of(words):
                thread.uncounted = None
            else:
                if site.awaiting:
                    self._returns.returned(ts, thread, site, words)
                pid, fd = thread.process.id.pid, memory.fd
                for sink in site.sinks:
                    sink(ts, pid, tid, words, fd)
                if site.unwinds:
                    self._returns.unwound(thread, words)
                if site.returns:
                    call = self._returns.entered(ts, thread, site, words)
            if thread.blocked:
                procfs.tried(lambda: self._stepper.block_again(thread))
            if site.is_hook:
                self._reconcile(thread.process, "mmap")
        except Exception:
            # Ours, not the program's: served again, this would look like a SIGTRAP of its own.
            log.exception("a hit of thread %d was not served whole", tid)
        thread.settled = True
        thread.hits += 1
        if call is not None:
            call.entered_ns = time.monotonic_ns()
        self._resume(thread)
        if not thread.hits & _SAMPLE_MASK:
            self._observer.sampled(site.plan, time.monotonic_ns() - ts)
        if thread.hits & _AFFINITY_MASK == 1:
            self._follow_cpu(thread)
        return not site.is_hook

    def _leave_by_new_slot(self, thread: Thread, site: Site) -> bool:
        """As ``leave_trap`` for a site that has no slot yet, or none any more; takes it out where it can have none. Returns
        False where another stop came first: the thread runs into the breakpoint again, and that counts then."""
        process = thread.process
        if thread.blocked:
            # What is pending because SIGTRAP is blocked is not to be let in meanwhile.
            with contextlib.suppress(OSError):
                self._stepper.block_again(thread)
        try:
            self._pages.provide(thread, site)
        except Diverted as stop:
            if stop.status is None:
                self._resume(thread)
            else:
                self._handle(thread.tid, stop.status)
            return False
        except Unsupported as e:
            # This one goes on from the instruction itself, and so do those that wait at the breakpoint.
            self._give_up(process, site, e)
        self._group.soil(process.memory)
        try:
            procfs.tried(lambda: self._stepper.leave_trap(thread, site))
        except ProcessLookupError:
            raise
        except OSError:
            self._resume(thread)  # it stands at the breakpoint
            return False
        return True

    def _give_up(self, process: TracedProcess, site: Site, error: Unsupported) -> None:
        """Takes out a site that was armed and cannot be served after all."""
        # (Of those that share the memory it is the first that sites are told of.)
        process = next(iter(self._group.sharers(process.memory)), process)
        process.memory.disarm(site)
        self._returns.given_up(process.memory, site, error.reason or error.code)
        process.hooked = process.hooked and not site.is_hook
        self._engine.again(process.id.pid)
        if site.is_hook:
            log.warning("the loader of process %d is not watched: %s", process.id.pid, error)
            return
        report = SiteReport(site.addr, site.plan, "refused", error.reason or error.code, str(error))
        try:
            self._observer.report(process.id, [report], "reconcile")
        except Exception:
            log.exception("it was not told that a site of process %d is refused: %s", process.id.pid, error)

    def _foreign_trap(self, thread: Thread, addr: int) -> None:
        """A SIGTRAP that is no hit: one of ours that was taken out meanwhile, or the program's own (semantics H2)."""
        code = self._registers.signal_code(thread.tid)
        memory = thread.process.memory
        thread.settled = True
        former = memory.former.get(addr) if code == ptrace.SI_KERNEL else None
        if (former is not None and memory.restored(former)) or (
            code == ptrace.SI_KERNEL and self._came_along(thread.process, addr)
        ):
            ptrace.poke_user(thread.tid, 8 * RIP, addr)
            self._resume(thread)
            return
        self._deliver(thread, signal.SIGTRAP)

    def _came_along(self, process: TracedProcess, addr: int) -> bool:
        """Whether an unknown breakpoint is one of ours that moved with its code (mremap, which nobody tells of)."""
        memory = process.memory
        if addr in memory.foreign or not memory.has_breakpoint(addr):
            return False
        self._reconcile(next(iter(self._group.sharers(memory)), process), "reconcile")
        if addr in memory.sites or addr in memory.former:
            return True
        if len(memory.foreign) >= _MAX_FOREIGN:
            memory.foreign.clear()
        memory.foreign.add(addr)
        return False

    def _follow_cpu(self, thread: Thread) -> None:
        """Moves to the CPU of the thread that is served: a wake-up across CPUs costs several times the rest of a hit."""
        cpu = thread.cpu()
        if cpu != self._cpu and cpu in self._cpus:
            with contextlib.suppress(OSError):
                os.sched_setaffinity(0, (cpu,))
                self._cpu = cpu

    # --- everything else ---------------------------------------------------------------------------------------------

    def _other(self, tid: int, status: int) -> None:
        thread = self._group.threads.get(tid)
        if not os.WIFSTOPPED(status):
            self._ended_task(tid, thread, status)
            return
        stop, event = os.WSTOPSIG(status), status >> 16
        if event == ptrace.PTRACE_EVENT_EXEC and tid in self._group.processes:
            self._execed(tid)
        elif thread is None:
            self._newborn(tid, status)
        elif event == 0:
            thread.settled = True
            self._begin_again(thread, stop)
            self._deliver(thread, stop)
        elif event == ptrace.PTRACE_EVENT_STOP:
            thread.interrupted = False
            if self._stepper.owes_trap(thread):
                # That first: nobody would take it from a thread that is let go. It runs nothing until then.
                thread.stop_again = stop in _GROUP_STOPS
                ptrace.cont(tid)
                return
            thread.settled = True
            if tid in thread.process.awaited and not thread.held:
                # Not from in here: settling serves stops itself.
                thread.held = True
                with self._lock:
                    self._commands.append(_Command(lambda: self._arm_mapper(thread, stop)))
            else:
                self._leave_stop(thread, stop)
        else:
            if event in (ptrace.PTRACE_EVENT_FORK, ptrace.PTRACE_EVENT_VFORK, ptrace.PTRACE_EVENT_CLONE):
                child = ptrace.event_message(tid)
                # It may have been born, and have ended, before this is told: its number may be another's next.
                if child not in self._group.threads and self._is_mine(child):
                    self._fork_parents[child] = thread.process
                    self._fork_calls[child] = thread.process.memory.calls.frames.copy()
            self._resume(thread)

    def _leave_stop(self, thread: Thread, stop: int) -> None:
        """Ends a PTRACE_EVENT_STOP: a group stop goes on as the program's own."""
        if stop not in _GROUP_STOPS:
            if not thread.listening:
                self._begin_again(thread, 0)  # who was stopped by job control sees EINTR, as without us
            thread.listening = False
            self._deliver(thread, 0)
            return
        # It may be let go in this stop, and the slots with it.
        thread.settled = self._stepper.step_aside(thread)
        if thread.process.released:
            self._detach(thread, 0)
        else:
            thread.listening = True
            ptrace.listen(thread.tid)

    def _ended_task(self, tid: int, thread: Thread | None, status: int) -> None:
        self._group.threads.pop(tid, None)
        self._fork_parents.pop(tid, None)
        self._fork_calls.pop(tid, None)
        if thread is None:
            return
        process = thread.process
        process.drop(tid)
        if os.WIFSIGNALED(status) or process.threads:
            self._bereft = True  # not by its own exit: by a signal, or by another thread's exit or exec
        self._returns.thread_ended(process.memory, tid)
        # The leader's end is reported last, when all other threads have gone (ptrace(2), "Death under ptrace").
        # One that ended before it was followed is not reported at all.
        if tid == process.id.pid or (not process.threads and not _lives(process.id.pid)):
            self._forget(process, status)

    def _newborn(self, tid: int, status: int) -> None:
        """The first stop of a thread or child that the kernel attached for us."""
        fields = procfs.status(tid, "Tgid", "PPid")
        pid = int(fields["Tgid"])
        process = self._group.processes.get(pid)
        if process is not None:
            self._fork_parents.pop(tid, None)
            self._fork_calls.pop(tid, None)
            thread = self._group.add(process, tid)
            thread.settled = True
            if process.memory.sites:
                self._stepper.note_mask(thread)
            if status >> 16 != ptrace.PTRACE_EVENT_STOP:
                self._handle(tid, status)  # it was known by another number before an exec: this is no birth
            elif os.WSTOPSIG(status) in _GROUP_STOPS and not process.released:
                ptrace.listen(tid)
            else:
                self._resume(thread)
            return
        parent = (
            self._fork_parents.get(tid) or self._group.processes.get(int(fields["PPid"])) or self._likely_parent(pid)
        )
        if parent is None or pid != tid or self._is_left_behind(parent, pid):
            # Of a process that was let go meanwhile, or with the memory of one: nothing of ours is there, and nothing may be
            # written there, since nobody has the others that run there.
            self._fork_parents.pop(tid, None)
            self._fork_calls.pop(tid, None)
            ptrace.detach(tid)
            self._engine.again(pid)
            return
        self._adopt(pid, tid, parent, status)
        self._fork_parents.pop(tid, None)
        self._fork_calls.pop(tid, None)

    def _likely_parent(self, pid: int) -> TracedProcess | None:
        """Whose memory a child has when its ppid does not tell (CLONE_PARENT, or the parent died at once)."""
        probe = AddressSpace(pid)
        try:
            for process in (*self._group.processes.values(), *self._forgotten):
                if any(probe.has_breakpoint(a) for a in (*process.memory.sites, *process.memory.former)):
                    return process
        finally:
            probe.close()
        return next(iter(self._group.processes.values()), None)

    def _is_left_behind(self, parent: TracedProcess, pid: int) -> bool:
        """Whether a child has the memory of a parent that is followed no more."""
        if parent.memory.users:
            return False
        try:
            return ptrace.same_address_space(procfs.live_task(parent.id.pid), pid)
        except OSError as e:
            if e.errno not in ptrace.NO_KCMP:
                raise
            return False

    def _adopt(self, pid: int, tid: int, parent: TracedProcess, status: int) -> None:
        try:
            shared = ptrace.same_address_space(procfs.live_task(parent.id.pid), pid)
        except OSError as e:
            if e.errno not in ptrace.NO_KCMP:
                raise
            shared = False
        if shared and parent.memory.users > 0:
            child = TracedProcess.open(pid, parent.memory)
            parent.memory.users += 1
        else:
            child = TracedProcess.open(pid)
            child.memory.inherit(parent.memory)
            # The parent may have returned from some of them since; before its event it cannot have.
            calls = self._fork_calls.get(tid)
            child.memory.calls.frames = parent.memory.calls.frames.copy() if calls is None else calls
        thread = self._include(child, tid)
        thread.settled = True
        self._stepper.note_mask(thread)
        if child.memory is parent.memory and parent.released:
            child.lingering = child.released = True  # nothing of ours is there, and its parent is being let go
        else:
            self._reconcile(child, "fork", parent.id)
        if status >> 16 == ptrace.PTRACE_EVENT_STOP:
            self._let_go_if_idle(child)
            self._resume(thread)
        else:
            self._handle(tid, status)  # not its first stop: it could not be entered before

    def _include(self, process: TracedProcess, tid: int) -> Thread:
        self._group.processes[process.id.pid] = process
        thread = self._group.add(process, tid)
        self._engine.adopted(process, self)
        return thread

    def _execed(self, tid: int) -> None:
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
        self._returns.left(process, old, EXECED)
        self._leave(old)
        with contextlib.suppress(OSError):
            process.comm = procfs.comm(tid)
        process.execs += 1
        self._engine.renamed(process)
        self._observer.report(process.id, gone, "exec")
        process.released = False  # all that is left of it stands here
        self._reconcile(process, "exec" if awaited is None else awaited.mapper.cause())
        if process.held:
            thread.held = True
            self._engine.held(process.id.pid)
            return
        self._let_go_if_idle(process)
        self._resume(thread)

    def _forget(self, process: TracedProcess, status: int | None) -> None:
        if self._group.processes.get(process.id.pid) is not process:
            return
        self._group.abandon(process)
        self._group.processes.pop(process.id.pid, None)
        if process.memory.sites or process.memory.former:
            self._forgotten.append(process)
        # (Of one that is let go no call is wanted any more; it has none.)
        self._returns.left(process, process.memory, ENDED)
        self._leave(process.memory)
        self._engine.forgot(process, status)

    def _leave(self, memory: AddressSpace) -> None:
        memory.close()
        if rest := self._group.sharers(memory):
            memory.belongs_to(*rest[0].id)

    # --- letting threads go on ---------------------------------------------------------------------------------------

    def _resume(self, thread: Thread, sig: int = 0) -> None:
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
            self._forget(process, None)

    def _begin_again(self, thread: Thread, sig: int) -> None:
        with contextlib.suppress(OSError, KeyError):  # what cannot be looked at is left as the kernel has it
            self._stepper.begin_again(thread, sig)

    def _deliver(self, thread: Thread, sig: int) -> None:
        """Lets a stopped thread go on with a signal, or with none (0); a handler never sees an address inside a slot."""
        later = self._stepper.leave_slot(thread, sig)
        if later in (0, _SIGTRAP_STOP):
            self._resume(thread, sig)
        else:
            self._other(thread.tid, later)

    # --- commands ----------------------------------------------------------------------------------------------------

    def attach(
        self,
        pid: int,
        cause: str,
        is_apart: Callable[[int], bool] = lambda pid: False,
        *,
        held: bool = False,
        parent: int = 0,
    ) -> None:
        """Follows a process and arms what is wanted in it. On this thread.

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
        self._group.processes[pid] = process
        self._followed = True
        self._engine.adopted(process, self)
        try:
            if not held:
                self._group.is_apart = is_apart
                self._group.settle_all(process)
            if parent in self._group.processes and not process.memory.sites:
                process.memory.inherit(self._group.processes[parent].memory)
                cause = "fork" if process.memory.sites else cause
            self._reconcile(process, cause)
        except BaseException:
            process.lingering = True
            process.retry_at = 0.0
            raise
        finally:
            self._group.is_apart = lambda pid: False

    def reconcile(self, pid: int, cause: str) -> bool:
        """Brings a process of this group to what is wanted; False where it is no longer here. On this thread."""
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
        self._reconcile(process, cause)
        return True

    def await_mapper(self, mapper: Mapper) -> None:
        """Follows a process one of whose threads waits as it maps a file, so that it stops before it goes on in the program:
        at the end of its execve, or of the system call that maps. There it is armed. On this thread; returns at once.

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
            self._group.processes[pid] = process
            self._followed = True
            self._engine.adopted(process, self)
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

    def _arm_mapper(self, thread: Thread, stop: int) -> None:
        """Arms what is wanted in a process one of whose threads has mapped something, and is stopped."""
        process = thread.process
        awaited = process.awaited.get(thread.tid)
        try:
            if awaited is not None:
                if awaited.settle:
                    self._group.settle_all(process)
                process.awaited.pop(thread.tid, None)
                self._reconcile(process, awaited.mapper.cause())
        except TimeoutError as e:
            log.warning("process %d maps a probed file and is not armed in time: %s", process.id.pid, e)
            if (given_up := process.awaited.pop(thread.tid, None)) is not None:
                mapper = given_up.mapper
                self._observer.missed(mapper.pid, mapper.file, f"{mapper.event}:unsettled")
            self._engine.again(process.id.pid)
        finally:
            thread.held = False
            if thread.tid in self._group.threads:
                self._leave_stop(thread, stop)

    def _reconcile(self, process: TracedProcess, cause: str, parent: ProcessId | None = None) -> None:
        memory = process.memory
        if self._group.processes.get(process.id.pid) is not process:
            return  # it ended, or was let go, while it settled
        sharers = self._group.sharers(memory)
        if any(sharer.released for sharer in sharers):
            # Some of their threads may be let go already, and would meet alone what is written now.
            self._engine.again(process.id.pid)
            return
        if memory.users > 1 and (first := next(iter(sharers), process)) is not process:
            # What is in their memory is entered with the first of those that share it; a birth changes nothing there.
            if cause != "fork" and _lives(first.id.pid):
                self._reconcile(first, cause)
            return
        try:
            wanted = procfs.tried(lambda: self._observer.wanted(process.id, cause, parent))
        except ProcessLookupError:
            return
        except OSError:
            # /proc does not answer. What nobody wants anywhere can go without it; the rest stays as it is.
            log.exception("process %d cannot be looked at; it is tried again", process.id.pid)
            self._engine.again(process.id.pid)
            wished = {s.addr: s for s in memory.sites.values() if s.returns and self._observer.is_wanted(s.plan)}
            self._returns.retain(memory, [sink for s in wished.values() for sink in s.returns], wished)
            for site in list(memory.sites.values()):
                if not site.awaiting and not self._observer.is_wanted(site.plan):
                    memory.disarm(site)
                    self._group.soil(memory)
            process.lingering = not memory.sites and not process.held and not process.awaited
            return
        reports: list[SiteReport] = []
        desired = {r.addr: r for r in wanted.sites}
        returning = [sink for r in wanted.sites for sink in r.returns]
        self._returns.retain(memory, returning, [r.addr for r in wanted.sites if r.returns])

        def moved(site: Site) -> bool:
            return not wanted.still_mapped(site.addr, site.plan)

        for site in list(memory.sites.values()):
            request = desired.get(site.addr)
            same = (
                request is not None and request.plan.file == site.plan.file and request.plan.offset == site.plan.offset
            )
            # What a child has of its parent's was looked at just now.
            if same and request is not None and (cause == "fork" or memory.stands(site)):
                # To a consumer that joins, or leaves this process alone, the site is news too.
                joined = (site.sinks, site.returns) != (request.sinks, request.returns)
                site.sinks, site.returns = request.sinks, request.returns
                site.is_hook, site.unwinds = request.is_hook, request.unwinds
                site.tally = request.tally
                if cause == "fork" or joined:
                    reports.append(SiteReport(site.addr, site.plan, "armed"))
                continue
            if request is None and site.awaiting and not moved(site) and (cause == "fork" or memory.stands(site)):
                # A return point, which no probe has asked for by its address.
                if site.sinks or site.returns:
                    reports.append(SiteReport(site.addr, site.plan, "gone"))
                site.sinks, site.returns, site.is_hook, site.unwinds = (), (), False, False
                continue
            self._group.soil(memory)
            if not memory.disarm(site, mapped=not moved(site)):
                log.error("the breakpoint at %#x of process %d cannot be taken out yet", site.addr, process.id.pid)
                self._engine.again(process.id.pid)
                continue
            for addr in wanted.places(site.plan) if moved(site) else ():
                if addr not in memory.sites:
                    memory.take_back(site.plan, addr, moved)
            if cause != "fork":
                reports.append(SiteReport(site.addr, site.plan, "gone"))
        new = [r for r in wanted.sites if r.addr not in memory.sites]
        objection = self._objection(process) if new else None
        no_pages = self._pages.prospect(process)
        for request in new:
            try:
                if objection is not None:
                    raise objection
                if memory.has_breakpoint(request.addr):
                    memory.take_back(request.plan, request.addr, moved)
                self._arm(process, request, no_pages)
                reports.append(SiteReport(request.addr, request.plan, "armed"))
            except TraplineError as e:
                reports.append(SiteReport(request.addr, request.plan, "refused", e.reason or e.code, str(e)))
            except OSError as e:
                reports.append(SiteReport(request.addr, request.plan, "refused", "Unmapped", e.strerror or str(e)))
        if cause in _STANDING:
            memory.written.clear()
        elif memory.written:
            reports += self._look_again(process)
        process.lingering = not memory.sites and not wanted.keep and not process.held and not process.awaited
        process.released = process.released and process.lingering
        process.hooked = any(s.is_hook for s in memory.sites.values())
        hooks = {r.addr for r in wanted.sites if r.is_hook}
        self._observer.report(process.id, [r for r in reports if r.addr not in hooks], cause)
        if any(r.is_hook and r.addr in memory.sites for r in new):
            # What was mapped after the look, and told of before the hook was there, was seen by neither (semantics R2).
            self._reconcile(process, cause, parent)

    def _arm(
        self,
        process: TracedProcess,
        request: SiteRequest,
        no_pages: Callable[[Site], Unsupported | None] | None = None,
    ) -> Site:
        """Arms a site; raises as ``AddressSpace.arm`` does."""
        site = process.memory.arm(request, no_pages or self._pages.prospect(process))
        self._group.soil(process.memory)
        return site

    def _look_again(self, process: TracedProcess) -> list[SiteReport]:
        try:
            now = maps.parse_maps(procfs.tried(lambda: maps.read_maps(process.id.pid)))
        except OSError:
            return []  # it is gone, or cannot be looked at
        gone = process.memory.undo_strays(
            lambda addr, plan: maps.is_mapped(now, plan.file, plan.offset, addr), process.id.pid
        )
        return [SiteReport(s.addr, s.plan, "gone") for s in gone]

    def _objection(self, process: TracedProcess) -> Unsupported | None:
        """Says why a process may have no breakpoint at all: what it does about SIGTRAP could not be kept (semantics H5).

        An int3 resets the disposition of a SIGTRAP that is ignored, or that is blocked while it is caught, and what it was
        cannot be put back from outside.
        """
        pid = process.id.pid
        for thread in process.threads.values():
            try:
                blocked, ignored, caught = procfs.signal_sets(thread.tid)
            except (ProcessLookupError, KeyError):
                continue
            thread.blocked = blocked if blocked & TRAP_BIT else 0
            if ignored & TRAP_BIT:
                return Unsupported(
                    f"process {pid} ignores SIGTRAP, and a breakpoint would make the kernel forget that",
                    reason="SigtrapIgnored",
                    hint="probe another process of the program, or stop it from ignoring SIGTRAP",
                )
            if thread.blocked and caught & TRAP_BIT:
                return Unsupported(
                    f"process {pid} has a SIGTRAP handler and thread {thread.tid} blocks SIGTRAP: "
                    "a breakpoint would make the kernel forget the handler",
                    reason="SigtrapBlockedAndCaught",
                    hint="probe another process of the program",
                )
        return None

    def _let_go_if_idle(self, process: TracedProcess) -> None:
        """For a process whose only thread is stopped: what is left of ours can go at once."""
        if process.lingering and process.memory.users == 1:
            process.memory.wipe_slots()
            process.released = True

    def _release_idle(self) -> None:
        """Lets go what nothing is wanted in any more; the thread ends when that is all."""
        for process in list(self._group.processes.values()):
            if not process.lingering or process.released or time.monotonic() < process.retry_at:
                continue
            memory = process.memory
            sharers = self._group.sharers(memory)
            settled = all(self._group.settle(p, again=False) for p in sharers)
            # Settling serves stops: a sharer may have taken on an image of its own meanwhile, or a new one have come.
            now = self._group.sharers(memory)
            if settled and process.lingering and process in now and not memory.sites and set(now) <= set(sharers):
                memory.wipe_slots()
                for p in now:
                    p.lingering = p.released = True
            elif not settled and not self._commands:
                process.retry_at = time.monotonic() + SETTLE_S  # not where it only gave way to a command
        with self._lock:
            self._closing = all(p.released and not p.memory.sites for p in self._group.processes.values())

    def join_process(self, pid: int, sharer: int) -> None:
        """Follows a process that shares the address space of one that is followed here. On this thread. Raises Ended where
        that one no longer is."""
        if pid in self._group.processes:
            # It was born to us after it was looked at, and may have an image of its own by now.
            self.reconcile(pid, "reconcile")
            return
        if sharer not in self._group.processes:
            raise Ended
        self._group.join(pid, sharer)

    def release(self, pid: int) -> None:
        """Lets a held command run. On this thread."""
        process = self._group.processes.get(pid)
        if process is None:
            raise Unsupported(f"process {pid} is not held", reason="NotHeld")
        process.held = False
        for thread in list(process.threads.values()):
            if thread.held:
                thread.held = False
                self._reconcile(process, "exec")
                self._let_go_if_idle(process)
                self._resume(thread)


def _is_thread_of(process: TracedProcess, tid: int) -> bool:
    """Whether a thread is one of a process', or has its memory; asks the kernel, not /proc."""
    with contextlib.suppress(OSError):
        ptrace.thread_kill(process.id.pid, tid, 0)
        return True
    with contextlib.suppress(OSError):
        return ptrace.same_address_space(process.id.pid, tid)
    return False


def _lives(pid: int) -> bool:
    try:
        procfs.live_task(pid)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # not to be known now
    return True
