"""The reader process as the agent sees it: started when it is asked, replaced when it ends, ended when it is not wanted."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

import msgspec

from trapline.errors import ProtocolError, ResolveError, TraplineError
from trapline_agent.debuginfo import messages
from trapline_agent.debuginfo.messages import Answer, Failure, Open, Request
from trapline_agent.targets.process import READER

DEADLINE_S: Final = 60.0
"""For one request."""
_T = TypeVar("_T")
_decoder: Final = msgspec.msgpack.Decoder(Answer | Failure)

# A child is told of its parent's death when the thread that made it ends (PR_SET_PDEATHSIG): this one does not.
_starter: Final = ThreadPoolExecutor(max_workers=1, thread_name_prefix="trapline-debug")


class NotRunning(Exception):
    """The process has not been started, or ended while nobody asked."""


class RemoteReader:
    """Reads one file. Any thread may ask; requests are answered one after the other."""

    def __init__(self, path: str, program: int, debug: int | None, alternate: int | None) -> None:
        """
        Args:
            path: for messages.
            program: descriptor of the file that is mapped to run; it becomes this object's, as the others do.
            debug: of the file with its debug information, where that is another.
            alternate: of what dwz moved a part of that to.
        """
        self._path = path
        self._descriptors = (program, -1 if debug is None else debug, -1 if alternate is None else alternate)
        self._process: subprocess.Popen[bytes] | None = None
        self._stream: socket.socket | None = None
        self._lock = threading.Lock()
        self._closed = False

    def start(self, request: Open, deadline_s: float) -> bytes | None:
        """Starts the process anew and has it open the file. Returns the index that it made. Raises as ``ask``."""
        with self._lock:
            self._end()
            if self._closed:
                raise ResolveError(f"{self._path} was closed")
            ours, theirs = socket.socketpair()
            with theirs:
                arguments = (theirs.fileno(), os.getpid(), *self._descriptors)
                try:
                    self._process = _starter.submit(_spawn, [str(a) for a in arguments]).result()
                except OSError as e:
                    ours.close()
                    raise ResolveError(
                        f"the process that reads debug information cannot be started: {e.strerror}",
                        reason="DebugInfoUnreadable",
                    ) from e
            self._stream = ours
            try:
                return self._ask(request, bytes | None, deadline_s)  # type: ignore[arg-type]
            except TraplineError:
                self._end()
                raise

    @property
    def running(self) -> bool:
        return self._process is not None

    @property
    def pid(self) -> int:
        """The process'; 0 where there is none."""
        return self._process.pid if self._process is not None else 0

    def ask(self, request: Request, kind: type[_T], deadline_s: float) -> _T:
        """Returns the answer to a request.

        Raises:
            NotRunning: ``start`` it.
            TraplineError: what the reader says.
            ResolveError: it ended over the request, or took too long; it is gone then.
        """
        with self._lock:
            if self._process is not None and self._process.poll() is not None:  # while nobody asked
                self._end()
            if self._process is None:
                raise NotRunning
            return self._ask(request, kind, deadline_s)

    def _ask(self, request: Request, kind: type[_T], deadline_s: float) -> _T:
        assert self._stream is not None
        try:
            self._stream.settimeout(deadline_s)
            messages.send(self._stream, request)
            data = messages.receive(self._stream, time.monotonic() + deadline_s)
            if data is None:
                raise self._failed(self._how_it_ended())
            answer = _decoder.decode(data)
            if isinstance(answer, Failure):
                raise self._named(TraplineError.from_wire(answer.error))
            return msgspec.msgpack.decode(answer.result, type=kind)
        except TimeoutError:
            raise self._failed(f"it took longer than {deadline_s:g} s") from None
        except OSError:
            raise self._failed(self._how_it_ended()) from None
        except (msgspec.MsgspecError, ProtocolError, TypeError) as e:
            raise self._failed(f"the answer means nothing ({e})") from None

    def _named(self, error: TraplineError) -> TraplineError:
        error.detail = f"{self._path}: {error.detail}"
        return error

    def _failed(self, why: str) -> ResolveError:
        self._end()
        return ResolveError(
            f"the debug information of {self._path} cannot be read: {why}",
            reason="DebugInfoUnreadable",
            hint="it may be damaged; probe without names of its own: symbols, registers, offsets",
        )

    def _how_it_ended(self) -> str:
        assert self._process is not None
        try:
            status = self._process.wait(5)
        except subprocess.TimeoutExpired:
            return "its reader hung up"
        if status < 0:
            with contextlib.suppress(ValueError):
                return f"its reader was ended by {signal.Signals(-status).name}"
        return f"its reader ended with status {status}"

    def _end(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def stop(self) -> None:
        """Ends the process, but not while it is asked; the next request starts another."""
        if self._lock.acquire(blocking=False):
            try:
                self._end()
            finally:
                self._lock.release()

    def close(self) -> None:
        """Ends the process for good, and closes the descriptors."""
        with self._lock:
            self._end()
            if not self._closed:
                self._closed = True
                for fd in self._descriptors:
                    if fd >= 0:
                        os.close(fd)


def _spawn(arguments: list[str]) -> subprocess.Popen[bytes]:
    descriptors = (int(arguments[0]), *(int(a) for a in arguments[2:] if int(a) >= 0))
    return subprocess.Popen(
        [sys.executable, "-m", READER, *arguments],
        pass_fds=descriptors,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        # numpy's linear algebra would take threads and their memory.
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "LC_ALL": "C.UTF-8"},
        cwd="/",
    )
