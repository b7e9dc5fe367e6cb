"""Writing back what an engine that was killed has left in other processes: by its journal (docs/adr/0010).

A record is of another time, and its process may be another one by now. So nothing is written but over the very bytes that
the record says were written there, and only where that is the same place still: by a descriptor of that very memory and the
code around it (``restore``), or by the process' start time and the file that is mapped there (``restore_by_name``).

Where a semaphore was raised on account of an instruction, it is lowered by whoever took the breakpoint out, after that
(``lower``): since no raise is without its breakpoint, that is done once, or not at all.
"""

from __future__ import annotations

import contextlib
import enum
import os
from collections.abc import Iterable, Mapping

from trapline_agent.engines.journal import Entry, device
from trapline_agent.kernel import procfs
from trapline_agent.plans import SEMAPHORE_BYTES
from trapline_agent.targets import maps

_DISTINCT = 8
"""So many bytes of code beside what was written say where we are."""


class Outcome(enum.Enum):
    """What became of an entry."""

    RESTORED = "restored"
    CLEAN = "clean"
    """What is there is not what was written."""
    GONE = "gone"
    """The process, or its image, is."""
    OTHER = "other"
    """Not the same file is mapped there."""
    UNSURE = "unsure"
    """The code around it is not, or not enough, to tell by it alone."""
    FAILED = "failed"
    """The kernel did not permit it."""


Claims = Mapping[int, bytes]
"""Address → armed bytes that other entries say were written in this memory."""


def claims(entries: Iterable[Entry]) -> dict[int, bytes]:
    """For ``restore``, of all entries of one address space."""
    return {e.addr: e.armed[: e.width] for e in entries}


def restore(entry: Entry, fd: int, others: Claims, *, known: bool = False) -> Outcome:
    """Writes the original bytes back where exactly the armed ones are.

    Args:
        entry: what was written.
        fd: of the memory that it was written to, /proc/PID/mem. It stays with that address space, whatever becomes of the
            process (fs/proc/base.c, mem_open).
        others: what else was written there and may lie in the code behind.
        known: whether the right file is known to be mapped there; if not, enough code must say so.
    """
    try:
        found = os.pread(fd, len(entry.armed), entry.addr)
        if found[: entry.width] != entry.armed[: entry.width]:
            # Nothing at all is read where the address space is no more.
            return Outcome.CLEAN if found else Outcome.GONE
        if not known and not _is_that_code(entry, found, others):
            return Outcome.UNSURE
        os.pwrite(fd, entry.original[: entry.width], entry.addr)
    except OSError:
        return Outcome.FAILED if _is_mapped(fd, entry.addr) else Outcome.CLEAN
    return Outcome.RESTORED


def _is_that_code(entry: Entry, found: bytes, others: Claims) -> bool:
    """Whether the code there is the entry's, other instructions that were changed aside, and enough of it to tell."""
    expected = bytearray(entry.armed)
    same = 0
    for i in range(entry.width, len(expected)):
        written = others.get(entry.addr + i)
        if written is not None and found.startswith(written[: len(expected) - i], i):
            expected[i : i + len(written)] = written[: len(expected) - i]
        same += expected[i] != entry.armed[0]
    return found == expected and same >= _DISTINCT


def _is_mapped(fd: int, addr: int) -> bool:
    try:
        return bool(os.pread(fd, 1, addr))
    except OSError:
        return False


def restore_by_name(entry: Entry, others: Claims) -> Outcome:
    """As ``restore``, where only the process' number is known: looks whether it is that one, and maps that file there."""
    try:
        if procfs.start_time(entry.pid) != entry.start_time:
            return Outcome.GONE
        fd = procfs.open_memory(entry.pid)
    except ProcessLookupError:
        return Outcome.GONE
    except OSError:
        return Outcome.FAILED
    try:
        # Again: the number may have become another's between the two.
        if procfs.start_time(entry.pid) != entry.start_time:
            return Outcome.GONE
        if not _maps_it(entry, maps.read_maps(entry.pid)):
            return Outcome.OTHER
        return restore(entry, fd, others, known=True)
    except ProcessLookupError:
        return Outcome.GONE
    except OSError:
        return Outcome.FAILED
    finally:
        os.close(fd)


def _maps_it(entry: Entry, text: bytes) -> bool:
    return _is_in((m for m in maps.parse_maps(text) if m.addr(entry.offset) == entry.addr), entry, entry.addr)


def lower(entry: Entry, fd: int = -1) -> bool:
    """Lowers the semaphore that was raised on account of an entry, where the file's own data is still mapped there; that of
    a process that maps something else, or whose semaphore is 0, is left alone. To be called once, by who has just taken the
    breakpoint out (``RESTORED``), when the tracer is no more.

    Args:
        entry: the one that was restored.
        fd: of its memory, as for ``restore``; by default it is opened by the process' number.

    Returns:
        Whether it was.
    """
    if not entry.raised:
        return False
    with contextlib.ExitStack() as opened:
        try:
            if procfs.start_time(entry.pid) != entry.start_time:
                return False
            if fd < 0:
                fd = procfs.open_memory(entry.pid)
                opened.callback(os.close, fd)
                if procfs.start_time(entry.pid) != entry.start_time:
                    return False
            text = maps.read_maps(entry.pid)
            if not _is_in(maps.parse_data(text), entry, entry.counter) or not _maps_it(entry, text):
                return False
            value = int.from_bytes(os.pread(fd, SEMAPHORE_BYTES, entry.counter), "little")
            if value:
                os.pwrite(fd, (value - 1).to_bytes(SEMAPHORE_BYTES, "little"), entry.counter)
            return value > 0
        except OSError:
            return False  # it is gone, or nobody lets us: it stays raised


def _is_in(mappings: Iterable[maps.Mapping], entry: Entry, addr: int) -> bool:
    """Whether an address is in a mapping of an entry's file."""
    return any(m.start <= addr < m.end and device(m.dev) == entry.dev and m.inode == entry.inode for m in mappings)


def restore_all(entries: Iterable[Entry], kin_of: Iterable[Entry]) -> list[tuple[Entry, Outcome]]:
    """``restore_by_name`` and ``lower`` for each of ``entries``, and for children of ``kin_of`` that were forked and not
    entered any more.

    A child that was born as the tracer died has its parent's bytes. It is looked for by its parent's number, which it has
    until that ends, and gets its own bytes back on the same conditions.
    """
    found: list[tuple[Entry, Outcome]] = []
    for group in _by_process(entries).values():
        others = claims(group)
        found += [(entry, restore_by_name(entry, others)) for entry in group]
    for pid, start, group in _children(_by_process(kin_of)):
        born = [e._replace(pid=pid, start_time=start, space=0) for e in group]
        others = claims(born)
        found += [(e, o) for e in born if (o := restore_by_name(e, others)) in (Outcome.RESTORED, Outcome.FAILED)]
    for entry, outcome in found:
        if outcome is Outcome.RESTORED:
            lower(entry)
    return found


def _by_process(entries: Iterable[Entry]) -> dict[int, list[Entry]]:
    groups: dict[int, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(entry.pid, []).append(entry)
    return groups


def _children(parents: Mapping[int, list[Entry]]) -> list[tuple[int, int, list[Entry]]]:
    """Returns pid, start time and the entries of its nearest ancestor that has any, of processes without their own."""
    if not parents:
        return []
    born: dict[int, tuple[int, int]] = {}
    for pid in procfs.pids():
        with contextlib.suppress(OSError, ValueError, IndexError):
            fields = procfs.stat_fields(pid)
            born[pid] = int(fields[1]), int(fields[19])
    found = []
    for pid, (above, start) in born.items():
        if pid in parents:
            continue
        for _ in range(len(born)):
            if above in parents:
                found.append((pid, start, parents[above]))
                break
            if above not in born:
                break
            above = born[above][0]
    return found
