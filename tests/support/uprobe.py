"""The kernel's own uprobes, as an oracle: perf_event_open(2) with the PMU ``uprobe``, counting on every CPU.

Never on an instruction that Trapline has a breakpoint on: the kernel takes another's int3 for its own, and later puts the
file's byte there.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

PMU = Path("/sys/bus/event_source/devices/uprobe/type")
_SYS_PERF_EVENT_OPEN = 298  # x86-64
_ATTR_BYTES = 112
_RETPROBE = 1
"""Bit 0 of config: /sys/bus/event_source/devices/uprobe/format/retprobe."""
_REF_CTR_SHIFT = 32
"""The file offset of a semaphore, in config: format/ref_ctr_offset."""
_DISABLED = 1
_ENABLE = 0x2400
_CLOEXEC = 8


@contextlib.contextmanager
def kernel_count(file: Path, offset: int, *, returns: bool = False, semaphore: int = 0) -> Iterator[Callable[[], int]]:
    """Has the kernel count, in all processes, who runs the instruction at a file offset, or who returns from the function
    that begins there.

    Args:
        file: the file.
        offset: of the instruction.
        returns: whether it is about returns.
        semaphore: file offset of a counter that the kernel is to raise in each of the processes meanwhile.

    Yields:
        A function that returns the count so far.

    Raises:
        OSError: the kernel has no such events, or refuses.
    """
    path = ctypes.create_string_buffer(os.fsencode(file))
    attr = bytearray(_ATTR_BYTES)
    struct.pack_into("=II", attr, 0, int(PMU.read_text()), _ATTR_BYTES)
    struct.pack_into("=Q", attr, 8, semaphore << _REF_CTR_SHIFT | (_RETPROBE if returns else 0))
    struct.pack_into("=Q", attr, 40, _DISABLED)
    struct.pack_into("=QQ", attr, 56, ctypes.addressof(path), offset)  # config1: uprobe_path, config2: probe_offset
    buffer = (ctypes.c_char * len(attr)).from_buffer(attr)
    libc = ctypes.CDLL(None, use_errno=True)
    with contextlib.ExitStack() as opened:
        events = []
        for cpu in sorted(os.sched_getaffinity(0)):
            fd = libc.syscall(_SYS_PERF_EVENT_OPEN, buffer, -1, cpu, -1, _CLOEXEC)
            if fd < 0:
                raise OSError(ctypes.get_errno(), f"perf_event_open: {os.strerror(ctypes.get_errno())}")
            opened.callback(os.close, fd)
            events.append(fd)
        for fd in events:
            fcntl.ioctl(fd, _ENABLE, 0)
        yield lambda: sum(struct.unpack("=Q", os.read(fd, 8))[0] for fd in events)
