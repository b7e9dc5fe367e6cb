"""Failures of the kernel, put in: one call in turn, or all from one on, of those the engine makes about a traced process.

The boundary is as low as it can be: ptrace(2) and kcmp(2) where ``kernel/ptrace.py`` calls libc, pread and pwrite on
descriptors of /proc/PID/mem, and opening files of /proc/PID. waitpid is left alone: it does not fail.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from trapline_agent.kernel import ptrace
from trapline_agent.targets import maps

_REQUESTS = {
    getattr(ptrace, name): name
    for name in dir(ptrace)
    if name.startswith("PTRACE_") and not name.startswith(("PTRACE_EVENT", "PTRACE_O_"))
}
_PROC = re.compile(r"/proc/\d+/")
_KCMP = 312
_RESUMES = frozenset(("PTRACE_CONT", "PTRACE_SYSCALL", "PTRACE_SINGLESTEP", "PTRACE_DETACH", "PTRACE_LISTEN"))
"""What lets a stopped thread go on cannot fail: it is refused for no other reason than that it was killed (kernel/ptrace.c,
ptrace_resume, ptrace_detach; LISTEN where the stop is no group-stop)."""

_ERRNOS = {
    "seize": (errno.EPERM, errno.EIO),
    "ptrace": (errno.EIO,),
    "resume": (),
    "kcmp": (errno.EPERM, errno.ENOSYS),
    "pread": (errno.EIO, errno.ENOMEM),
    "pwrite": (errno.EIO, errno.ENOMEM),
    "open": (errno.EMFILE, errno.ENOMEM),
}
"""What the kernel may answer, by kind of call, where the process is there still: see ptrace(2), kcmp(2), mm/memory.c. (ESRCH
for a stopped thread means that it was killed: tests do that in earnest.)"""


@dataclass(frozen=True)
class Call:
    """One call that was made."""

    kind: str
    name: str
    """What it was about."""
    nth: int
    """The how manieth of that name, from 1: how often a running thread is looked at is another number each time."""

    def __str__(self) -> str:
        return f"{self.name} #{self.nth}"

    def errnos(self) -> tuple[int, ...]:
        return _ERRNOS[self.kind]


class Faults:
    """Counts calls while it is ``on``; fails those it was told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._lock = threading.Lock()
        self._on = False
        self._fails: Callable[[Call], int] = lambda call: 0
        self.calls: list[Call] = []
        self.failed: list[Call] = []
        self._seen: Counter[str] = Counter()
        self._patch(monkeypatch)

    def _patch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fast, slow, syscall = ptrace._fast, ptrace._slow, ptrace._syscall
        pread, pwrite, open_, read_maps = os.pread, os.pwrite, os.open, maps._read

        def at_ptrace(real: Callable[..., int]) -> Callable[..., int]:
            def call(request: int, tid: int, *rest: object) -> int:
                name = _REQUESTS.get(request, str(request))
                kind = "resume" if name in _RESUMES else "seize" if name == "PTRACE_SEIZE" else "ptrace"
                if code := self._code(kind, name):
                    ctypes.set_errno(code)
                    return -1
                return real(request, tid, *rest)

            return call

        def at_syscall(number: int, *rest: int) -> int:
            if number == _KCMP and (code := self._code("kcmp", "kcmp")):
                ctypes.set_errno(code)
                return -1
            return int(syscall(number, *rest))

        def at_pread(fd: int, n: int, offset: int) -> bytes:
            if self._on and _is_memory(fd):
                self._raise("pread", f"pread {n}")
            return pread(fd, n, offset)

        def at_pwrite(fd: int, data: bytes, offset: int) -> int:
            if self._on and _is_memory(fd):
                self._raise("pwrite", f"pwrite {len(data)}")
            return pwrite(fd, data, offset)

        def at_open(path: object, *args: object, **kwargs: object) -> int:
            if self._on and isinstance(path, str) and _PROC.match(path):
                self._raise("open", "open " + path.rpartition("/")[2])
            return open_(path, *args, **kwargs)  # type: ignore[arg-type]

        def at_maps(path: str) -> bytes:
            self._raise("open", "open maps")
            return read_maps(path)

        monkeypatch.setattr(ptrace, "_fast", at_ptrace(fast))
        monkeypatch.setattr(ptrace, "_slow", at_ptrace(slow))
        monkeypatch.setattr(ptrace, "_syscall", at_syscall)
        monkeypatch.setattr(os, "pread", at_pread)
        monkeypatch.setattr(os, "pwrite", at_pwrite)
        monkeypatch.setattr(os, "open", at_open)
        monkeypatch.setattr(maps, "_read", at_maps)

    def _code(self, kind: str, name: str) -> int:
        if not self._on:
            return 0
        with self._lock:
            self._seen[name] += 1
            call = Call(kind, name, self._seen[name])
            self.calls.append(call)
        code = self._fails(call)
        if code:
            self.failed.append(call)
        return code

    def _raise(self, kind: str, name: str) -> None:
        if code := self._code(kind, name):
            raise OSError(code, os.strerror(code), name)

    # --- what is to fail -------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def on(self, fails: Callable[[Call], int] = lambda call: 0) -> Iterator[list[Call]]:
        """Counts the body's calls, in any thread; ``fails`` says with which errno one is to fail, 0: it is made.

        Yields the calls so far, in order.
        """
        self.calls = calls = []
        self.failed = []
        self._seen = Counter()
        self._fails = fails
        self._on = True
        try:
            yield calls
        finally:
            self._on = False

    def at(self, which: Call, code: int) -> contextlib.AbstractContextManager[list[Call]]:
        """Fails a call with an errno, if it is made."""
        return self.on(lambda call: code if call == which else 0)

    def made(self, which: Call) -> bool:
        """Whether a call was made while it was last ``on``."""
        return which in self.calls

    def before(self, which: Call, act: Callable[[], object]) -> contextlib.AbstractContextManager[list[Call]]:
        """Has something happen right before a call, if it is made."""

        def at(call: Call) -> int:
            if call == which:
                act()
            return 0

        return self.on(at)


def _is_memory(fd: int) -> bool:
    try:
        return os.readlink(f"/proc/self/fd/{fd}").endswith("/mem")
    except OSError:
        return False


def worth_failing(calls: list[Call], each: int) -> list[Call]:
    """Returns the calls without long repetitions: of each name the first ones and the last, and no more than ``each``."""
    last = {call.name: call for call in calls}
    return [call for call in calls if call.nth < each or call is last[call.name]]
