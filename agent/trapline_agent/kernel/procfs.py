"""What the engine asks /proc about a thread: proc(5). What vanished meanwhile raises ProcessLookupError."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable
from enum import Enum
from typing import NoReturn, TypeVar

T = TypeVar("T")

_TRIES = 3
_GONE = (errno.ENOENT, errno.ESRCH)

_SYS_CLONE, _SYS_FORK, _SYS_VFORK, _SYS_CLONE3 = 56, 57, 58, 435
_SYS_EXECVE, _SYS_EXECVEAT = 59, 322
_FORKS = frozenset((_SYS_CLONE, _SYS_FORK, _SYS_VFORK, _SYS_CLONE3))
_EXECS = frozenset((_SYS_EXECVE, _SYS_EXECVEAT))


def _raise(e: OSError, what: str) -> NoReturn:
    if e.errno in _GONE:
        raise ProcessLookupError(errno.ESRCH, "no such process", what) from e
    raise e


def tried(look: Callable[[], T]) -> T:
    """Returns what something does that may fail for want of memory or descriptors, and not the next time."""
    for _ in range(_TRIES - 1):
        try:
            return look()
        except (ProcessLookupError, PermissionError):
            raise
        except OSError:
            continue
    return look()


def read(path: str, limit: int = 1 << 16) -> bytes:
    """Reads a small file of /proc at once. Raises ProcessLookupError where the process is gone, PermissionError."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return os.read(fd, limit)
        finally:
            os.close(fd)
    except OSError as e:
        _raise(e, path)


def pids() -> list[int]:
    """Returns the processes that there are now."""
    return [int(name) for name in os.listdir("/proc") if name.isdecimal()]


def tasks(pid: int) -> list[int]:
    """Returns the thread ids of a process."""
    try:
        return [int(t) for t in os.listdir(f"/proc/{pid}/task")]
    except OSError as e:
        _raise(e, f"/proc/{pid}/task")


def stat_fields(pid: int, tid: int | None = None) -> list[bytes]:
    """Returns the fields of stat after ``comm``: index 0 is the state (field 3), 1 ppid, 19 the start time in clock ticks
    after boot (field 22), 36 the CPU it last ran on (field 39)."""
    text = read(f"/proc/{pid}/stat" if tid is None else f"/proc/{pid}/task/{tid}/stat")
    return text[text.rindex(b")") + 2 :].split()


def start_time(pid: int) -> int:
    """Clock ticks after boot; with the pid it names a process until the next boot."""
    return int(stat_fields(pid)[19])


def status(pid: int, *names: str) -> dict[str, str]:
    """Returns the named fields of /proc/PID/status; absent ones are left out."""
    wanted = {f"{n}:".encode(): n for n in names}
    found: dict[str, str] = {}
    for line in read(f"/proc/{pid}/status").splitlines():
        key, _, value = line.partition(b"\t")
        if key in wanted:
            found[wanted[key]] = value.strip().decode(errors="replace")
    return found


def comm(pid: int) -> str:
    """The process' name, at most 15 bytes."""
    return read(f"/proc/{pid}/comm").rstrip(b"\n").decode(errors="replace")


def signal_sets(tid: int) -> tuple[int, int, int]:
    """Returns the signals that a thread blocks, and that its process ignores and catches, bit n-1 for signal n."""
    fields = status(tid, "SigBlk", "SigIgn", "SigCgt")
    return int(fields["SigBlk"], 16), int(fields["SigIgn"], 16), int(fields["SigCgt"], 16)


def has_ended(pid: int, tid: int) -> bool:
    """Whether a thread is a zombie or gone: a leader may be while the others run on. Raises OSError where it cannot be
    known."""
    try:
        return stat_fields(pid, tid)[0] in (b"Z", b"X")
    except ProcessLookupError:
        return True


def has_memory(pid: int) -> bool:
    """Whether a process has an address space: kernel threads have none, nor has what has ended."""
    return not read(f"/proc/{pid}/statm").startswith(b"0 ")


def live_task(pid: int) -> int:
    """Returns a thread of a process that has not ended: its leader, or another. Raises ProcessLookupError."""
    for _ in range(_TRIES):
        if not has_ended(pid, pid):
            return pid
        for tid in tasks(pid):
            if not has_ended(pid, tid):
                return tid
        # One that was listed may have got the leader's number since, by execve.
    raise ProcessLookupError(errno.ESRCH, "no such process", str(pid))


def image(pid: int) -> tuple[int, int]:
    """Returns what tells a process' image from the one before: where its code and its stack begin (proc_pid_stat(5), fields
    26 and 28). 0 while execve is about to set it up (fs/binfmt_elf.c, load_elf_binary), and where there is no memory."""
    fields = stat_fields(pid, live_task(pid))
    return int(fields[23]), int(fields[25])


def open_memory(pid: int) -> int:
    """Opens /proc/PID/mem, to be read and written: by a thread that has it still. Raises ProcessLookupError,
    PermissionError."""

    def opened() -> int:
        path = f"/proc/{pid}/task/{live_task(pid)}/mem"
        try:
            return os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as e:
            _raise(e, path)

    for _ in range(_TRIES - 1):
        with contextlib.suppress(ProcessLookupError):  # it may have got the leader's number meanwhile
            return opened()
    return opened()


def tracer(tid: int) -> int:
    """Returns the thread id of a thread's tracer, 0 where it has none. (TracerPid names the tracing thread, not its
    process: fs/proc/array.c, task_state.)"""
    return int(status(tid, "TracerPid").get("TracerPid", "0"))


def is_own_thread(tid: int) -> bool:
    """Whether a thread is one of this process."""
    return os.path.exists(f"/proc/self/task/{tid}")


class Whereabouts(Enum):
    """Where a thread was when it was looked at."""

    RUNNING = "running"
    """On a CPU or ready to be: in user code or in the kernel, not known which."""
    FORKING = "forking"
    """Blocked inside fork, vfork or clone."""
    EXECUTING = "executing"
    """Blocked inside execve, or in the stop that ends it."""
    BLOCKED = "blocked"
    """Blocked in another system call."""
    STOPPED = "stopped"
    """Blocked outside of system calls: a page fault, an exception, a stop."""


def whereabouts(pid: int, tid: int) -> Whereabouts:
    """Reads /proc/PID/task/TID/syscall (kernel: fs/proc/base.c, proc_pid_syscall), which needs ptrace access."""
    text = read(f"/proc/{pid}/task/{tid}/syscall")
    if text.startswith(b"running"):
        return Whereabouts.RUNNING
    number = int(text.split(b" ", 1)[0])
    if number in _FORKS:
        return Whereabouts.FORKING
    if number in _EXECS:
        return Whereabouts.EXECUTING
    return Whereabouts.BLOCKED if number >= 0 else Whereabouts.STOPPED


_CLONE_VFORK = 0x4000


def waits_for_vfork(pid: int, tid: int, memory: int) -> bool:
    """Whether a thread is blocked in a vfork, or a clone with CLONE_VFORK: it goes on when its child has gone or exec'd.

    Args:
        pid: the process.
        tid: the thread.
        memory: descriptor of its /proc/PID/mem, where clone3 has its flags (clone(2), struct clone_args).
    """
    fields = read(f"/proc/{pid}/task/{tid}/syscall").split()
    if not fields[0].isdigit():
        return False
    number = int(fields[0])
    if number == _SYS_CLONE:
        return bool(int(fields[1], 16) & _CLONE_VFORK)
    if number == _SYS_CLONE3:
        try:
            return bool(int.from_bytes(os.pread(memory, 8, int(fields[1], 16)), "little") & _CLONE_VFORK)
        except OSError:
            return False
    return number == _SYS_VFORK
