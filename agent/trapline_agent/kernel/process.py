"""What a process can ask of the kernel about itself: prctl(2)."""

from __future__ import annotations

import ctypes
import os
from typing import Final

_PR_SET_PDEATHSIG: Final = 1
_MCL_CURRENT, _MCL_FUTURE = 1, 2
_libc = ctypes.CDLL(None, use_errno=True)


def die_with_parent(parent: int, signal: int) -> None:
    """Has this process signalled when the thread that made it ends (PR_SET_PDEATHSIG). For a fresh child, before its exec.

    Args:
        parent: the pid that the parent has; if it ended already, this process exits with 127.
        signal: what to get.
    """
    _libc.prctl(_PR_SET_PDEATHSIG, signal, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(127)


def lock_memory() -> None:
    """Keeps all that this process has mapped, and will map, in memory: mlockall(2). Raises OSError."""
    if _libc.mlockall(_MCL_CURRENT | _MCL_FUTURE) < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"mlockall: {os.strerror(code)}")
