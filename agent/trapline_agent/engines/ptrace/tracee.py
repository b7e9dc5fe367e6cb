"""A process that is followed, and its threads; belongs to one tracer thread."""

from __future__ import annotations

from dataclasses import dataclass, field

from trapline_agent.engines.base import Mapper, ProcessId
from trapline_agent.engines.ptrace.memory import AddressSpace
from trapline_agent.kernel import procfs


@dataclass(eq=False)
class Thread:
    tid: int
    process: TracedProcess
    hits: int = 0
    settled: bool = False
    """It was seen outside of fork and clone since this was last asked."""
    interrupted: bool = False
    """PTRACE_INTERRUPT was sent, its stop has not come yet."""
    listening: bool = False
    """It is in a group-stop (ptrace(2), PTRACE_LISTEN)."""
    stop_again: bool = False
    """It left a group-stop to tell of a breakpoint, and goes back there before it runs."""
    again: tuple[int, float, float] | None = None
    """(ip, first and last time) of a system call that was begun again: see ``Stepper.begin_again``."""
    held: bool = False
    """Stopped by us and not to be let go yet."""
    uncounted: list[int] | None = None
    """Its registers where it will run through a site again, in the middle of a repeated instruction: that was counted."""
    blocked: int = 0
    """Signals that it blocked when it was last looked at, where SIGTRAP was one of them; else 0. An int3 makes the kernel
    unblock SIGTRAP (kernel/signal.c, force_sig_info_to_task), which is put right at the stop."""

    def cpu(self) -> int:
        """Returns the CPU it last ran on (proc_pid_stat(5), fields 39, 41); -1 when it is gone, or scheduled in real time:
        beside such a thread nobody else may run on its CPU."""
        try:
            fields = procfs.stat_fields(self.process.id.pid, self.tid)
            return int(fields[36]) if fields[38] == b"0" else -1
        except (OSError, ValueError, IndexError):
            return -1


@dataclass(frozen=True)
class Awaited:
    mapper: Mapper
    settle: bool
    """Whether the process was seized, for it or before, and has not settled since."""


@dataclass(eq=False)
class TracedProcess:
    id: ProcessId
    memory: AddressSpace
    threads: dict[int, Thread] = field(default_factory=dict)
    comm: str = ""
    held: bool = False
    """A launched command before its release: it is followed whatever is wanted."""
    lingering: bool = False
    """Nothing is wanted in it any more; it will be let go when that needs no stop."""
    released: bool = False
    """Lingering, and every thread was seen where nothing of ours can reach it: any stop may be its last."""
    unsettled: bool = False
    """Threads were seized, and not all of them have been seen outside of a fork since that may have begun before."""
    dirty: bool = True
    """Something was written since its threads were last asked to settle."""
    hooked: bool = False
    """Its loader reports what it maps."""
    awaited: dict[int, Awaited] = field(default_factory=dict)
    """Threads that are held as they map a file, by tid: when they go on they stop, and it is looked at what is wanted."""
    execs: int = 0
    """Images it took on since it is followed."""
    retry_at: float = 0.0
    """CLOCK_MONOTONIC seconds before which it is not tried again to release it."""

    @classmethod
    def open(cls, pid: int, memory: AddressSpace | None = None) -> TracedProcess:
        """Raises ProcessLookupError, PermissionError."""
        identity, comm = ProcessId(pid, procfs.start_time(pid)), procfs.comm(pid)
        return cls(identity, memory or AddressSpace(pid), comm=comm)

    def add(self, tid: int) -> Thread:
        thread = self.threads.get(tid)
        if thread is None:
            thread = self.threads[tid] = Thread(tid, self)
        return thread

    def live_task(self) -> int:
        """Returns a thread that has memory: of a leader that has ended before the others nobody is told until they have too.
        Any thread; asks nobody."""
        return next((tid for tid in list(self.threads) if tid != self.id.pid), self.id.pid)

    def lives(self) -> bool:
        """Whether it has not ended, as far as that is to be known now."""
        try:
            procfs.live_task(self.id.pid)
        except ProcessLookupError:
            return False
        except OSError:
            pass  # not to be known now
        return True

    def drop(self, tid: int) -> None:
        self.threads.pop(tid, None)
        self.awaited.pop(tid, None)
