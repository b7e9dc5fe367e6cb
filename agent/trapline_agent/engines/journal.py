"""What an engine has written into other processes, where it outlives the engine (docs/adr/0010).

The journal is a file of fixed-size records, mapped shared: one for each instruction that is changed, entered before its
first byte is written and cleared after it was written back, without a system call. When the tracer is killed, the file
says what is left, to the guardian (``tracer.guardian``) at once, or to the next tracer.

How bytes are written back is in ``restoring``.
"""

from __future__ import annotations

import contextlib
import heapq
import mmap
import os
import socket
import struct
import threading
import zlib
from typing import NamedTuple

from trapline_agent.kernel import procfs, robust

MAGIC = b"TRAPJRNL"
VERSION = 2
HEADER_BYTES = 4096
WATCH_OFFSET = 2048
_HEADER = struct.Struct("=8sII16sQQI")
"""Magic, version, bytes of a record, boot id, inode of the pid namespace, -, CRC of all this."""
_USED = struct.Struct("=I")
_USED_OFFSET = 1024
"""Records beyond this many were never used."""
RECORD = struct.Struct("=IiIIQQQQIBB16s16sQx?")
"""CRC of the rest but for the last byte (0: free), pid, space, minor, start time, address, inode, offset in the file, major,
width, length, original, armed, address of the counter, whether that is raised."""
_RAISED = RECORD.size - 1
"""Of no CRC: one byte is written whole."""
_CRC = struct.Struct("=I")
_CHUNK = 512
"""Records by which the file grows."""
CONTEXT = 16
"""Bytes of code that a record can hold."""
FD = struct.Struct("=IB")
"""To the guardian: space, and 1 with a descriptor of its memory, 0 when it is no more."""


class Entry(NamedTuple):
    """One changed instruction in one address space."""

    pid: int
    start_time: int
    space: int
    """Number of the address space, in the life of one tracer; 0 where it is known by its process alone."""
    addr: int
    dev: tuple[int, int]
    """Major and minor, as in /proc/PID/maps."""
    inode: int
    offset: int
    """In that file, of ``addr``."""
    width: int
    """Bytes that were changed."""
    original: bytes
    """The file's code from ``addr`` on, up to ``CONTEXT`` bytes."""
    armed: bytes
    """The same as it is in memory while it is changed, as far as this record goes."""
    counter: int = 0
    """Address of the semaphore that goes with it; 0: there is none."""
    raised: bool = False
    """Whether the semaphore is raised on its account. True: it is, and ``armed`` is in memory. False: it may be still."""


class Contents(NamedTuple):
    """What a journal says."""

    entries: list[tuple[int, Entry]]
    """With their numbers."""
    damaged: int
    """Records that mean nothing: nothing was written on their account."""
    refusal: str
    """Why the file as a whole means nothing; empty if it does."""


# --- reading -----------------------------------------------------------------------------------------------------------


def parse(data: bytes, boot: bytes, namespace: int) -> Contents:
    """Reads a journal. Whatever the bytes are, this returns.

    Args:
        data: of the file.
        boot: of now, see ``boot_id``; pids of another one mean nothing.
        namespace: see ``pid_namespace``; likewise.
    """
    if not data:
        return Contents([], 0, "")
    if len(data) < HEADER_BYTES:
        return Contents([], 0, f"its header has {len(data)} of {HEADER_BYTES} bytes")
    fields = _HEADER.unpack_from(data)
    if fields[0] != MAGIC or fields[-1] != zlib.crc32(data[: _HEADER.size - 4]):
        return Contents([], 0, "its header is damaged, or it is no journal")
    if fields[1:3] != (VERSION, RECORD.size):
        return Contents([], 0, "it is of another release")
    if fields[3] != boot:
        return Contents([], 0, "")  # of before the host was started anew: there is nothing left of what it tells
    if fields[4] != namespace:
        return Contents([], 0, "its process numbers are of another pid namespace")
    entries: list[tuple[int, Entry]] = []
    damaged = 0
    used = _USED.unpack_from(data, _USED_OFFSET)[0]
    there = (len(data) - HEADER_BYTES) // RECORD.size
    if used > there:
        damaged, used = used - there, there
    for number in range(used):
        at = HEADER_BYTES + number * RECORD.size
        if data[at : at + 4] == b"\0\0\0\0":
            continue
        entry = _entry(data[at : at + RECORD.size])
        if entry is None:
            damaged += 1
        else:
            entries.append((number, entry))
    return Contents(entries, damaged, "")


def _entry(record: bytes) -> Entry | None:
    crc, pid, space, minor, start, addr, inode, offset, major, width, length, original, armed, counter, raised = (
        RECORD.unpack(record)
    )
    if crc != _crc(record[4:_RAISED]) or pid <= 0 or not 0 < width <= length <= CONTEXT or addr + length > 1 << 63:
        return None
    original, armed = original[:length], armed[:length]
    if original[width:] != armed[width:]:
        return None
    raised = raised and record[_RAISED] == 1 and counter != 0
    return Entry(pid, start, space, addr, (major, minor), inode, offset, width, original, armed, counter, raised)


def _crc(body: bytes) -> int:
    return zlib.crc32(body) or 1


def pack(entry: Entry) -> bytes:
    """Returns a record."""
    body = RECORD.pack(
        0,
        entry.pid,
        entry.space,
        entry.dev[1],
        entry.start_time,
        entry.addr,
        entry.inode,
        entry.offset,
        entry.dev[0],
        entry.width,
        len(entry.original),
        entry.original,
        entry.armed,
        entry.counter,
        entry.raised,
    )[4:]
    return _CRC.pack(_crc(body[:-1])) + body


def header(boot: bytes, namespace: int) -> bytes:
    """Returns the first bytes of a journal."""
    start = _HEADER.pack(MAGIC, VERSION, RECORD.size, boot, namespace, 0, 0)[:-4]
    return start + _CRC.pack(zlib.crc32(start))


def boot_id() -> bytes:
    """Says which start of the host this is (random(4))."""
    return bytes.fromhex(procfs.read("/proc/sys/kernel/random/boot_id").decode().strip().replace("-", ""))


def pid_namespace() -> int:
    return os.stat("/proc/self/ns/pid").st_ino


def device(text: str) -> tuple[int, int]:
    """Returns major and minor of ``major:minor`` in hex."""
    major, _, minor = text.partition(":")
    return int(major, 16), int(minor, 16)


# --- writing -----------------------------------------------------------------------------------------------------------


class Space:
    """The records of one address space. Made by ``Journal.space``; used by one thread at a time."""

    def __init__(self, journal: Journal, pid: int, start_time: int, fd: int) -> None:
        self._journal = journal
        self._pid = pid
        self._start = start_time
        self.number = 0
        self.fd = fd
        """Of the memory. To be set anew only while there are no records."""
        self._records: dict[int, tuple[int, Entry]] = {}

    def enter(self, addr: int, dev: str, inode: int, offset: int, original: bytes, armed: bytes) -> None:
        """Notes that bytes will be written. To be called before they are.

        Args:
            addr: where.
            dev: of the file that is mapped there, ``major:minor`` in hex.
            inode: of the file.
            offset: in the file.
            original: its code from there on; the first ``CONTEXT`` bytes are of use.
            armed: what will be written.

        Raises:
            OSError: the journal has no room; nothing may be written.
        """
        self.clear(addr)
        original = original[:CONTEXT]
        entry = Entry(
            self._pid,
            self._start,
            self.number,
            addr,
            device(dev),
            inode,
            offset,
            len(armed),
            original,
            armed + original[len(armed) :],
        )
        if not self._records:
            # A number of its own: what the guardian knows by the one before may be other memory.
            self.number = self._journal._show(self)
            entry = entry._replace(space=self.number)
        try:
            self._records[addr] = (self._journal._put(entry), entry)
        except OSError:
            if not self._records:
                self._journal._hide(self)
            raise

    def clear(self, addr: int) -> None:
        """Notes that nothing of ours is there any more; where nothing was, does nothing."""
        record = self._records.pop(addr, None)
        if record is not None:
            self._journal._clear(record[0])
            if not self._records:
                self._journal._hide(self)

    def raised(self, addr: int, counter: int) -> None:
        """Notes that a semaphore was raised for what is entered at an address. To be called after it was; where nothing is
        entered, does nothing. Raises OSError: the journal has no room."""
        if (record := self._records.get(addr)) is None:
            return
        number, entry = record
        if entry.counter == counter:
            self._journal._mark(number, True)
            self._records[addr] = number, entry._replace(raised=True)
            return
        # The new one first: two that say the same of the code do no harm.
        entry = entry._replace(counter=counter, raised=True)
        self._records[addr] = self._journal._put(entry), entry
        self._journal._clear(number)

    def lowered(self, addr: int) -> None:
        """Notes that a semaphore will be lowered, or is no more. To be called before it is."""
        if (record := self._records.get(addr)) is not None:
            self._journal._mark(record[0], False)
            self._records[addr] = record[0], record[1]._replace(raised=False)

    def belongs_to(self, pid: int, start_time: int) -> None:
        """Notes which process has this memory."""
        if (pid, start_time) == (self._pid, self._start):
            return
        self._pid, self._start = pid, start_time
        for addr, (number, entry) in list(self._records.items()):
            self._journal._clear(number)
            entry = entry._replace(pid=pid, start_time=start_time)
            self._records[addr] = (self._journal._put(entry), entry)

    def close(self) -> None:
        """Clears all: the memory is no more, or nobody's business any more."""
        for addr in list(self._records):
            self.clear(addr)


class Journal:
    """The tracer's end of the file. Any thread."""

    def __init__(self, fd: int) -> None:
        """Makes a journal of a file, which is emptied. Takes over the descriptor. Raises OSError where there is no room."""
        self.fd = fd
        self._lock = threading.Lock()
        self._chunks: list[mmap.mmap] = []
        self._free: list[int] = []
        self._used = 0
        self._last_space = 0
        self._shown: dict[int, int] = {}
        """Number of the space → descriptor."""
        self._guardian: socket.socket | None = None
        os.ftruncate(fd, 0)
        # Room is taken, not only promised: to write where the disk has none is a SIGBUS.
        os.posix_fallocate(fd, 0, HEADER_BYTES)
        self._head = mmap.mmap(fd, HEADER_BYTES)
        self.watch = robust.DeathWatch(self._head, WATCH_OFFSET)
        self.watch.create()
        start = header(boot_id(), pid_namespace())
        self._head[: len(start)] = start

    def __len__(self) -> int:
        """Records in use."""
        with self._lock:
            return self._used - len(self._free)

    def space(self, pid: int, start_time: int, fd: int) -> Space:
        """Returns the records of an address space, of which there are none yet."""
        return Space(self, pid, start_time, fd)

    def share(self, guardian: socket.socket | None) -> None:
        """Sends descriptors of all memory that has records, now and from now on, over a socket of datagrams.

        They only make the guardian quicker, so what the socket does not take is left out.
        """
        with self._lock:
            self._guardian = guardian
            shown = list(self._shown.items())
        for number, fd in shown:
            self._send_memory(number, fd)

    def _show(self, space: Space) -> int:
        with self._lock:
            self._last_space += 1
            number = self._last_space
            self._shown[number] = space.fd
        self._send_memory(number, space.fd)
        return number

    def _send_memory(self, number: int, fd: int) -> None:
        if (guardian := self._guardian) is not None:
            with contextlib.suppress(OSError):
                socket.send_fds(guardian, [FD.pack(number, 1)], [fd], socket.MSG_DONTWAIT)

    def _hide(self, space: Space) -> None:
        with self._lock:
            self._shown.pop(space.number, None)
            guardian = self._guardian
        if guardian is not None:
            with contextlib.suppress(OSError):
                guardian.send(FD.pack(space.number, 0), socket.MSG_DONTWAIT)

    def _put(self, entry: Entry) -> int:
        record = pack(entry)
        with self._lock:
            number = heapq.heappop(self._free) if self._free else self._grown()
            chunk, at = self._place(number)
            # The CRC last: until then the record is free.
            chunk[at + 4 : at + RECORD.size] = record[4:]
            chunk[at : at + 4] = record[:4]
        return number

    def _mark(self, number: int, raised: bool) -> None:
        with self._lock:
            chunk, at = self._place(number)
            chunk[at + _RAISED] = raised

    def _clear(self, number: int) -> None:
        with self._lock:
            chunk, at = self._place(number)
            chunk[at : at + 4] = b"\0\0\0\0"
            heapq.heappush(self._free, number)

    def _place(self, number: int) -> tuple[mmap.mmap, int]:
        index, inside = divmod(number, _CHUNK)
        return self._chunks[index], inside * RECORD.size

    def _grown(self) -> int:
        number = self._used
        if number // _CHUNK == len(self._chunks):
            size = _CHUNK * RECORD.size
            at = HEADER_BYTES + len(self._chunks) * size
            os.posix_fallocate(self.fd, at, size)
            self._chunks.append(mmap.mmap(self.fd, size, offset=at))
        self._used += 1
        _USED.pack_into(self._head, _USED_OFFSET, self._used)
        return number
