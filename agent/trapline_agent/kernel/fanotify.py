"""fanotify(7) permission events: whoever reads or maps a marked file waits until this process has answered.

``FAN_PRE_ACCESS`` (Linux 6.14 or later: ext4, xfs, btrfs; tmpfs and overlayfs refuse it) comes at read(2), at mmap(2)
*before* the mapping is there, and in execve(2) at the reads of the header and again at each segment that is mapped
(include/linux/fsnotify.h, fsnotify_mmap_perm). A page fault on what is mapped already waits for nobody, nor does O_PATH.

When the last descriptor of a group is closed, all who wait go on (fs/notify/fanotify/fanotify_user.c, fanotify_release):
so it is to be open in one process alone, whose end is enough to free everybody.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

_CLOEXEC, _NONBLOCK, _CLASS_PRE_CONTENT, _REPORT_TID = 0x1, 0x2, 0x8, 0x100
_MARK_ADD, _MARK_REMOVE = 0x1, 0x2
_PRE_ACCESS, _Q_OVERFLOW = 0x10_0000, 0x4000
_AT_FDCWD = -100
_ALLOW: Final = 1
# event_len vers reserved metadata_len mask fd pid
_EVENT = struct.Struct("=IBBHQii")
_RESPONSE = struct.Struct("=iI")
_READ_BYTES = 16 * 64
"""A read makes a descriptor for each event that it returns, and denies what it has none for: so few at a time."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fanotify_mark.argtypes = [ctypes.c_int, ctypes.c_uint, ctypes.c_uint64, ctypes.c_int, ctypes.c_char_p]


@dataclass(frozen=True)
class Access:
    """Somebody waits."""

    fd: int
    """Of the file; names the event. It goes with ``Group.allow``."""
    tid: int
    """The thread that waits; 0: of another pid namespace."""


class Overflow:
    """Accesses were let through untold: the queue was full."""


def _fail(what: str) -> OSError:
    code = ctypes.get_errno()
    return OSError(code, f"{what}: {os.strerror(code)}")


class Group:
    """A fanotify group for pre-content events. One thread."""

    def __init__(self) -> None:
        """Raises OSError: EPERM without CAP_SYS_ADMIN, EINVAL or ENOSYS where the kernel knows nothing of it."""
        self.fd = int(_libc.fanotify_init(_CLASS_PRE_CONTENT | _CLOEXEC | _NONBLOCK | _REPORT_TID, os.O_CLOEXEC))
        if self.fd < 0:
            raise _fail("fanotify_init")

    def mark(self, fd: int) -> None:
        """Has accesses to a file told, until ``unmark``.

        Args:
            fd: any descriptor of it, O_PATH too.

        Raises:
            OSError: EOPNOTSUPP on a file system that has no such events, EINVAL on a kernel that has none.
        """
        self._mark(_MARK_ADD, fd)

    def unmark(self, fd: int) -> None:
        """Ends ``mark``. Raises OSError: ENOENT where there is no mark."""
        self._mark(_MARK_REMOVE, fd)

    def _mark(self, action: int, fd: int) -> None:
        # By path: as a directory descriptor one that was opened with O_PATH is refused (fanotify_find_path, fdget).
        path = f"/proc/self/fd/{fd}".encode()
        if _libc.fanotify_mark(self.fd, action, _PRE_ACCESS, _AT_FDCWD, path) < 0:
            raise _fail("fanotify_mark")

    def read(self) -> Iterator[Access | Overflow]:
        """Yields some of those who wait; never blocks. Each is to be allowed in the end."""
        try:
            data = os.read(self.fd, _READ_BYTES)
        except BlockingIOError:
            return
        at = 0
        while at + _EVENT.size <= len(data):
            length, _, _, _, mask, fd, tid = _EVENT.unpack_from(data, at)
            if fd >= 0:
                yield Access(fd, tid)
            elif mask & _Q_OVERFLOW:
                yield Overflow()
            at += length

    def allow(self, access: Access) -> None:
        """Lets one go on, and closes the event's descriptor."""
        with contextlib.suppress(FileNotFoundError):  # killed meanwhile
            os.write(self.fd, _RESPONSE.pack(access.fd, _ALLOW))
        os.close(access.fd)

    def close(self) -> None:
        """Lets all go on who wait."""
        os.close(self.fd)


def unsupported() -> str:
    """Tries it, on a file that nobody else can have; returns why it does not work here, or an empty string."""
    try:
        group = Group()
    except OSError as e:
        if e.errno == errno.EPERM:
            return "fanotify needs CAP_SYS_ADMIN"
        return str(e.strerror)
    fd = os.memfd_create("trapline-try", os.MFD_CLOEXEC)
    try:
        group.mark(fd)
    except OSError as e:
        # On tmpfs: known, but not for this file system. A kernel that does not know it calls the mask invalid.
        if e.errno == errno.EOPNOTSUPP:
            return ""
        return "the kernel has no pre-access events (Linux 6.14 has)" if e.errno == errno.EINVAL else str(e.strerror)
    finally:
        os.close(fd)
        group.close()
    return ""
