"""The answerer: a process that stands between the mappers of a probed file and the tracer, and answers for it in time.

Whoever maps a marked file waits for us (``kernel.fanotify``), so that the tracer can follow it before the code is there. A
late answer would hold up the host; so this is a process of its own, which does nothing else:

- it is the only one that has the fanotify descriptor: when it ends, in whatever way, everybody goes on;
- it dies with the tracer; the tracer ends it when it does not answer a ping;
- its memory is locked, its modules are loaded before the first mark, and it opens no file but in /proc afterwards;
- Trapline's own processes are answered at once, and so is whoever only reads;
- what the tracer does not answer is answered here, by a deadline, and told as late.

Which moment of an execve it is matters: while its header is read, the caller holds ``cred_guard_mutex``, which a seize
waits for. It is given up before the new image's first segment is mapped (fs/exec.c, setup_new_exec; docs/adr/0007).

Both ends speak in datagrams of one Unix socket: ``REQUEST`` of the tracer (MARK and UNMARK with a descriptor), ``TOLD`` by
us.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import struct
import sys
import time
from collections import deque
from enum import IntEnum

from trapline_agent.kernel import fanotify, procfs
from trapline_agent.kernel.process import die_with_parent, lock_memory

DEADLINE_S = 1.0
"""So long the tracer may be silent while somebody waits for it. One that works through many who wait is not silent."""
LIMIT_S = 5.0
"""So long anybody waits at most."""
_MAX_WAITING = 256
"""So many may wait for the tracer; those beyond are answered at once, and told as late."""
_ASLEEP_S = 0.1
_LOOK_AGAIN_S = 0.0001
_MAX_UNSENT = 100_000
REQUEST = struct.Struct("=BQ")
"""Kind, number."""
TOLD = struct.Struct("=BQiiiQQQ")
"""Kind, number, error or late, pid, tid, st_dev and st_ino of the file, CLOCK_MONOTONIC ns at which it was read."""
_PID = struct.Struct("=i")
_SYS_MMAP = b"9"
_EXECS = (b"59", b"322")
_PROT_EXEC = 4


class Kind(IntEnum):
    # of the tracer
    MARK = 1
    UNMARK = 2
    SPARE = 3
    """Followed by the pids that are never held."""
    ALLOW = 4
    PING = 5
    # of the answerer
    DONE = 10
    """Of MARK, UNMARK and PING by its number, with an errno."""
    MMAP = 11
    """A thread waits in mmap(PROT_EXEC), the mapping is not there yet."""
    EXEC = 12
    """A thread waits in execve, its new image has nothing of the file yet."""
    ANSWERED = 13
    """It goes on; 1: before the tracer allowed it."""
    LOST = 14
    """Some went on untold."""


class _Waiting:
    def __init__(self, access: fanotify.Access, read: float) -> None:
        self.access = access
        self.read = read


class Answerer:
    """See the module. One thread."""

    def __init__(self, tracer: socket.socket) -> None:
        self._tracer = tracer
        self._group = fanotify.Group()
        self._spared = frozenset((os.getpid(), os.getppid()))
        self._waiting: dict[int, _Waiting] = {}
        self._last = 0
        self._heard = 0.0
        """When the tracer last allowed somebody."""
        self._unsent: deque[bytes] = deque()
        """What the tracer has not been told yet."""

    def run(self) -> None:
        """Returns when the tracer has closed its end."""
        poll = select.poll()
        poll.register(self._group.fd, select.POLLIN)
        poll.register(self._tracer, select.POLLIN)
        while True:
            due = min((self._due(w) for w in self._waiting.values()), default=None)
            timeout = None if due is None else max(0.0, due - time.monotonic()) * 1000
            poll.modify(self._tracer, select.POLLIN | (select.POLLOUT if self._unsent else 0))
            for fd, ready in poll.poll(timeout):
                if fd != self._group.fd:
                    self._send()
                    if ready & ~select.POLLOUT and not self._request():
                        return
                    continue
                for event in self._group.read():
                    if isinstance(event, fanotify.Overflow):
                        self._tell(Kind.LOST)
                    else:
                        self._look_at(event)
            now = time.monotonic()
            for number in [n for n, w in self._waiting.items() if now >= self._due(w)]:
                self._allow(number, late=True)

    def _due(self, waiting: _Waiting) -> float:
        return min(max(waiting.read, self._heard) + DEADLINE_S, waiting.read + LIMIT_S)

    # --- who waits ---------------------------------------------------------------------------------------------------

    def _look_at(self, access: fanotify.Access) -> None:
        read = time.monotonic()
        kind, pid = None, 0
        if access.tid > 0:
            try:
                kind, pid = self._maps(access)
            except (ProcessLookupError, FileNotFoundError, KeyError):
                pass  # it is gone
            except (OSError, ValueError):
                self._tell(Kind.LOST)
        if kind is None:
            self._group.allow(access)
            return
        self._last += 1
        file = os.fstat(access.fd)
        self._waiting[self._last] = _Waiting(access, read)
        crowded = len(self._waiting) > _MAX_WAITING
        if crowded:
            read -= LIMIT_S
        self._tell(kind, self._last, 0, pid, access.tid, file.st_dev, file.st_ino, int(read * 1e9))
        if crowded:
            self._allow(self._last, late=True)

    def _maps(self, access: fanotify.Access) -> tuple[Kind | None, int]:
        """Returns how a thread is about to map the file executable, or None, and its process."""
        pid = int(procfs.status(access.tid, "Tgid")["Tgid"])
        if pid in self._spared:
            return None, pid
        call = self._call_of(pid, access.tid)
        if call is None:
            return Kind.MMAP, pid
        if call[0] == _SYS_MMAP:
            return (Kind.MMAP if int(call[3], 16) & _PROT_EXEC else None), pid
        if call[0] in _EXECS and self._is_fresh_image(pid, access.fd):
            return Kind.EXEC, pid
        return None, pid

    @staticmethod
    def _call_of(pid: int, tid: int) -> list[bytes] | None:
        """Returns the number and arguments of the system call that a thread waits in. On a busy machine we are told of it
        before it has gone to sleep, and the kernel says no more than that it runs; None where that lasts."""
        give_up = time.monotonic() + _ASLEEP_S
        while time.monotonic() < give_up:
            call = procfs.read(f"/proc/{pid}/task/{tid}/syscall").split()
            if call[0] != b"running":
                return call
            time.sleep(_LOOK_AGAIN_S)
        return None

    def _is_fresh_image(self, pid: int, fd: int) -> bool:
        """Whether a process in execve has left its old image and has none of the file's segments yet. Before that it must
        not be seized, after it there is no need: it was told of then."""
        exe, file = os.stat(f"/proc/{pid}/exe"), os.fstat(fd)
        if (exe.st_dev, exe.st_ino) != (file.st_dev, file.st_ino):
            return False
        # A new address space has nothing but a stack; one that executes its own program again, in the old image, has more.
        return b"/" not in procfs.read(f"/proc/{pid}/maps")

    def _allow(self, number: int, *, late: bool) -> None:
        waiting = self._waiting.pop(number, None)
        if waiting is not None:
            self._group.allow(waiting.access)
            self._tell(Kind.ANSWERED, number, int(late))

    # --- the tracer --------------------------------------------------------------------------------------------------

    def _tell(
        self,
        kind: Kind,
        number: int = 0,
        error: int = 0,
        pid: int = 0,
        tid: int = 0,
        dev: int = 0,
        ino: int = 0,
        ns: int = 0,
    ) -> None:
        if len(self._unsent) < _MAX_UNSENT:  # else it has been stopped for long, and all that it would hear is old
            self._unsent.append(TOLD.pack(kind, number, error, pid, tid, dev, ino, ns))
        self._send()

    def _send(self) -> None:
        """Sends what the socket takes, which is a few datagrams; never waits for the tracer."""
        try:
            while self._unsent:
                self._tracer.send(self._unsent[0], socket.MSG_DONTWAIT)
                self._unsent.popleft()
        except BlockingIOError:
            pass
        except OSError:
            self._unsent.clear()  # it has ended, as the next read will say

    def _request(self) -> bool:
        data, fds, _, _ = socket.recv_fds(self._tracer, 1 << 16, 1)
        if not data:
            return False
        kind, number = REQUEST.unpack_from(data)
        error = 0
        if kind == Kind.ALLOW:
            self._heard = time.monotonic()
            self._allow(number, late=False)
            return True
        if kind == Kind.SPARE:
            pids = {pid for (pid,) in _PID.iter_unpack(data[REQUEST.size :])}
            self._spared = frozenset((os.getpid(), os.getppid(), *pids))
        elif kind in (Kind.MARK, Kind.UNMARK):
            try:
                (self._group.mark if kind == Kind.MARK else self._group.unmark)(fds[0])
            except OSError as e:
                error = e.errno or 1
        for fd in fds:
            os.close(fd)
        self._tell(Kind.DONE, number, error)
        return True


def main() -> None:
    """``python -m trapline_agent.tracer.answerer DESCRIPTOR PARENT``: serves the tracer at the other end until it ends."""
    die_with_parent(int(sys.argv[2]), signal.SIGKILL)
    # A terminal's signals are for the tracer, which takes everything out and then closes the socket.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    answerer = Answerer(socket.socket(fileno=int(sys.argv[1])))
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, -20)
    try:
        lock_memory()
    except OSError as e:
        sys.exit(f"trapline-answerer: its memory cannot be locked, so that it could hold up the host: {e.strerror}")
    answerer.run()


if __name__ == "__main__":
    main()
