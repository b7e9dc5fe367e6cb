"""What is at an address that a call returns to: the plan for a breakpoint there.

The agent makes the plans of probes; where calls come back to is known only at the trap. So the tracer reads here what it
needs of the caller's file: the instruction's bytes, and the program headers for the unused bytes behind the code.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable

from trapline.errors import TraplineError, Unsupported
from trapline_agent.arch.x86_64.calls import MAX_CALL_BYTES, may_be_returned_to
from trapline_agent.arch.x86_64.registers import MAX_INSTRUCTION_BYTES
from trapline_agent.plans import FileKey, SitePlan
from trapline_agent.targets.maps import Mapping

_MAX_PLANS = 65_536
_MAX_HEADERS = 64
_PAGE = 4096
_HEADER = struct.Struct("<16sHHIQQQIHHH")
"""Elf64_Ehdr up to e_phnum: elf(5)."""
_SEGMENT = struct.Struct("<IIQQQQQQ")
"""Elf64_Phdr."""
_PT_LOAD = 1
_PF_X = 1

Read = Callable[[int, int], bytes]
"""(file offset, size) -> the file's bytes there, fewer at its end. Raises TraplineError, OSError."""


class Places:
    """Plans by file and offset, made once. Any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._plans: dict[tuple[FileKey, int], SitePlan] = {}

    def clear(self) -> None:
        """Forgets all: inodes that nobody holds are used again."""
        with self._lock:
            self._plans.clear()

    def plan(self, mapping: Mapping, addr: int, read: Read) -> SitePlan:
        """Returns the plan for an address in a mapping.

        Args:
            mapping: an executable mapping of a file, which has the address.
            addr: where a call is to return to.
            read: reads that file.

        Raises:
            Unsupported: ``NotAReturnAddress``, no call ends there.
            TraplineError, OSError: the file cannot be read.
        """
        offset = addr - mapping.start + mapping.offset
        key = mapping.file, offset
        with self._lock:
            known = self._plans.get(key)
        if known is None:
            start = max(mapping.offset, offset - MAX_CALL_BYTES)
            code = read(start, offset - start + MAX_INSTRUCTION_BYTES)
            before, code = code[: offset - start], code[offset - start :]
            if not may_be_returned_to(before, addr):
                raise Unsupported(f"no call ends at {addr:#x}", reason="NotAReturnAddress")
            slack_offset, slack_len, end = _slack_of(read, offset)
            known = SitePlan(
                site=0,
                file=mapping.file,
                path=mapping.path,
                offset=offset,
                code=code[: max(0, end - offset)] if end else code,
                slack_offset=slack_offset,
                slack_len=slack_len,
            )
            with self._lock:
                if len(self._plans) >= _MAX_PLANS:
                    self._plans.clear()
                self._plans[key] = known
        return known


def _slack_of(read: Read, offset: int) -> tuple[int, int, int]:
    """Returns (file offset of the unused bytes behind the segment, how many, the segment's end); zeros where the file does
    not say."""
    try:
        return _slack(read, offset)
    except (struct.error, ZeroDivisionError, TraplineError, OSError):
        return 0, 0, 0


def _slack(read: Read, offset: int) -> tuple[int, int, int]:
    """As ``symbols.elf``, which is not for the tracer, finds it: zeros that are mapped with the segment's last page, that
    nothing else of the file is in."""
    header = _HEADER.unpack(read(0, _HEADER.size))
    if header[0][:6] != b"\x7fELF\x02\x01":
        return 0, 0, 0
    table, size, count = header[5], header[9], header[10]
    rows = read(table, size * min(count, _MAX_HEADERS))
    loads = [s for s in (_SEGMENT.unpack_from(rows, i * size) for i in range(len(rows) // size)) if s[0] == _PT_LOAD]
    for _, flags, start, _, _, filesz, memsz, _ in loads:
        end = start + filesz
        if not flags & _PF_X or not start <= offset < end:
            continue
        stop = -(-end // _PAGE) * _PAGE
        stop = min([stop, *(s[2] for s in loads if s[2] >= end)])
        if stop <= end or memsz > filesz:
            return 0, 0, end
        behind = read(end, stop - end)
        zeros = len(behind) - len(behind.lstrip(b"\0"))
        return end if zeros else 0, zeros, end
    return 0, 0, 0
