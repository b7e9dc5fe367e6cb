"""Files by the identity that /proc/PID/maps prints: which one a path leads to, how to open one of another process."""

from __future__ import annotations

import errno
import mmap
import os
import stat

import numpy as np

from trapline.errors import NotFound, PermissionDenied, ResolveError, Unsupported
from trapline_agent.plans import FileKey
from trapline_agent.targets.maps import Mapping
from trapline_agent.targets.process import text


def open_regular(path: str) -> int:
    """Opens a regular file to read; never waits (a FIFO would).

    Returns:
        The descriptor, which the caller closes.

    Raises:
        NotFound: there is no file.
        PermissionDenied: it may not be read.
        ResolveError: it is no regular file, or the path is malformed.
    """
    shown = text(path)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except (FileNotFoundError, NotADirectoryError) as e:
        raise NotFound(f"no file {shown}") from e
    except PermissionError as e:
        raise PermissionDenied(f"{shown} may not be read", hint="run the agent as root") from e
    except (OSError, ValueError) as e:
        raise ResolveError(f"{shown} cannot be opened: {e}") from e
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise ResolveError(f"{shown} is not a file that can be mapped", hint="name a program or a library")
    return fd


def file_key(path: str) -> FileKey:
    """Returns a file's identity as /proc/PID/maps prints it; raises as ``open_regular``."""
    fd = open_regular(path)
    try:
        return file_key_of(fd, text(path))
    finally:
        os.close(fd)


def file_key_of(fd: int, shown: str) -> FileKey:
    """Returns the identity of an open regular file.

    It is mapped here and the own map is read: stat(2) gives another device on btrfs and overlayfs (semantics P8).

    Raises:
        ResolveError: it cannot be mapped, such as an empty file.
    """
    try:
        with mmap.mmap(fd, 1, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ) as mapped:
            view = np.frombuffer(mapped, np.uint8)
            addr = view.ctypes.data
            with open("/proc/self/maps", "rb") as maps:
                for line in maps:
                    span, _, _, dev, inode, *_ = line.split(None, 5)
                    start, end = (int(x, 16) for x in span.split(b"-"))
                    if start <= addr < end:
                        del view
                        return FileKey(dev.decode(), int(inode))
            del view
    except (OSError, ValueError) as e:
        raise ResolveError(f"{shown} cannot be mapped: {e}") from e
    raise ResolveError(f"{shown} was mapped, but /proc/self/maps does not show it")


def open_mapped(pid: int, mapping: Mapping) -> int:
    """Opens the file behind another process' mapping, also in a container, deleted or replaced.

    Returns:
        The descriptor, which the caller closes.

    Raises:
        NotFound: the process or its mapping is gone, or only the deleted file had those bytes.
        PermissionDenied: the kernel does not let this process see it.
        ResolveError: what is there is not a regular file.
    """
    denied: PermissionError | None = None
    try:
        # Exact, but needs CAP_SYS_ADMIN or CAP_CHECKPOINT_RESTORE: proc_map_files_get_link, fs/proc/base.c.
        fd = os.open(f"/proc/{pid}/map_files/{mapping.start:x}-{mapping.end:x}", os.O_RDONLY | os.O_CLOEXEC)
    except PermissionError as e:
        denied = e
    except OSError as e:
        if e.errno not in (errno.ENOENT, errno.ESRCH, errno.ENXIO):
            raise ResolveError(f"{text(mapping.path)} of process {pid} cannot be opened: {e.strerror}") from e
    else:
        if stat.S_ISREG(os.fstat(fd).st_mode):
            return fd
        os.close(fd)
        raise Unsupported(f"{text(mapping.path)} of process {pid} is not a regular file", reason="NotAFile")
    for path in (f"/proc/{pid}/root{mapping.path}", mapping.path):
        try:
            fd = open_regular(path)
        except (ResolveError, PermissionDenied):
            continue
        try:
            same = file_key_of(fd, path) == mapping.file
        except ResolveError:
            same = False
        if same:
            return fd
        os.close(fd)
    if denied is not None:
        raise PermissionDenied(
            f"{text(mapping.path)} of process {pid} may not be opened", hint="run the agent as root"
        ) from denied
    raise NotFound(f"{text(mapping.path)} is no longer mapped by process {pid}")
