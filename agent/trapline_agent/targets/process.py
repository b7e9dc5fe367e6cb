"""The processes of this host, from /proc: proc(5). Any of them may vanish between two looks; that is no error here."""

from __future__ import annotations

import functools
import os
import pwd
from collections.abc import Collection, Iterator
from typing import NamedTuple

from trapline.errors import NotFound
from trapline.model import Process
from trapline_agent.kernel import procfs
from trapline_agent.kernel.containers import container_of

_PF_KTHREAD = 0x0020_0000  # include/linux/sched.h
_CAP_SYS_PTRACE = 19
READER = "trapline_agent.debuginfo.worker"
"""The module that the agent starts to read debug information with: a process of its own."""


class ProcessFacts(NamedTuple):
    """What /proc says of a process at one moment."""

    pid: int
    start_time: int
    """Clock ticks after boot."""
    ppid: int
    comm: str
    state: str
    """``R``, ``S``, ``Z``, ...: the leader's."""
    kernel_thread: bool
    threads: int
    uid: int
    """The real user."""
    tracer_pid: int
    """The process that traces the leader; 0: none."""
    exe: str
    """Path of the program in its own mount namespace; empty where it may not be read."""
    exe_deleted: bool
    hidden: bool
    """True: the kernel does not let this process look at it (PTRACE_MODE_READ)."""

    @property
    def zombie(self) -> bool:
        """Ended, its last thread too: a leader that ended before the others still has threads."""
        return self.state in "ZX" and self.threads <= 1


@functools.cache
def boot_id() -> str:
    """Names this boot of the kernel: random_uuid, Documentation/admin-guide/sysctl/kernel.rst."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip()


def _read(path: str, limit: int = 1 << 16) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, limit)
    finally:
        os.close(fd)


def text(raw: bytes | str) -> str:
    """Returns what can be shown and sent of a name that need not be UTF-8."""
    if isinstance(raw, str):
        raw = os.fsencode(raw)
    return raw.decode("utf-8", "backslashreplace")


def pids() -> list[int]:
    """Returns the process ids that are there now, ascending."""
    return sorted(procfs.pids())


def facts(pid: int) -> ProcessFacts | None:
    """Returns what /proc says of a process, or None where there is none (any more)."""
    try:
        stat = _read(f"/proc/{pid}/stat")
        status = _read(f"/proc/{pid}/status")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The name is in parentheses and may have any character in it, parentheses too.
    close = stat.rindex(b")")
    comm = stat[stat.index(b"(") + 1 : close]
    fields = stat[close + 2 :].split()
    kernel_thread = bool(int(fields[6]) & _PF_KTHREAD)
    exe, hidden = "", False
    if not kernel_thread:
        try:
            exe = os.readlink(f"/proc/{pid}/exe")
        except PermissionError:
            hidden = True
        except OSError:
            pass  # ended, or its leader has
    return ProcessFacts(
        pid=pid,
        start_time=int(fields[19]),
        ppid=int(fields[1]),
        comm=text(comm),
        state=fields[0].decode(),
        kernel_thread=kernel_thread,
        threads=int(fields[17]),
        uid=int(_status(status, b"\nUid:") or 0),
        tracer_pid=_leader_of(int(_status(status, b"\nTracerPid:") or 0)),
        exe=exe.removesuffix(" (deleted)"),
        exe_deleted=exe.endswith(" (deleted)"),
        hidden=hidden,
    )


def _leader_of(tid: int) -> int:
    """Returns the process of a thread: TracerPid names the thread that traces, kernel: fs/proc/array.c, task_state."""
    return int(_status(_read_or_empty(f"/proc/{tid}/status"), b"\nTgid:") or tid) if tid else 0


def _status(status: bytes, key: bytes) -> bytes:
    at = status.find(key)
    return status[at + len(key) : at + len(key) + 32].split(None, 1)[0] if at >= 0 else b""


def scan() -> Iterator[ProcessFacts]:
    """Yields the processes that are there now."""
    for pid in pids():
        if (found := facts(pid)) is not None:
            yield found


def ppids() -> dict[int, int]:
    """Returns every process' parent."""
    parents: dict[int, int] = {}
    for pid in pids():
        try:
            stat = _read(f"/proc/{pid}/stat")
        except (FileNotFoundError, ProcessLookupError):
            continue
        parents[pid] = int(stat[stat.rindex(b")") + 2 :].split(None, 2)[1])
    return parents


def descends_from(pid: int, ancestor: int, parents: dict[int, int]) -> bool:
    """Says whether ``pid`` is ``ancestor`` or a descendant of it, by a snapshot of ``ppids``."""
    seen: set[int] = set()
    while pid and pid not in seen:
        if pid == ancestor:
            return True
        seen.add(pid)
        pid = parents.get(pid, 0)
    return False


def require_process(pid: int, host: str) -> ProcessFacts:
    """Returns the facts of a process. Raises NotFound where there is none, or the number is a thread's."""
    found = facts(pid)
    if found is None:
        raise NotFound(f"no process {pid} on {host}", hint="`trapline hosts` and the dashboard list the processes")
    leader = int(_status(_read_or_empty(f"/proc/{pid}/status"), b"\nTgid:") or pid)
    if leader != pid:
        raise NotFound(
            f"no process {pid} on {host}: that is a thread of process {leader}", suggestions=[f"pid={leader}"]
        )
    return found


def _read_or_empty(path: str) -> bytes:
    try:
        return _read(path)
    except OSError:
        return b""


@functools.cache
def _may_trace_any() -> bool:
    """Says whether this process has CAP_SYS_PTRACE, capabilities(7)."""
    effective = _status(_read("/proc/self/status"), b"\nCapEff:")
    return bool(int(effective, 16) >> _CAP_SYS_PTRACE & 1)


@functools.cache
def _yama_scope() -> int:
    """Documentation/admin-guide/LSM/Yama.rst; 0 where the kernel has no Yama."""
    return int(_read_or_empty("/proc/sys/kernel/yama/ptrace_scope") or 0)


def may_trace(target: ProcessFacts, tracer_pid: int = 0) -> bool:
    """Says whether a tracer that runs as this process' user may attach.

    Opening /proc/PID/mem asks the kernel the question that PTRACE_SEIZE will (ptrace(2), PTRACE_MODE_ATTACH_REALCREDS),
    but for this process; Yama's scope 1 permits a tracer its descendants too.
    """
    if target.hidden:
        return False
    if _may_trace_any():
        return True
    try:
        os.close(os.open(f"/proc/{target.pid}/mem", os.O_RDONLY | os.O_CLOEXEC))
        return True
    except PermissionError:
        pass
    except OSError:
        return True  # ended meanwhile: not for want of permission
    return (
        bool(tracer_pid)
        and _yama_scope() == 1
        and target.uid == os.getuid()
        and descends_from(target.pid, tracer_pid, ppids())
    )


def is_32_bit(pid: int) -> bool:
    """Says whether a process' program is 32-bit code; False where that cannot be known."""
    try:
        return _read(f"/proc/{pid}/exe", 5) == b"\x7fELF\x01"
    except OSError:
        return False


def thirty_two_bit(pid: int) -> tuple[str, str]:
    """Returns the refusal of a 32-bit process, as ``ineligible`` does."""
    return "ThirtyTwoBit", f"process {pid} runs 32-bit code, which this release does not probe; probe a 64-bit process"


def is_own(target: ProcessFacts, self_pids: Collection[int]) -> bool:
    """Whether a process is one of Trapline's.

    Those that read debug information come and go, and are known by their command; in the moment before that begins, as one
    of Trapline's processes twice.

    Args:
        target: the process.
        self_pids: Trapline's own processes that are known by number.
    """
    if target.pid in self_pids:
        return True
    if target.ppid not in self_pids:
        return False
    command = _read_or_empty(f"/proc/{target.pid}/cmdline")
    return READER.encode() in command.split(b"\0") or command == _read_or_empty(f"/proc/{target.ppid}/cmdline")


def ineligible(target: ProcessFacts, self_pids: Collection[int], tracer_pid: int = 0) -> tuple[str, str] | None:
    """Says why a process cannot be probed by the ptrace engine.

    Args:
        target: the process.
        self_pids: Trapline's own processes on this host.
        tracer_pid: the tracer, whose tracees are fine.

    Returns:
        A stable reason and a sentence, or None where it can be.
    """
    if target.pid == tracer_pid or is_own(target, self_pids):
        return "Self", "Trapline never probes itself"
    if target.kernel_thread:
        return "KernelThread", "a kernel thread has no user code"
    if target.zombie:
        return "Zombie", f"process {target.pid} has ended and waits for its parent"
    if target.tracer_pid and target.tracer_pid != tracer_pid and target.tracer_pid not in self_pids:
        other = facts(target.tracer_pid)
        name = f" ({other.comm})" if other else ""
        return "TracedByOther", f"process {target.pid} is traced by process {target.tracer_pid}{name}; end that first"
    if not may_trace(target, tracer_pid):
        mine = target.uid == os.getuid() and _yama_scope()
        why = f"kernel.yama.ptrace_scope is {_yama_scope()}" if mine else f"it is user {target.uid}'s"
        if target.hidden and not os.geteuid():
            why = "the kernel protects it from this user too"
        hint = "run the tracer as root or with CAP_SYS_PTRACE"
        return "PermissionDenied", f"process {target.pid} may not be traced: {why}; {hint}"
    return None


@functools.lru_cache(maxsize=1024)
def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return ""


def _describe(found: ProcessFacts, host_id: str, self_pids: Collection[int]) -> Process:
    refused = ineligible(found, self_pids)
    arguments = b"" if found.kernel_thread else _read_or_empty(f"/proc/{found.pid}/cmdline")
    return Process(
        id=f"{host_id}:{boot_id()}:{found.pid}:{found.start_time}",
        host=host_id,
        pid=found.pid,
        start_time=found.start_time,
        ppid=found.ppid,
        comm=found.comm,
        exe=text(found.exe),
        cmdline=text(arguments.rstrip(b"\0").replace(b"\0", b" "))[:4096],
        uid=found.uid,
        user=_user(found.uid),
        threads=found.threads,
        container=container_of(_read_or_empty(f"/proc/{found.pid}/cgroup")),
        eligible=refused is None,
        reason=refused[0] if refused else "",
    )


def list_processes(host_id: str, self_pids: Collection[int] = ()) -> list[Process]:
    """Returns every process of this host as the API shows it.

    Args:
        host_id: the host's id, part of each process' id.
        self_pids: Trapline's own processes, tracer included: shown, but not eligible.
    """
    return [_describe(found, host_id, self_pids) for found in scan()]
