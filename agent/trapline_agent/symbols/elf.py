"""ELF files of x86-64, read with bounds: headers, notes, and the symbol tables as arrays.

The files come from anywhere, and their authors may mean harm. So every table is checked against the file's size before
it is read, sizes are capped, and what is wrong raises ResolveError. Tables are numpy records over the sections' bytes:
reading symbols one by one, as pyelftools does, takes seconds for a large program. Nothing is mapped: a file that
shrinks under a mapping kills the reader.

Layouts: System V ABI (gABI) chapters 4 and 5; symbol versions: the LSB's core specification, "Symbol Versioning".
"""

from __future__ import annotations

import functools
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from trapline.errors import ResolveError, Unsupported
from trapline_agent.symbols.names import Names

PAGE = 4096
_MAX_TABLE = 256 << 20
"""Bytes of one section that are read: the symbols' names of some browsers come near to it."""
_MAX_SMALL = 1 << 20
"""Bytes of notes, dynamic sections and version definitions that are read."""
_MAX_SEGMENTS = 4096
_MAX_EXECUTABLE = 64
_MAX_NOTES = 16
_MAX_SYMBOLS = 4_000_000
_MAX_VERSIONS = 30_000

_EHDR = struct.Struct("<16sHHIQQQIHHHHHH")
_PHDR = np.dtype(
    [("type", "<u4"), ("flags", "<u4"), ("offset", "<u8"), ("vaddr", "<u8"), ("paddr", "<u8"), ("filesz", "<u8"),
     ("memsz", "<u8"), ("align", "<u8")]
)  # fmt: skip
_SHDR = np.dtype(
    [("name", "<u4"), ("type", "<u4"), ("flags", "<u8"), ("addr", "<u8"), ("offset", "<u8"), ("size", "<u8"),
     ("link", "<u4"), ("info", "<u4"), ("align", "<u8"), ("entsize", "<u8")]
)  # fmt: skip
_SYM = np.dtype([("name", "<u4"), ("info", "u1"), ("other", "u1"), ("shndx", "<u2"), ("value", "<u8"), ("size", "<u8")])
_DYN = np.dtype([("tag", "<i8"), ("value", "<u8")])
_RELA = np.dtype([("offset", "<u8"), ("info", "<u8"), ("addend", "<i8")])

_ET_EXEC, _ET_DYN, _EM_X86_64 = 2, 3, 62
_PT_LOAD, _PT_DYNAMIC, _PT_NOTE, _PT_TLS, _PT_GNU_EH_FRAME, _PF_X, _PF_W = 1, 2, 4, 7, 0x6474_E550, 1, 2
_DT_FLAGS_1, _DF_1_PIE = 0x6FFF_FFFB, 0x0800_0000
"""Set in programs that can be mapped anywhere, and in no library (ld(1), -pie)."""
_SHT_SYMTAB, _SHT_NOTE, _SHT_NOBITS, _SHT_DYNSYM, _SHT_VERDEF, _SHT_VERSYM = 2, 7, 8, 11, 0x6FFF_FFFD, 0x6FFF_FFFF
_R_X86_64_RELATIVE = 8
_PC_RELATIVE_4 = 0x1B
"""DW_EH_PE_pcrel, DW_EH_PE_sdata4."""
_E_SHSTRNDX = 62
"""Offset of the last field of the header."""
_SHF_EXECINSTR = 4
_DT_NULL, _DT_PLTRELSZ, _DT_STRTAB, _DT_RELA, _DT_RELASZ, _DT_SONAME = 0, 2, 5, 7, 8, 14
_DT_TEXTREL, _DT_JMPREL, _DT_FLAGS, _DF_TEXTREL = 22, 23, 30, 4
_NT_GNU_BUILD_ID = 3
_SHN_LORESERVE, _SHN_XINDEX = 0xFF00, 0xFFFF
_VERSION_HIDDEN, _VERSION_INDEX = 0x8000, 0x7FFF

NOTYPE, FUNC, IFUNC = 0, 2, 10
"""Symbol types, gABI and the GNU extension."""

_MACHINES = {3: "i386", 40: "ARM", 183: "AArch64", 243: "RISC-V", 21: "PowerPC64", 22: "S390"}

Table = npt.NDArray[Any]


class Segment(NamedTuple):
    """An executable PT_LOAD."""

    offset: int
    """File offset of its first byte."""
    vaddr: int
    filesz: int
    slack_offset: int = 0
    """File offset of the zero bytes behind it that are mapped with its last page; nothing of the file uses them."""
    slack_len: int = 0

    @property
    def end(self) -> int:
        """File offset behind its last byte."""
        return self.offset + self.filesz


class SymbolTable(NamedTuple):
    """One symbol table: columns of equal length. Only defined symbols in code are in it."""

    names: Names
    versions: list[str]
    """The symbol versions that occur; the first is empty: none."""
    version: npt.NDArray[np.uint16]
    """Indices into ``versions``."""
    default: npt.NDArray[np.bool_]
    """False: only meant where the version is asked for (``name@VERSION``)."""
    offsets: npt.NDArray[np.uint64]
    """File offsets."""
    sizes: npt.NDArray[np.uint64]
    types: npt.NDArray[np.uint8]
    binds: npt.NDArray[np.uint8]

    @staticmethod
    def empty() -> SymbolTable:
        words, small = np.zeros(0, np.uint64), np.zeros(0, np.uint8)
        return SymbolTable(Names(b""), [""], np.zeros(0, np.uint16), np.zeros(0, np.bool_), words, words, small, small)


class ElfFile:
    """One file, opened for as long as it takes to read it; the descriptor is the caller's."""

    def __init__(self, fd: int, path: str) -> None:
        """Reads the headers.

        Args:
            fd: the file, regular.
            path: for messages.

        Raises:
            Unsupported: it is ELF, but not of 64-bit x86-64.
            ResolveError: it is not a well-formed program or library.
        """
        self._fd = fd
        self.path = path
        self.size = os.fstat(fd).st_size
        self.reads: list[tuple[int, int]] = []
        """(offset, size) of all that was read, in order: what is made of the file depends on nothing else."""
        head = self._read(0, min(self.size, _EHDR.size), "header")
        if head[:4] != b"\x7fELF":
            raise ResolveError(
                f"{path} is not an ELF file", reason="NotElf", hint="name a program or a library, not a script"
            )
        if len(head) < _EHDR.size:
            raise self._malformed("its header is cut off")
        ident, kind, machine, _, self.entry, phoff, shoff, _, _, phentsize, phnum, shentsize, shnum, names = (
            _EHDR.unpack(head)
        )
        self._section_names = names
        self._kind = kind
        if ident[5] == 1 and (ident[4] != 2 or machine != _EM_X86_64):
            name = _MACHINES.get(machine, f"machine {machine}") if machine != _EM_X86_64 else "x32"
            raise Unsupported(f"{path} is {name} code; this release probes x86-64 alone", reason="Architecture")
        if ident[4] != 2 or ident[5] != 1:
            raise Unsupported(f"{path} is not 64-bit little-endian code", reason="Architecture")
        if kind not in (_ET_EXEC, _ET_DYN):
            raise ResolveError(
                f"{path} is an object file or a core, which no process maps to run", reason="NotAProgram"
            )
        if (phnum and phentsize != _PHDR.itemsize) or phnum > _MAX_SEGMENTS:
            raise self._malformed("its program headers are of a wrong size")
        self._segments = self._table(phoff, phnum * _PHDR.itemsize, _PHDR, "program headers")
        self._sections = self._section_headers(shoff, shentsize, shnum)
        self.segments = list(self._executable())
        if len(self.segments) > _MAX_EXECUTABLE:
            raise self._malformed(f"it has {len(self.segments)} executable segments")

    # --- reading

    def _malformed(self, why: str) -> ResolveError:
        return ResolveError(f"{self.path} is malformed: {why}", reason="MalformedElf")

    def _read(self, offset: int, size: int, what: str, limit: int = _MAX_TABLE) -> bytes:
        if size > limit:
            raise self._malformed(f"its {what} would be {size} bytes long")
        if offset + size > self.size:
            raise self._malformed(f"its {what} is beyond its end")
        try:
            data = os.pread(self._fd, size, offset)
        except OSError as e:
            raise ResolveError(f"{self.path} cannot be read: {e.strerror}") from e
        if len(data) != size:
            raise self._malformed("it changed while it was read")
        self.reads.append((offset, size))
        return data

    def _table(self, offset: int, size: int, dtype: np.dtype[Any], what: str, limit: int = _MAX_TABLE) -> Table:
        data = self._read(offset, size - size % dtype.itemsize, what, limit)
        return np.frombuffer(data, dtype)

    def _section_headers(self, offset: int, entsize: int, count: int) -> Table:
        if not offset:
            return np.empty(0, _SHDR)
        if entsize != _SHDR.itemsize:
            raise self._malformed("its section headers are of a wrong size")
        if not count:  # more than 0xff00 sections: the number is in the first one
            count = int(self._table(offset, _SHDR.itemsize, _SHDR, "section headers")["size"][0])
        return self._table(offset, count * _SHDR.itemsize, _SHDR, "section headers")

    def section(self, name: str, limit: int = _MAX_TABLE) -> tuple[bytes, int] | None:
        """Returns a section's bytes and its virtual address, or None where there is none of that name.

        Raises:
            ResolveError: it is malformed, or longer than ``limit`` bytes.
        """
        row = self._section_row(name)
        if row is None or int(row["type"]) == _SHT_NOBITS:
            return None
        return self._read(int(row["offset"]), int(row["size"]), name, limit), int(row["addr"])

    def section_address(self, name: str) -> int | None:
        """Returns a section's virtual address, or None where there is none of that name."""
        row = self._section_row(name)
        return None if row is None else int(row["addr"])

    def _section_row(self, name: str) -> Any:
        return self._named_sections.get(name)

    @functools.cached_property
    def _named_sections(self) -> dict[str, Any]:
        if self._section_names >= len(self._sections):
            return {}
        link = self._sections[self._section_names]
        try:
            strings = self._read(int(link["offset"]), int(link["size"]), "section names", _MAX_SMALL)
        except ResolveError:
            return {}
        found: dict[str, Any] = {}
        for row in self._sections[:_MAX_SEGMENTS]:
            at = int(row["name"])
            name = strings[at : at + 64].split(b"\0", 1)[0]
            if name and int(row["type"]):
                found.setdefault(name.decode("latin-1"), row)
        return found

    def eh_frame_hdr(self) -> tuple[bytes, int] | None:
        """Returns the table of PT_GNU_EH_FRAME and its virtual address, or None where there is none."""
        for row in self._segments[self._segments["type"] == _PT_GNU_EH_FRAME][:1]:
            return self._read(int(row["offset"]), int(row["filesz"]), "unwind table"), int(row["vaddr"])
        return None

    def read_at(self, vaddr: int, size: int) -> bytes:
        """Returns up to ``size`` bytes of the file at a virtual address: fewer where its segment ends, none outside."""
        for row in self._segments[self._segments["type"] == _PT_LOAD]:
            at = vaddr - int(row["vaddr"])
            if 0 <= at < int(row["filesz"]):
                offset = at + int(row["offset"])
                return self._read(offset, min(size, int(row["filesz"]) - at, max(0, self.size - offset)), "segment")
        return b""

    # --- segments

    def _executable(self) -> Iterator[Segment]:
        loads = self._segments[self._segments["type"] == _PT_LOAD]
        for row in loads[(loads["flags"] & _PF_X) != 0]:
            offset, vaddr, filesz, memsz = (int(row[name]) for name in ("offset", "vaddr", "filesz", "memsz"))
            filesz = min(filesz, self.size - offset)
            if filesz <= 0 or vaddr + filesz > 1 << 64:
                continue
            end = offset + filesz
            stop = min(-(-end // PAGE) * PAGE, self.size)
            behind = loads["offset"][loads["offset"] >= end]
            if len(behind):
                stop = min(stop, int(behind.min()))
            slack = 0
            if stop > end and memsz <= filesz:
                zeros = self._read(end, stop - end, "code")
                slack = len(zeros) - len(zeros.lstrip(b"\0"))
            yield Segment(offset, vaddr, filesz, end if slack else 0, slack)

    def segment_at(self, offset: int) -> Segment | None:
        """Returns the executable segment that has a file offset."""
        return next((s for s in self.segments if s.offset <= offset < s.end), None)

    def file_offset(self, vaddr: int) -> int | None:
        """Returns the file offset of a virtual address in code."""
        return next((vaddr - s.vaddr + s.offset for s in self.segments if 0 <= vaddr - s.vaddr < s.filesz), None)

    def thread_block(self) -> int | None:
        """Returns how far below the thread pointer the program's thread-local variables begin; None where it has none, and
        of a library: for those the loader chooses a place in each process.

        The program's own block comes first below the thread pointer, its size made a multiple of its alignment (Drepper, ELF
        Handling For Thread-Local Storage, 3.4.2 and variant II); the linker has built that into the code.
        """
        for row in self._segments[self._segments["type"] == _PT_TLS][:1]:
            size, align, vaddr = int(row["memsz"]), max(1, int(row["align"])), int(row["vaddr"])
            if not self._is_program() or align > PAGE or vaddr % align:
                return None
            return -(-size // align) * align
        return None

    def _is_program(self) -> bool:
        if self._kind == _ET_EXEC:
            return True
        try:
            return bool(self._dynamic().get(_DT_FLAGS_1, 0) & _DF_1_PIE)
        except ResolveError:
            return False

    def data_offset(self, vaddr: int, size: int) -> int | None:
        """Returns the file offset of a virtual address in data that the file itself has, ``size`` bytes of it; None where it
        is none that a process can write, or memory that begins with zeros (.bss)."""
        for row in self._segments[self._segments["type"] == _PT_LOAD]:
            start, inside = int(row["vaddr"]), vaddr - int(row["vaddr"])
            if int(row["flags"]) & _PF_W and start <= vaddr and inside + size <= int(row["filesz"]):
                return inside + int(row["offset"])
        return None

    # --- identity

    def build_id(self, sections: bool = False) -> str:
        """Returns the GNU build-id in hex, or an empty string.

        Args:
            sections: look for it in the sections, since the segments of a separate debug file lead nowhere.
        """
        rows = self._sections if sections else self._segments
        size = "size" if sections else "filesz"
        for row in rows[rows["type"] == (_SHT_NOTE if sections else _PT_NOTE)][:_MAX_NOTES]:
            try:
                notes = self._read(int(row["offset"]), int(row[size]), "notes", _MAX_SMALL)
            except ResolveError:
                continue
            align = 8 if row["align"] == 8 else 4
            at = 0
            while at + 12 <= len(notes):
                namesz, descsz, kind = struct.unpack_from("<III", notes, at)
                name_at = at + 12
                desc_at = name_at + namesz + (-(12 + namesz) % align)
                if kind == _NT_GNU_BUILD_ID and notes[name_at : name_at + namesz] == b"GNU\0" and 0 < descsz <= 64:
                    return notes[desc_at : desc_at + descsz].hex()
                at = desc_at + descsz + (-descsz % align)
        return ""

    def _dynamic(self) -> dict[int, int]:
        """Returns the dynamic section's values by tag; of a tag that comes again, the first."""
        for row in self._segments[self._segments["type"] == _PT_DYNAMIC][:1]:
            entries = self._table(int(row["offset"]), int(row["filesz"]), _DYN, "dynamic section", _MAX_SMALL)
            tags = entries["tag"].tolist()
            count = tags.index(_DT_NULL) if _DT_NULL in tags else len(tags)
            return dict(zip(tags[:count][::-1], entries["value"][:count].tolist()[::-1], strict=True))
        return {}

    def soname(self) -> str:
        """Returns the DT_SONAME, or an empty string."""
        try:
            dynamic = self._dynamic()
            if _DT_STRTAB not in dynamic or _DT_SONAME not in dynamic:
                return ""
            at = self._any_offset(dynamic[_DT_STRTAB])
            if at is None:
                return ""
            at += dynamic[_DT_SONAME]
            if at >= self.size:
                return ""
            name = self._read(at, min(256, self.size - at), "strings").split(b"\0", 1)[0]
            return name.decode("utf-8", "backslashreplace")
        except (ResolveError, OverflowError):
            return ""

    def text_relocations(self) -> list[int]:
        """Returns the file offsets in code that the loader writes an address of up to 8 bytes to, ascending (gABI chapter
        5, DT_TEXTREL). Nearly no file has any. Raises ResolveError where what says so is malformed."""
        dynamic = self._dynamic()
        if _DT_TEXTREL not in dynamic and not dynamic.get(_DT_FLAGS, 0) & _DF_TEXTREL:
            return []
        found: list[int] = []
        for start, size in ((_DT_RELA, _DT_RELASZ), (_DT_JMPREL, _DT_PLTRELSZ)):
            at = self._any_offset(dynamic[start]) if dynamic.get(start) else None
            if at is None:
                continue
            for vaddr in self._table(at, dynamic.get(size, 0), _RELA, "relocations")["offset"].tolist():
                offset = self.file_offset(vaddr)
                if offset is not None:
                    found.append(offset)
        return sorted(found)

    def relative_relocation(self, vaddr: int) -> int | None:
        """Returns what the loader writes to an address, less the load address; None where it writes nothing (relative)."""
        dynamic = self._dynamic()
        at = self._any_offset(dynamic[_DT_RELA]) if dynamic.get(_DT_RELA) else None
        if at is None:
            return None
        table = self._table(at, dynamic.get(_DT_RELASZ, 0), _RELA, "relocations")
        found = table[(table["offset"] == vaddr) & (table["info"] == _R_X86_64_RELATIVE)]
        return int(found["addend"][0]) if len(found) else None

    def _any_offset(self, vaddr: int) -> int | None:
        for row in self._segments[self._segments["type"] == _PT_LOAD]:
            if 0 <= vaddr - int(row["vaddr"]) < int(row["filesz"]):
                return vaddr - int(row["vaddr"]) + int(row["offset"])
        return None

    def eh_frame(self, limit: int) -> tuple[int, bytes] | None:
        """Returns the virtual address of .eh_frame and its bytes; None where there is none.

        It is found by PT_GNU_EH_FRAME, which stripping leaves (LSB core, "The .eh_frame_hdr section"); its size then is
        the section's, or up to the segment's end. Static programs have the section alone. Raises ResolveError where it is
        malformed, or longer than ``limit`` bytes.
        """
        for row in self._segments[self._segments["type"] == _PT_GNU_EH_FRAME][:1]:
            head = self._read(int(row["offset"]), min(int(row["filesz"]), 12), "unwind header")
            # Version 1; the pointer to .eh_frame, 4 bytes signed, from its own place: every linker writes it so.
            if len(head) < 8 or head[0] != 1 or head[1] != _PC_RELATIVE_4:
                break
            vaddr = (int(row["vaddr"]) + 4 + int.from_bytes(head[4:8], "little", signed=True)) % (1 << 64)
            for load in self._segments[self._segments["type"] == _PT_LOAD]:
                inside = vaddr - int(load["vaddr"])
                if 0 <= inside < int(load["filesz"]):
                    size = min(int(load["filesz"]) - inside, self.size - int(load["offset"]) - inside)
                    sections = self._sections[self._sections["addr"] == vaddr]
                    size = next((int(s["size"]) for s in sections if 0 < s["size"] <= size), size)
                    return vaddr, self._read(int(load["offset"]) + inside, size, ".eh_frame", limit)
        section = self._section_named(b".eh_frame")
        if section is None or section["type"] == _SHT_NOBITS:
            return None
        return int(section["addr"]), self._read(int(section["offset"]), int(section["size"]), ".eh_frame", limit)

    def _section_named(self, name: bytes) -> Table | None:
        index = int.from_bytes(self._read(_E_SHSTRNDX, 2, "header"), "little")
        if index >= len(self._sections):
            return None
        strings = self._sections[index]
        names = self._read(int(strings["offset"]), int(strings["size"]), "section names", _MAX_SMALL)
        for row in self._sections:
            at = int(row["name"])
            if names[at : at + len(name) + 1] == name + b"\0":
                return row  # type: ignore[no-any-return]
        return None

    # --- symbols

    @property
    def has_symtab(self) -> bool:
        """False: it was stripped."""
        return bool((self._sections["type"] == _SHT_SYMTAB).any())

    def symbols(self, program: ElfFile | None = None) -> SymbolTable | None:
        """Returns .symtab's symbols in code, or None where there is none. Raises ResolveError where it is malformed.

        Args:
            program: the file that this one was taken from as its debug file: what is there is told by the offsets there.
        """
        return self._symbols(_SHT_SYMTAB, lambda count: None, (program or self).segments)

    def dynamic_symbols(self) -> SymbolTable | None:
        """Returns .dynsym's symbols in code, with their versions. Raises ResolveError where it is malformed."""
        return self._symbols(_SHT_DYNSYM, self._version_numbers, self.segments)

    def imports(self) -> Names:
        """Returns the names of functions that other files must define, as .dynsym has them."""
        found = self._symbol_rows(_SHT_DYNSYM)
        if found is None:
            return Names(b"")
        table, strings = found
        undefined = (table["shndx"] == 0) & (table["name"] != 0) & (table["name"] < len(strings))
        undefined &= np.isin(table["info"] & 15, (NOTYPE, FUNC))
        return self._names(table["name"][undefined], strings)

    def _symbol_rows(self, kind: int) -> tuple[Table, bytes] | None:
        """Returns the first symbol table of a section type, and its strings' bytes."""
        found = self._sections[self._sections["type"] == kind]
        if not len(found):
            return None
        limit = _MAX_SYMBOLS * _SYM.itemsize
        table = self._table(int(found[0]["offset"]), int(found[0]["size"]), _SYM, "symbol table", limit)
        link = int(found[0]["link"])
        if link >= len(self._sections):
            raise self._malformed("its symbol table has no names")
        names = self._sections[link]
        return table, self._read(int(names["offset"]), int(names["size"]), "symbol names")

    def _symbols(
        self, kind: int, numbers: Callable[[int], npt.NDArray[np.uint16] | None], segments: Sequence[Segment]
    ) -> SymbolTable | None:
        found = self._symbol_rows(kind)
        if found is None:
            return None
        table, strings = found
        versions = numbers(len(table))
        offsets, in_code = self._code_offsets(table, segments)
        in_code &= table["name"] < len(strings)
        keep = np.flatnonzero(in_code)
        table, offsets = table[keep], offsets[keep]
        if versions is None:
            names, labels, version, default = self._names_with_versions(table["name"], strings)
        else:
            names = self._names(table["name"], strings)
            labels, version = self._version_labels((versions[keep] & _VERSION_INDEX).astype(np.uint16))
            default = (versions[keep] & _VERSION_HIDDEN) == 0
        kinds, binds = (column.astype(np.uint8) for column in (table["info"] & 15, table["info"] >> 4))
        return SymbolTable(names, labels, version, default, offsets, table["size"].copy(), kinds, binds)

    def _version_labels(self, numbers: npt.NDArray[np.uint16]) -> tuple[list[str], npt.NDArray[np.uint16]]:
        """Returns the version names, and for each symbol which it has."""
        known = sorted((n, name) for n, name in self._version_names().items() if n <= _VERSION_INDEX)
        lookup = np.zeros(_VERSION_INDEX + 1, np.uint16)
        lookup[[n for n, _ in known]] = np.arange(1, len(known) + 1, dtype=np.uint16)
        return ["", *(name for _, name in known)], lookup[numbers]

    def _code_offsets(
        self, table: Table, segments: Sequence[Segment]
    ) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.bool_]]:
        """Returns file offsets, and which symbols are defined, of a type that code has, and in a code segment."""
        kinds = table["info"] & 15
        keep = np.isin(kinds, (NOTYPE, FUNC, IFUNC)) & (table["shndx"] != 0) & (table["name"] != 0)
        index = table["shndx"].astype(np.intp)
        executable = np.zeros(0x10000, np.bool_)
        executable[_SHN_XINDEX] = True
        flags = (self._sections["flags"] & _SHF_EXECINSTR) != 0
        executable[: min(len(flags), _SHN_LORESERVE)] = flags[:_SHN_LORESERVE]
        keep &= executable[index]
        offsets = np.zeros(len(table), np.uint64)
        inside = np.zeros(len(table), np.bool_)
        for s in segments:
            here = (table["value"] >= np.uint64(s.vaddr)) & (table["value"] - np.uint64(s.vaddr) < np.uint64(s.filesz))
            offsets[here] = table["value"][here] - np.uint64(s.vaddr) + np.uint64(s.offset)
            inside |= here
        return offsets, keep & inside

    def _spans(
        self, starts: npt.NDArray[np.uint32], data: bytes
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Returns where names begin and end in a string table."""
        strings = np.frombuffer(data, np.uint8)
        if len(strings) - np.count_nonzero(strings) > _MAX_SYMBOLS + _MAX_SMALL:
            raise self._malformed("its symbols' names are empty")
        nuls = np.flatnonzero(strings == 0)
        which = np.searchsorted(nuls, starts)
        if len(starts) and (not len(nuls) or int(which.max()) >= len(nuls)):
            raise self._malformed("a symbol's name does not end")
        ends = nuls[which] if len(starts) else np.zeros(0, np.int64)
        # Names may share bytes, but honest ones do not share them often.
        if int((ends - starts).sum()) > min(8 * len(strings) + _MAX_SMALL, _MAX_TABLE):
            raise self._malformed("its symbols' names are too long")
        return starts.astype(np.int64), ends

    def _names(self, starts: npt.NDArray[np.uint32], strings: bytes) -> Names:
        return Names.gather(strings, *self._spans(starts, strings)) if len(starts) else Names(b"")

    def _names_with_versions(
        self, starts: npt.NDArray[np.uint32], data: bytes
    ) -> tuple[Names, list[str], npt.NDArray[np.uint16], npt.NDArray[np.bool_]]:
        """Returns names, versions, the version of each and whether it is the default: a static link leaves them in the
        names, as ``name@@VERSION``."""
        begins, ends = self._spans(starts, data)
        version, default = np.zeros(len(begins), np.uint16), np.ones(len(begins), np.bool_)
        labels: dict[str, int] = {"": 0}
        ats = np.flatnonzero(np.frombuffer(data, np.uint8) == ord("@")) if b"@" in data else np.zeros(0, np.int64)
        if len(ats):
            first = ats[np.minimum(np.searchsorted(ats, begins), len(ats) - 1)]
            for i in np.flatnonzero((first >= begins) & (first < ends)).tolist():
                text = data[int(first[i]) + 1 : int(ends[i])].decode("utf-8", "backslashreplace")
                default[i] = text[:1] == "@" or not text
                label = text.lstrip("@")
                if len(labels) <= _MAX_VERSIONS:
                    version[i] = labels.setdefault(label, len(labels))
                ends[i] = first[i]
        return Names.gather(data, begins, ends), list(labels), version, default

    def _version_numbers(self, count: int) -> npt.NDArray[np.uint16] | None:
        found = self._sections[self._sections["type"] == _SHT_VERSYM]
        if not len(found):
            return None
        numbers = self._table(int(found[0]["offset"]), int(found[0]["size"]), np.dtype("<u2"), "symbol versions")
        return numbers if len(numbers) == count else None

    def _version_names(self) -> dict[int, str]:
        """Returns the defined versions by number: .gnu.version_d."""
        found = self._sections[self._sections["type"] == _SHT_VERDEF]
        names: dict[int, str] = {}
        if not len(found) or int(found[0]["link"]) >= len(self._sections):
            return names
        data = self._read(int(found[0]["offset"]), int(found[0]["size"]), "symbol versions", _MAX_SMALL)
        link = self._sections[int(found[0]["link"])]
        strings = self._read(int(link["offset"]), int(link["size"]), "strings")
        at = 0
        while at + 20 <= len(data):
            _, flags, index, _, _, aux, following = struct.unpack_from("<HHHHIII", data, at)
            if at + aux + 4 <= len(data) and not flags & 1:  # flag 1: the file's own name
                (name,) = struct.unpack_from("<I", data, at + aux)
                names[index] = strings[name : name + 256].split(b"\0", 1)[0].decode("utf-8", "backslashreplace")
            if not following:
                break
            at += following
        return names
