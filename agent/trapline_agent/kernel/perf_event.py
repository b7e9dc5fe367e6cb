"""perf_event_open(2): the side-band stream of a dummy event, which tells of mappings, forks, execs and exits system-wide.

The stream is passive: nobody waits for its reader. Layouts are from include/uapi/linux/perf_event.h.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

_SYS_PERF_EVENT_OPEN: Final = 298
_TYPE_SOFTWARE, _SW_DUMMY = 1, 9
_ATTR_BYTES = 136
_FLAG_CLOEXEC = 8
# attr flag bits: mmap 8, comm 9, task 13, watermark 14, sample_id_all 18, mmap2 23, comm_exec 24.
# `wakeup_events` counts samples alone, of which a dummy event has none: without `watermark` the reader would be woken when
# half of the ring is full (kernel: events/ring_buffer.c, ring_buffer_init). With it, one byte is enough.
_SIDEBAND = 1 << 8 | 1 << 14 | 1 << 23
_SAMPLE_TID, _SAMPLE_TIME, _SAMPLE_CPU = 1 << 1, 1 << 2, 1 << 7
_DATA_HEAD = 1024
_PAGES = 64
_RECORD_LOST, _RECORD_MMAP2 = 2, 10
_HEADER = struct.Struct("=IHH")
# pid tid addr len pgoff maj min ino ino_generation prot flags
_MMAP2 = struct.Struct("=IIQQQIIQQII")
_HEAD_TAIL = struct.Struct("=QQ")
_PROT_EXEC = 4

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Mapped:
    """A process mapped a file executable."""

    pid: int
    dev: str
    """``major:minor`` as /proc/PID/maps prints it."""
    inode: int
    path: bytes


class Lost:
    """The reader was too slow: records are missing, look at everything."""


class MappingStream:
    """MMAP2 records of all processes on all CPUs. One reader."""

    def __init__(self) -> None:
        """Raises PermissionError where the kernel refuses (perf_event_paranoid, no CAP_PERFMON), and OSError where it has
        no perf events."""
        self._rings: list[tuple[int, mmap.mmap]] = []
        attr = bytearray(_ATTR_BYTES)
        struct.pack_into(
            "=IIQQQQQII",
            attr,
            0,
            _TYPE_SOFTWARE,
            _ATTR_BYTES,
            _SW_DUMMY,
            0,
            _SAMPLE_TID | _SAMPLE_TIME | _SAMPLE_CPU,
            0,
            _SIDEBAND,
            1,
            0,
        )
        buffer = (ctypes.c_char * _ATTR_BYTES).from_buffer(attr)
        try:
            for cpu in _online_cpus():
                fd = int(_libc.syscall(_SYS_PERF_EVENT_OPEN, buffer, -1, cpu, -1, _FLAG_CLOEXEC))
                if fd < 0:
                    code = ctypes.get_errno()
                    if code in (errno.EACCES, errno.EPERM):
                        raise PermissionError(code, "the kernel refuses perf events (CAP_PERFMON, perf_event_paranoid)")
                    raise OSError(code, f"perf_event_open: {os.strerror(code)}")
                try:
                    ring = mmap.mmap(fd, mmap.PAGESIZE * (1 + _PAGES))
                except OSError:
                    os.close(fd)
                    raise
                self._rings.append((fd, ring))
        except OSError:
            self.close()
            raise

    def filenos(self) -> list[int]:
        """Descriptors that become readable when there is something."""
        return [fd for fd, _ in self._rings]

    def read(self) -> Iterator[Mapped | Lost]:
        """Yields what has come since; never blocks."""
        page = mmap.PAGESIZE
        for _, ring in self._rings:
            head, tail = _HEAD_TAIL.unpack_from(ring, _DATA_HEAD)
            if head == tail:
                continue
            size = page * _PAGES
            start, count = tail % size, head - tail
            data = ring[page + start : page + min(start + count, size)]
            if len(data) < count:
                data += ring[page : page + count - len(data)]
            struct.pack_into("=Q", ring, _DATA_HEAD + 8, head)
            at = 0
            while at + _HEADER.size <= len(data):
                kind, _, length = _HEADER.unpack_from(data, at)
                if length < _HEADER.size:
                    break
                if kind == _RECORD_LOST:
                    yield Lost()
                elif kind == _RECORD_MMAP2:
                    fields = _MMAP2.unpack_from(data, at + _HEADER.size)
                    pid, major, minor, inode, prot = fields[0], fields[5], fields[6], fields[7], fields[9]
                    if inode and prot & _PROT_EXEC:
                        name = data[at + _HEADER.size + _MMAP2.size : at + length].split(b"\0", 1)[0]
                        yield Mapped(pid, f"{major:02x}:{minor:02x}", inode, name)
                at += length

    def close(self) -> None:
        for fd, ring in self._rings:
            with contextlib.suppress(BufferError):
                ring.close()
            os.close(fd)
        self._rings.clear()


def _online_cpus() -> list[int]:
    cpus: list[int] = []
    with open("/sys/devices/system/cpu/online") as f:
        for part in f.read().strip().split(","):
            first, _, last = part.partition("-")
            cpus += range(int(first), int(last or first) + 1)
    return cpus
