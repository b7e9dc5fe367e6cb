"""The synchronous hook: whoever maps a probed file executable waits until the tracer follows it (semantics P3, P4).

The answerer (``answerer``) tells of each such thread. The tracer seizes the process while the thread is blocked and only
then has it allowed: a mapper stops at the end of its mmap, a new image at the end of its execve, before they run a single
instruction, and are armed there. Nobody waits for a seize but this module's worker, and it for no longer than the deadline:
after that the answerer lets the mapper go on by itself, and the target is said to *may have missed* calls.

Two threads: one that reads what the answerer says and ends it when it does not answer, one that has processes followed.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import queue
import re
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping

from trapline_agent.kernel import fanotify
from trapline_agent.plans import FileKey
from trapline_agent.targets import maps
from trapline_agent.tracer.answerer import DEADLINE_S, LIMIT_S, REQUEST, TOLD, Kind

log = logging.getLogger(__name__)

_MARGIN = 0.8
"""A mapper is not stopped later than this part of the answerer's deadlines: it might have gone on and be blocked elsewhere,
where a stop would be felt (EINTR, semantics P5)."""
_ANSWERED_S = 0.2
"""How long the confirmation may take that it was us who let a mapper go on."""
_PING_S = 0.5
_PONG_S = 1.0
"""An answerer that does not answer for so long is ended: that frees all who wait for it."""
_START_S = 10.0
_JOIN_S = 1.0
_MAX_ENDS = 3
"""After so many ends of answerers it is given up."""
_SHARED = re.compile(r"(ld|libc)[-.].*so")
"""Names of dynamic loaders and C libraries, in containers too."""


class Held:
    """One thread that waits in mmap or execve; the engine's threads ask it how it went."""

    def __init__(self, event: str, pid: int, tid: int, read: float) -> None:
        self.event = event
        self.pid = pid
        self.read = read
        """CLOCK_MONOTONIC seconds at which it was seen to wait."""
        self.tid = tid
        self.file = FileKey("", 0)
        self.deadline = read
        """CLOCK_MONOTONIC seconds after which the thread must not be stopped any more."""
        self.late = True
        self.answered = threading.Event()

    def cause(self) -> str:
        """Says what found the mapping, once the thread has gone on; ``-late`` where it may have run before it was stopped.
        Waits a moment for the answerer's word: only it knows whether it was told in time. A new image stops in any case, if
        it was seized before its execve ended."""
        if self.event == "exec":
            return "exec:fanotify"
        self.answered.wait(_ANSWERED_S)
        return f"{self.event}:fanotify{'-late' if self.late else ''}"


class MapperHook:
    """See the module. Methods but ``close`` and ``sync`` may be called by any thread; those by the one that made it."""

    name = "fanotify"

    def __init__(
        self,
        *,
        is_meant: Callable[[int, FileKey], bool],
        hold: Callable[[Held], bool],
        on_late: Callable[[Held], None],
        on_lost: Callable[[], None],
    ) -> None:
        """
        Args:
            is_meant: whether anything may be wanted in a process (pid) once it has mapped a file.
            hold: has a process followed and the thread stopped when it goes on; False where there is no need. May raise
                OSError. Called by this hook's worker.
            on_late: it could not be, or not in time: it is to be looked at after the fact. Must not block.
            on_lost: mappings may have been missed, or the answerer has to be started again (``sync``). Must not block.
        """
        self._is_meant = is_meant
        self._hold = hold
        self._on_late = on_late
        self._on_lost = on_lost
        self.reason = fanotify.unsupported()
        """Why it does not work here; empty if it does."""
        self.refused: dict[FileKey, str] = {}
        """Files that are wanted and have no mark, and why."""
        self._marked: dict[FileKey, int] = {}
        """Descriptors."""
        self._by_stat: dict[tuple[int, int], FileKey] = {}
        self._spared: tuple[int, ...] = ()
        self._ends = 0
        self._answerer: _Answerer | None = None

    @property
    def available(self) -> bool:
        return not self.reason

    @property
    def pid(self) -> int:
        """The answerer's; 0 where there is none. It is one of Trapline's own (semantics P11)."""
        return self._answerer.process.pid if self._answerer is not None else 0

    def spare(self, pids: frozenset[int]) -> None:
        """Sets Trapline's own processes: they are never held."""
        self._spared = tuple(sorted(pids))
        if self._answerer is not None:
            self._answerer.spare(self._spared)

    def sync(self, wanted: Mapping[FileKey, int], loaders: Mapping[FileKey, object]) -> None:
        """Marks what is wanted and has no mark, and takes the others away; on return the marks are in force.

        Args:
            wanted: probed files with a descriptor of each (O_PATH is fine).
            loaders: dynamic loaders, which are never marked.
        """
        for file in [f for f in self._marked if f not in wanted]:
            fd = self._marked.pop(file)
            with contextlib.suppress(OSError):
                if self._answerer is not None:
                    self._answerer.request(Kind.UNMARK, fd)
            os.close(fd)
        self.refused = {f: why for f, why in self.refused.items() if f in wanted}
        # Before the marks: from each on there may be somebody who waits. Replaced, never changed: the worker reads it.
        by_stat = {file: os.fstat(fd) for file, fd in wanted.items()}
        self._by_stat = {(found.st_dev, found.st_ino): file for file, found in by_stat.items()}
        own: frozenset[FileKey] | None = None
        if self._answerer is not None and self._answerer.ended:
            self._give_up()
        if self.reason:
            return
        for file, fd in wanted.items():
            if file in self._marked or file in self.refused:
                continue
            own = self._own_files() if own is None else own
            why = self._why_not(file, fd, own, loaders)
            if not why and not self.reason:
                why = self._mark(file, fd)
            if why:
                self.refused[file] = why

    def _own_files(self) -> frozenset[FileKey]:
        found: set[FileKey] = set()
        for pid in (os.getpid(), *self._spared, self.pid):
            with contextlib.suppress(OSError):
                found |= {m.file for m in maps.executable_mappings(pid)}
        return frozenset(found)

    @staticmethod
    def _why_not(file: FileKey, fd: int, own: frozenset[FileKey], loaders: Mapping[FileKey, object]) -> str:
        path = os.readlink(f"/proc/self/fd/{fd}")
        if file in own:
            return "Trapline itself has it mapped"
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(fd), os.stat(sys.executable)):
                return "Trapline itself is started from it"  # the interpreter, upgraded since this one began
        if file in loaders or _SHARED.match(os.path.basename(path)):
            return "nearly every process of the host maps it"
        if os.fstat(fd).st_ino != file.inode:
            return f"{path} leads to another file here"
        return ""

    def _mark(self, file: FileKey, fd: int) -> str:
        try:
            if self._answerer is None:
                self._answerer = self._start()
            self._answerer.request(Kind.MARK, fd)
        except OSError as e:
            if e.errno == errno.EOPNOTSUPP:
                return "its file system has no pre-access events (tmpfs and overlayfs have none)"
            if self._answerer is None:
                self.reason = f"the answerer cannot be started: {e.strerror or e}"
            elif self._answerer.ended:
                return ""  # it is told of by ``on_lost``, and all is marked again then
            return str(e.strerror or e)
        if file not in self._marked:
            self._marked[file] = os.dup(fd)
        return ""

    # --- the answerer's life -----------------------------------------------------------------------------------------

    def _start(self) -> _Answerer:
        answerer = _Answerer(self._told, self._on_lost, watched=lambda: bool(self._marked))
        answerer.spare(self._spared)
        return answerer

    def _give_up(self) -> None:
        """The answerer has ended, and the marks with it. Another one takes its place, unless it keeps happening."""
        self._forget_answerer()
        self._ends += 1
        if self._ends >= _MAX_ENDS:
            self.reason = f"its answerer ended {self._ends} times"
            log.error("the synchronous hook is given up: %s", self.reason)

    def _forget_answerer(self) -> None:
        for fd in self._marked.values():
            os.close(fd)
        self._marked.clear()
        if self._answerer is not None:
            self._answerer.close()
            self._answerer = None

    def _told(self, held: Held, file: tuple[int, int]) -> bool:
        """On the worker: has a waiting thread's process followed where something is wanted there."""
        key = self._by_stat.get(file)
        if key is None:
            return False
        held.file = key
        if held.answered.is_set() or time.monotonic() > held.deadline:
            # Not asked who it is: it may have ended by now, and its calls with it.
            self._on_late(held)
            return False
        if not self._is_meant(held.pid, key):
            return False
        try:
            return self._hold(held)
        except OSError as e:
            # Gone, traced by another, or we were too slow: a look after the fact says what became of it.
            log.info("process %d is not followed as it maps: %s", held.pid, e)
            self._on_late(held)
            return False

    def close(self) -> None:
        """Lets all go on who wait, and ends the answerer."""
        self.reason = self.reason or "the tracer ends"
        self._forget_answerer()


class _Answerer:
    """One answerer process, and the two threads that serve it."""

    def __init__(
        self,
        told: Callable[[Held, tuple[int, int]], bool],
        on_end: Callable[[], None],
        watched: Callable[[], bool],
    ) -> None:
        """Starts it. Call it on the main thread, with which it ends (prctl(2), PR_SET_PDEATHSIG). Raises OSError."""
        self._told = told
        self._on_end = on_end
        self._watched = watched
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "trapline_agent.tracer.answerer", str(theirs.fileno()), str(os.getpid())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
            )
        self._socket = ours
        self._lock = threading.Lock()
        self._number = 0
        self._requests: dict[int, queue.SimpleQueue[int]] = {}
        self._held: dict[int, Held] = {}
        self._work: queue.SimpleQueue[tuple[int, Held, tuple[int, int]] | None] = queue.SimpleQueue()
        self._pinged = 0.0
        self._ping = 0
        self.ended = False
        self._threads = [
            threading.Thread(target=self._read, name="trapline-answers", daemon=True),
            threading.Thread(target=self._serve, name="trapline-mappers", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    # --- any thread --------------------------------------------------------------------------------------------------

    def spare(self, pids: tuple[int, ...]) -> None:
        body = b"".join(pid.to_bytes(4, "little") for pid in pids)
        with contextlib.suppress(OSError):
            self._socket.send(REQUEST.pack(Kind.SPARE, 0) + body)

    def request(self, kind: Kind, fd: int) -> None:
        """Marks or unmarks. Raises OSError with the kernel's errno, or EPIPE where the answerer has ended."""
        reply: queue.SimpleQueue[int] = queue.SimpleQueue()
        with self._lock:
            self._number += 1
            number = self._number
            self._requests[number] = reply
        try:
            socket.send_fds(self._socket, [REQUEST.pack(kind, number)], [fd])
            code = errno.EPIPE if self.ended else reply.get(timeout=_START_S)
        except queue.Empty:
            code = errno.ETIMEDOUT
        finally:
            with self._lock:
                self._requests.pop(number, None)
        if code:
            raise OSError(code, os.strerror(code))

    def close(self) -> None:
        """Ends it. The threads have ended on return, but for one that hangs with a process that it is to have followed: the
        lease must not wait for that."""
        self.kill()
        self._work.put(None)
        for thread in self._threads:
            thread.join(_JOIN_S)
        self.process.wait()
        self._socket.close()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()

    # --- the thread that reads ---------------------------------------------------------------------------------------

    def _read(self) -> None:
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        started = time.monotonic()
        try:
            while True:
                if poll.poll(_PING_S * 1000 if self._watched() else 1000):
                    data = self._socket.recv(TOLD.size)
                    if not data:
                        return
                    started = 0.0
                    self._heard(*TOLD.unpack(data))
                self._watch(started)
        except OSError:
            return
        finally:
            self._ended()

    def _watch(self, started: float) -> None:
        now = time.monotonic()
        patience = _START_S if started else _PONG_S
        if self._ping:
            if now - self._pinged > patience:
                log.error("the answerer (pid %d) does not answer: it is ended", self.process.pid)
                self.kill()
        elif self._watched() and now - self._pinged > _PING_S:
            with self._lock:
                self._number += 1
                self._ping = self._number
            self._pinged = now
            with contextlib.suppress(BlockingIOError):
                self._socket.send(REQUEST.pack(Kind.PING, self._ping), socket.MSG_DONTWAIT)

    def _heard(self, kind: int, number: int, error: int, pid: int, tid: int, dev: int, ino: int, ns: int) -> None:
        if kind == Kind.DONE:
            if number == self._ping:
                self._ping = 0
            with self._lock:
                reply = self._requests.get(number)
            if reply is not None:
                reply.put(error)
        elif kind in (Kind.MMAP, Kind.EXEC):
            held = Held("mmap" if kind == Kind.MMAP else "exec", pid, tid, ns / 1e9)
            self._held[number] = held
            self._work.put((number, held, (dev, ino)))
        elif kind == Kind.ANSWERED:
            if (answered := self._held.pop(number, None)) is not None:
                answered.late = bool(error)
                answered.answered.set()
        elif kind == Kind.LOST:
            self._on_end()

    def _ended(self) -> None:
        self.ended = True
        for held in self._held.values():
            held.answered.set()
        with self._lock:
            for reply in self._requests.values():
                reply.put(errno.EPIPE)
        self._on_end()

    # --- the thread that has mappers followed ------------------------------------------------------------------------

    def _serve(self) -> None:
        allowed = 0.0
        while (item := self._work.get()) is not None:
            number, held, file = item
            # The answerer counts from our last sign of life; this is a little stricter.
            held.deadline = min(held.read + _MARGIN * LIMIT_S, max(held.read, allowed) + _MARGIN * DEADLINE_S)
            try:
                self._told(held, file)
            except Exception:
                log.exception("the mapper %d failed", held.tid)
            allowed = time.monotonic()
            with contextlib.suppress(OSError):
                self._socket.send(REQUEST.pack(Kind.ALLOW, number))
