"""The functions of a Go program by its own table, which stripping leaves: tracebacks need it.

Layouts: runtime/symtab.go and cmd/link/internal/ld/pcln.go of Go 1.2, 1.16, 1.18 and 1.20; debug/gosym/pclntab.go.
"""

from __future__ import annotations

import struct

import numpy as np

from trapline.errors import ResolveError
from trapline_agent.symbols.elf import FUNC, ElfFile, SymbolTable
from trapline_agent.symbols.names import Names

_SECTIONS = (".gopclntab", ".data.rel.ro.gopclntab")
_GO_1_2, _GO_1_16, _GO_1_18, _GO_1_20 = 0xFFFF_FFFB, 0xFFFF_FFFA, 0xFFFF_FFF0, 0xFFFF_FFF1
_MAX_FUNCTIONS = 2_000_000
_MAX_NAMES = 128 << 20
_ENTRY = "_rt0_amd64_linux"
_GLOBAL = 1


def functions(elf: ElfFile) -> SymbolTable | None:
    """Returns the functions of a Go program, or None where it is none or its table cannot be read."""
    try:
        found = next((s for name in _SECTIONS if (s := elf.section(name))), None)
        return _functions(elf, *found) if found else None
    except (ResolveError, struct.error, OverflowError, ValueError, IndexError):
        return None


def _functions(elf: ElfFile, data: bytes, address: int) -> SymbolTable | None:
    magic, zeros, _, pointer = struct.unpack_from("<IHBB", data, 0)
    if zeros or pointer != 8:
        return None
    if magic == _GO_1_2:
        (count,) = struct.unpack_from("<Q", data, 8)
        names_at, table_at, text = 0, 16, 0
        functions_at, wide = 0, True
    elif magic == _GO_1_16:
        count, _, names_at, _, _, _, table_at = struct.unpack_from("<7Q", data, 8)
        functions_at, text, wide = table_at, 0, True
    elif magic in (_GO_1_18, _GO_1_20):
        count, _, text, names_at, _, _, _, table_at = struct.unpack_from("<8Q", data, 8)
        functions_at, wide = table_at, False
    else:
        return None
    word, size = ("<u8", 8) if wide else ("<u4", 4)
    if not 0 < count <= _MAX_FUNCTIONS or table_at + (2 * count + 1) * size > len(data):
        return None
    # (where it begins, where its record is) of each function, and the end of the last one.
    table = np.frombuffer(data, word, 2 * count + 1, table_at).astype(np.uint64)
    # A record begins with where the function begins, then an int32: where its name is.
    at = table[1::2] + np.uint64(functions_at + size)
    if int(at.max()) + 4 > len(data):
        return None
    bytes_ = np.frombuffer(data, np.uint8)
    index = at.astype(np.int64)
    offsets = bytes_[index[:, None] + np.arange(4)].copy().view("<i4")[:, 0].astype(np.int64) + names_at
    nuls = np.flatnonzero(bytes_ == 0)
    which = np.searchsorted(nuls, offsets)
    if int(which.max()) >= len(nuls):
        return None
    ends = nuls[which].astype(np.int64)
    if int(offsets.min()) < 0 or int((ends - offsets).sum()) > _MAX_NAMES:
        return None
    names = Names.gather(data, offsets, ends)
    begins = table[::2]
    starts = begins[:-1]
    if (np.diff(begins.astype(np.int64)) < 0).any():
        return None
    sizes = np.diff(begins)
    if not wide:
        base = _text(elf, text, address + 8 + 2 * 8, names, starts)
        if base is None:
            return None
        starts = starts + np.uint64(base)
    places = np.zeros(count, np.uint64)
    inside = np.zeros(count, np.bool_)
    for s in elf.segments:
        here = (starts >= np.uint64(s.vaddr)) & (starts - np.uint64(s.vaddr) < np.uint64(s.filesz))
        places[here] = starts[here] - np.uint64(s.vaddr) + np.uint64(s.offset)
        inside |= here
    keep = np.flatnonzero(inside & (names.lengths() > 0))
    kept = Names.gather(data, offsets[keep], ends[keep])
    n = len(keep)
    if not n:
        return None
    return SymbolTable(
        kept,
        [""],
        np.zeros(n, np.uint16),
        np.ones(n, np.bool_),
        places[keep],
        sizes[keep],
        np.full(n, FUNC, np.uint8),
        np.full(n, _GLOBAL, np.uint8),
    )


def _text(
    elf: ElfFile, value: int, address: int, names: Names, starts: np.ndarray[tuple[int], np.dtype[np.uint64]]
) -> int | None:
    """Returns the virtual address that functions are counted from, or None where it cannot be told.

    It is in the table; in a position-independent program the loader writes it there, and Go 1.26 leaves it out. Then it is
    the beginning of .text, if that makes the program begin where it does.
    """
    if elf.file_offset(value) is not None:
        return value
    relocated = elf.relative_relocation(address)
    if relocated is not None and elf.file_offset(relocated) is not None:
        return relocated
    text = elf.section_address(".text")
    entry = names.find(_ENTRY)
    if text is None or len(entry) != 1 or int(starts[entry[0]]) + text != elf.entry:
        return None
    return text
