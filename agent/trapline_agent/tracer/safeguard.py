"""The tracer's end of what is done about its being killed: the journal, the guardian, and what an earlier tracer left."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import socket
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

from trapline_agent.engines import journal
from trapline_agent.engines.restoring import Outcome, restore_all
from trapline_agent.kernel.robust import DeathWatch
from trapline_agent.tracer import guardian

log = logging.getLogger(__name__)

_LOCK_S = guardian.LIMIT_S + 1.0
"""So long the guardian of an earlier tracer may be at work still."""
_LEFT_S = 10.0
"""So long taking out what an earlier tracer left may take; a process that hangs is given up then."""
_LEAST_LIFE_S = 1.0
"""A guardian that lived less long is replaced at the next look, not at once."""


class Safeguard:
    """One for a tracer."""

    def __init__(self, path: Path) -> None:
        """Takes the journal, and takes out what it says that an earlier tracer left, before anything is armed.

        Args:
            path: the journal; made with mode 0600.

        Raises:
            OSError: another tracer, or its guardian, has the journal (EBUSY).
        """
        self._path: Path | None = path
        """None: the journal has no name, and dies with the guardian and us."""
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._pidfd = -1
        self._started = 0.0
        try:
            fd = _open(path)
        except OSError as e:
            if e.errno == errno.EBUSY:
                raise
            self._do_without(e)
        else:
            _take_out_leftovers(fd, path)
            try:
                self.journal = journal.Journal(fd)
            except OSError as e:
                os.close(fd)
                self._do_without(e)
        self._sentinel = _Sentinel(self.journal.watch)

    def _do_without(self, error: OSError) -> None:
        log.warning(
            "no journal at %s (%s): what a tracer leaves that is killed with its guardian stays", self._path, error
        )
        self._path = None
        self.journal = journal.Journal(os.memfd_create("trapline-journal", os.MFD_CLOEXEC))

    @property
    def pid(self) -> int:
        """The guardian's; 0 where there is none. It is one of Trapline's own (semantics P11)."""
        return self._process.pid if self._process is not None else 0

    def start(self) -> None:
        """Starts a guardian in the place of one that ended. Raises OSError."""
        self._reap()
        self._started = time.monotonic()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        pidfd = os.pidfd_open(os.getpid())
        try:
            with theirs:
                self._process = subprocess.Popen(
                    [
                        sys.executable,
                        "-m",
                        "trapline_agent.tracer.guardian",
                        str(theirs.fileno()),
                        str(self.journal.fd),
                        str(pidfd),
                    ],
                    pass_fds=(theirs.fileno(), self.journal.fd, pidfd),
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,
                    cwd="/",
                )
        except BaseException:
            ours.close()
            raise
        finally:
            os.close(pidfd)
        self._socket = ours
        self._pidfd = os.pidfd_open(self._process.pid)
        self.journal.share(ours)

    def ended(self) -> bool:
        """Whether the guardian has ended, and may be replaced now."""
        if self._process is None or self._process.poll() is None:
            return self._process is None
        return time.monotonic() >= self._started + _LEAST_LIFE_S

    def descriptor(self) -> int:
        """Returns one that is readable when the guardian has ended."""
        return self._pidfd

    def _reap(self) -> None:
        self.journal.share(None)
        if self._process is not None:
            log.error("the guardian (pid %d) ended with status %s", self._process.pid, self._process.wait())
            self._process = None
            os.close(self._pidfd)
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def close(self) -> None:
        """To be called when all is taken out. What could not be is left to the guardian."""
        if len(self.journal):
            log.error("%d breakpoints are left to the guardian", len(self.journal))
            return
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        if self._path is not None:
            with contextlib.suppress(OSError):
                self._path.unlink()
        self._sentinel.stop()


class _Sentinel(threading.Thread):
    """Sleeps, to die first: a thread that is killed has to get to a CPU to end, which on a busy machine takes milliseconds,
    unless it goes before everybody else's."""

    def __init__(self, watch: DeathWatch) -> None:
        super().__init__(name="trapline-sentinel", daemon=True)
        self._watch = watch
        self._holds = threading.Event()
        self._end = threading.Event()
        self.start()
        self._holds.wait()

    def run(self) -> None:
        with contextlib.suppress(OSError):
            os.sched_setscheduler(threading.get_native_id(), os.SCHED_FIFO, os.sched_param(guardian.PRIORITY))
        try:
            held = self._watch.hold()
        finally:
            self._holds.set()
        self._end.wait()
        self._watch.let_go(held)

    def stop(self) -> None:
        self._end.set()
        self.join()


def _open(path: Path) -> int:
    """Opens the journal, locked. Raises OSError; EBUSY where somebody has the lock."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
            raise PermissionError(errno.EPERM, "it is no file of ours", str(path))
        deadline = time.monotonic() + _LOCK_S
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise OSError(errno.EBUSY, "another tracer, or its guardian, has the journal", str(path)) from None
                time.sleep(0.005)
        if os.fstat(fd).st_nlink == 0:  # its tracer ended in good order while we waited
            os.close(fd)
            return _open(path)
    except OSError:
        with contextlib.suppress(OSError):
            os.close(fd)
        raise
    return fd


def _take_out_leftovers(fd: int, path: Path) -> None:
    data = os.pread(fd, os.fstat(fd).st_size, 0)
    contents = journal.parse(data, journal.boot_id(), journal.pid_namespace())
    if contents.refusal:
        log.error(
            "the journal %s is not used: %s; breakpoints of an earlier tracer may be left", path, contents.refusal
        )
    if contents.damaged:
        log.error("%d records of the journal %s are damaged; their breakpoints may be left", contents.damaged, path)
    entries = [entry for _, entry in contents.entries]
    if not entries:
        return
    outcomes: list[Outcome] = []

    def restore() -> None:
        found = restore_all(entries, kin_of=entries)
        left = (entry for entry, outcome in found if outcome is Outcome.FAILED)
        guardian.report(left, "restart its process before it runs there")
        outcomes.extend(outcome for _, outcome in found)

    worker = threading.Thread(target=restore, name="trapline-leftovers", daemon=True)
    worker.start()
    worker.join(_LEFT_S)
    if worker.is_alive():
        log.error("taking out what an earlier tracer left hangs in a process, and is given up: %s", path)
        return
    counts = {outcome.value: outcomes.count(outcome) for outcome in set(outcomes)}
    log.warning("an earlier tracer was killed, and left %d breakpoints: %s", len(entries), counts)
