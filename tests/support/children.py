"""Child processes of the tests: they die with the test, say when they are ready, and answer questions about themselves.

Nothing here sleeps: every wait is for a line, an end of file or an exit, with a deadline that only a broken test meets.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

TIMEOUT_S = 30.0
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


class ChildDied(AssertionError):
    """A child ended that should have lived: for a traced program that is the worst outcome there is."""


def die_with_parent() -> Callable[[], None]:
    """Returns a ``preexec_fn`` after which the child gets SIGKILL when the calling thread ends (prctl(2))."""
    parent = os.getpid()

    def preexec() -> None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it ended before the call above
            os._exit(1)

    return preexec


class Lines:
    """Reads lines of a pipe with a deadline. Unlike a buffered file, it never blocks with data at hand."""

    def __init__(self, fd: int, name: str) -> None:
        self._fd = fd
        self._name = name
        self._buffer = b""
        self.seen: list[str] = []
        """Every line so far, for messages."""
        self._selector = selectors.DefaultSelector()
        self._selector.register(fd, selectors.EVENT_READ)

    def next(self, timeout: float = TIMEOUT_S) -> str | None:
        """Returns the next line without its end, or None at end of file. Raises TimeoutError with what was read."""
        deadline = time.monotonic() + timeout
        while b"\n" not in self._buffer:
            if not self._selector.select(max(deadline - time.monotonic(), 0)):
                raise TimeoutError(f"{self._name} said nothing for {timeout:g} s; before that: {self.seen[-20:]}")
            data = os.read(self._fd, 65536)
            if not data:
                rest, self._buffer = self._buffer, b""
                return self._keep(rest) if rest else None
            self._buffer += data
        line, self._buffer = self._buffer.split(b"\n", 1)
        return self._keep(line)

    def _keep(self, line: bytes) -> str:
        text = line.decode("utf-8", "replace")
        self.seen.append(text)
        return text

    def close(self) -> None:
        self._selector.close()


class _Popen(subprocess.Popen[bytes]):
    """Is waited for when it has ended, not before: where a thread of this very process traces it, a wait of another thread
    gets its stops too (kernel/exit.c, wait_consider_task), and the tracer never learns of them."""

    def has_ended(self, timeout_s: float | None = 0) -> bool:
        if self.returncode is not None:
            return True
        if not hasattr(self, "_pidfd"):
            try:
                self._pidfd = os.pidfd_open(self.pid)
            except ProcessLookupError:
                return True
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return bool(poll.poll(None if timeout_s is None else timeout_s * 1000))

    def _internal_poll(self, *args: object, **kwargs: object) -> int | None:
        if not self.has_ended():
            return None
        return super()._internal_poll(*args, **kwargs)  # type: ignore[misc,no-any-return]

    def _try_wait(self, wait_flags: int) -> tuple[int, int]:
        if not self.has_ended(0 if wait_flags & os.WNOHANG else None):
            return 0, 0
        return super()._try_wait(wait_flags)  # type: ignore[misc,no-any-return]

    def __del__(self, *args: object) -> None:
        with contextlib.suppress(AttributeError, OSError):
            os.close(self._pidfd)
        super().__del__(*args)  # type: ignore[misc]


class Child:
    """A running child. As a context manager it is ended on leaving; having died by a signal meanwhile is an error."""

    def __init__(
        self,
        argv: Sequence[str | Path],
        *,
        ready: str | None = "ready",
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        stderr: int | None = subprocess.PIPE,
        session: bool = False,
        timeout: float = TIMEOUT_S,
    ) -> None:
        """Starts it, and waits for a line that begins with ``ready`` (None: does not wait).

        Args:
            argv: program and arguments.
            ready: beginning of the line that says it is ready.
            env: added to this process' environment.
            cwd: its working directory.
            stderr: as for subprocess; a pipe's content is shown when something goes wrong.
            session: True gives it a session of its own.
            timeout: seconds to wait for the line.
        """
        self.argv = [str(a) for a in argv]
        self.name = Path(self.argv[0]).name
        self.popen = _Popen(
            self.argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            env={**os.environ, **(env or {})},
            cwd=cwd,
            start_new_session=session,
            preexec_fn=die_with_parent(),
        )
        assert self.popen.stdout is not None
        self.lines = Lines(self.popen.stdout.fileno(), self.name)
        if ready is not None:
            try:
                self.ready_line = self.wait_for(ready, timeout)
            except BaseException:
                self.kill()
                raise

    @property
    def pid(self) -> int:
        return self.popen.pid

    def wait_for(self, start: str, timeout: float = TIMEOUT_S) -> str:
        """Returns the next line that begins with ``start``; others before it are passed over. Raises ChildDied."""
        deadline = time.monotonic() + timeout
        while True:
            line = self.lines.next(max(deadline - time.monotonic(), 0))
            if line is None:
                raise ChildDied(self.obituary())
            if line.startswith(start):
                return line

    def ask(self, command: str, timeout: float = TIMEOUT_S) -> str:
        """Sends one command line and returns its one-line answer. Raises ChildDied."""
        self.send(command)
        line = self.lines.next(timeout)
        if line is None:
            raise ChildDied(self.obituary())
        if line.startswith("unknown"):
            raise ValueError(f"{self.name} does not know the command {command!r}")
        return line

    def send(self, command: str) -> None:
        """Sends one command line without waiting."""
        assert self.popen.stdin is not None
        try:
            self.popen.stdin.write(command.encode() + b"\n")
            self.popen.stdin.flush()
        except BrokenPipeError as e:
            raise ChildDied(self.obituary()) from e

    def count(self) -> dict[str, int]:
        """Returns the target's own counters: the oracle."""
        return fields(self.ask("count"))

    def alive(self) -> bool:
        return self.popen.poll() is None

    def wait(self, timeout: float = TIMEOUT_S) -> int:
        """Waits for its end and returns the exit status (negative: the signal)."""
        return self.popen.wait(timeout)

    def signal(self, number: int) -> None:
        self.popen.send_signal(number)

    def kill(self) -> None:
        """Ends it and reaps it; one that has ended is fine."""
        if self.popen.poll() is None:
            self.popen.kill()
        self.popen.wait(TIMEOUT_S)
        self.lines.close()
        for pipe in (self.popen.stdin, self.popen.stdout, self.popen.stderr):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()

    def obituary(self) -> str:
        """Returns how an ended child ended, and its last words."""
        status = self.popen.wait(TIMEOUT_S)
        how = f"exit status {status}" if status >= 0 else f"signal {signal.Signals(-status).name}"
        errors = self.popen.stderr.read().decode("utf-8", "replace") if self.popen.stderr is not None else ""
        return f"{self.name} ended with {how}; it had said {self.lines.seen[-5:]}; {errors[-2000:]}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        status = self.popen.poll()
        harmed = self.obituary() if kind is None and status is not None and status < 0 else ""
        self.kill()
        if harmed:
            raise ChildDied(harmed)


def fields(line: str) -> dict[str, int]:
    """Returns ``NAME=NUMBER`` words of a line."""
    words = (w.split("=", 1) for w in line.split() if "=" in w)
    return {name: int(value) for name, value in words if value.lstrip("-").isdigit()}


@contextlib.contextmanager
def python(code: str, *args: str, ready: str | None = "ready", interpreter: str = sys.executable) -> Iterator[Child]:
    """Runs Python source as a child; it should ``print("ready", flush=True)``."""
    with Child([interpreter, "-c", code, *args], ready=ready) as child:
        yield child


def run(
    argv: Sequence[str | Path], *, timeout: float = 120.0, env: Mapping[str, str] | None = None, stdin: str = ""
) -> subprocess.CompletedProcess[str]:
    """Runs a program to its end, output captured; it dies with the test. Raises subprocess.TimeoutExpired."""
    return subprocess.run(
        [str(a) for a in argv],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, **(env or {})},
        preexec_fn=die_with_parent(),
        check=False,
    )


@contextlib.contextmanager
def stopped(child: Child) -> Iterator[None]:
    """Holds a target that runs freely (commands ``start`` and ``stop``) still for the body: a stable window."""
    child.ask("stop")
    try:
        yield
    finally:
        child.ask("start")
