"""Commands that the tracer starts itself, held before their first instruction.

As our children they may be traced by an ordinary user where Yama restricts tracing to descendants
(Documentation/admin-guide/LSM/Yama.rst).
"""

from __future__ import annotations

import os
import signal
import struct
from collections.abc import Callable
from dataclasses import dataclass

from trapline.errors import EngineError, NotFound
from trapline_agent.kernel.process import die_with_parent
from trapline_agent.tracer.messages import Launch

_ERRNO = struct.Struct("=i")


@dataclass
class Command:
    """A launched command."""

    pid: int
    pidfd: int
    status: int | None = None
    """Its end, as os.waitstatus_to_exitcode gives it."""
    held: bool = True


def start(
    launch: Launch, hold: Callable[[int], Callable[[], None]], before_exec: Callable[[], None] = lambda: None
) -> Command:
    """Starts a command, stopped after its exec.

    Call it on the main thread: the command is killed when the thread that made it ends (prctl(2), PR_SET_PDEATHSIG).

    Args:
        launch: what to start.
        hold: ``PtraceEngine.hold``.
        before_exec: called in the child.

    Raises:
        NotFound: there is no such program.
        EngineError: it cannot be started or traced.
    """
    if not launch.argv or not launch.argv[0]:
        raise EngineError("there is no command to start", hint="name a program")
    go_r, go_w = os.pipe()
    error_r, error_w = os.pipe()
    tracer = os.getpid()
    pid = os.fork()
    if pid == 0:
        _become(launch, before_exec, tracer, go_r, go_w, error_w)
    os.close(go_r)
    os.close(error_w)
    try:
        arrived = hold(pid)
        os.write(go_w, b"g")
        report = os.read(error_r, _ERRNO.size)
        if report:
            code = _ERRNO.unpack(report)[0]
            if code == 2:
                raise NotFound(f"no program `{launch.argv[0]}`", hint="give its path, or look at PATH")
            raise EngineError(f"`{launch.argv[0]}` cannot be started: {os.strerror(code)}")
        arrived()
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        raise
    finally:
        os.close(go_w)
        os.close(error_r)
    return Command(pid, os.pidfd_open(pid))


def _become(launch: Launch, before_exec: Callable[[], None], tracer: int, go_r: int, go_w: int, error_w: int) -> None:
    """The child: waits to be followed, then becomes the command. Never returns."""
    try:
        die_with_parent(tracer, signal.SIGKILL)
        os.close(go_w)
        before_exec()
        if launch.output == "null":
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, 1)
            os.dup2(null, 2)
        # What Python sets to be ignored would stay so in the command (signal(7)).
        for ignored in (signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(ignored, signal.SIG_DFL)
        os.chdir(launch.cwd)
        if not os.read(go_r, 1):
            os._exit(127)
        os.execvpe(launch.argv[0], launch.argv, launch.env)
    except OSError as e:
        os.write(error_w, _ERRNO.pack(e.errno or 0))
    except BaseException:  # noqa: BLE001 - nothing may run on in the child, whatever it was
        os.write(error_w, _ERRNO.pack(0))
    os._exit(127)
