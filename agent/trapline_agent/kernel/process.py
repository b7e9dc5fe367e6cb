"""What a process can ask of the kernel about itself: prctl(2)."""

from __future__ import annotations

import ctypes
import os
from typing import Final

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_DUMPABLE: Final = 4
_PR_SET_NAME: Final = 15
_PR_SET_NO_NEW_PRIVS: Final = 38
_NOBODY: Final = 65534
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


def set_name(name: str) -> None:
    """Sets what ps shows as this process' name, 15 bytes at most."""
    _libc.prctl(_PR_SET_NAME, name.encode(), 0, 0, 0)


def lock_memory(*, future: bool = True) -> None:
    """Keeps all that this process has mapped in memory: mlockall(2). Raises OSError.

    Args:
        future: also what it will map; that fails then, where it would be more than RLIMIT_MEMLOCK.
    """
    if _libc.mlockall(_MCL_CURRENT | (_MCL_FUTURE if future else 0)) < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"mlockall: {os.strerror(code)}")


def give_up_privileges() -> None:
    """Makes this process one that may do nothing: the user nobody where it is root, no gain by an exec, not to be traced by
    others of its user, no further process. Raises OSError. Clears what ``die_with_parent`` asked for (prctl(2))."""
    if _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"no_new_privs: {os.strerror(code)}")
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)
    _libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
