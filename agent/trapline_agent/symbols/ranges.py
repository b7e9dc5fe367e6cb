"""Where functions are by the unwind table, which stripping leaves: PT_GNU_EH_FRAME.

Only the usual encodings are read; other files have no ranges. Layout: Linux Standard Base, core, "Exception Frames".
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import numpy as np

from trapline.errors import ResolveError
from trapline_agent.symbols.elf import ElfFile

_SIZES = {0x00: 8, 0x02: 2, 0x03: 4, 0x04: 8, 0x0A: 2, 0x0B: 4, 0x0C: 8}
"""Bytes of an encoded pointer, by the lower half of DW_EH_PE_*."""
_OMITTED = 0xFF
_RELATIVE_TABLE = 0x3B
"""DW_EH_PE_datarel | DW_EH_PE_sdata4."""
_MAX_ENTRIES = 4_000_000
_CFA_DEFINITIONS = range(0x0C, 0x10)
"""DW_CFA_def_cfa, _register, _offset, _expression."""
_CHUNK = 64


class Range(NamedTuple):
    """A stretch of code that one frame description is about."""

    start: int
    """File offset of its first instruction."""
    end: int
    function: bool
    """Whether the stack pointer leads to a return address at its start. False: it is a part of a function that the compiler
    put elsewhere, or a stub; no call begins there."""


class FunctionRanges:
    """The ranges of one file. Immutable once made."""

    def __init__(self, elf: ElfFile) -> None:
        """Reads the table; a file without one, or with a malformed one, has no ranges."""
        self._starts = np.zeros(0, np.uint64)
        self._descriptions = np.zeros(0, np.uint64)
        try:
            self._read(elf)
        except (ResolveError, struct.error, OverflowError, ValueError):
            return

    def __len__(self) -> int:
        return len(self._starts)

    def _read(self, elf: ElfFile) -> None:
        found = elf.eh_frame_hdr()
        if found is None:
            return
        data, address = found
        version, pointer, counts, table = struct.unpack_from("4B", data)
        if version != 1 or table != _RELATIVE_TABLE or counts & 0x70 or counts == _OMITTED:
            return
        at = 4 + (0 if pointer == _OMITTED else _SIZES.get(pointer & 15, len(data)))
        size = _SIZES.get(counts & 15, 8)
        count = int.from_bytes(data[at : at + size], "little")
        at += size
        if not 0 < count <= _MAX_ENTRIES or at + 8 * count > len(data):
            return
        rows = np.frombuffer(data, "<i4", 2 * count, at).astype(np.int64) + address
        starts, descriptions = rows[::2], rows[1::2]
        if (np.diff(starts) < 0).any() or int(rows.min()) < 0:
            return
        self._starts, self._descriptions = starts.astype(np.uint64), descriptions.astype(np.uint64)

    def at(self, elf: ElfFile, offset: int) -> Range | None:
        """Returns the range that a file offset is in, or None where nothing is known of it.

        Args:
            elf: the same file, open.
        """
        segment = elf.segment_at(offset)
        if segment is None:
            return None
        to_vaddr = segment.vaddr - segment.offset
        i = int(np.searchsorted(self._starts, np.uint64(offset + to_vaddr), "right")) - 1
        if i < 0:
            return None
        start, description = int(self._starts[i]), int(self._descriptions[i])
        try:
            data = elf.read_at(description, _CHUNK)
            # length, CIE, beginning and size of the code; pcrel | sdata4 is what all compilers for x86-64 write.
            length, _, begin, size = struct.unpack_from("<IIiI", data)
        except (ResolveError, struct.error, OverflowError):
            return None
        if (
            description + 8 + begin != start
            or length in (0, 0xFFFF_FFFF)
            or elf.segment_at(start - to_vaddr) != segment
        ):
            return None
        if offset + to_vaddr >= start + size:
            return None
        augmentation = data[16] if len(data) > 16 else 0x80
        first = data[17 + augmentation : 18 + augmentation]
        # At a call the frame begins above the return address; where something else is said first, it is no entry.
        function = augmentation < 0x80 and not (
            first and first[0] in _CFA_DEFINITIONS and 17 + augmentation < length + 4
        )
        return Range(start - to_vaddr, min(start + size - to_vaddr, segment.end), function)
