"""elfutils' libdw, as much of it as is used here: entries of DWARF 2 to 5 (DIEs), their attributes, lines, CFI.

Only the reader process imports this: the library is C and reads what strangers wrote. All that it hands out lives as long as
the process; nothing is given back. API: elfutils/libdw.h, elfutils/libelf of release 0.186 or later.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from ctypes import POINTER, byref, c_bool, c_char_p, c_int, c_long, c_size_t, c_uint, c_uint64, c_void_p
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from trapline.errors import NoDebugInfo, Unsupported

_ELF_C_READ_MMAP: Final = 8
_DWARF_C_READ: Final = 0
_FORM_BLOCK1: Final = 0x0A
_FORM_EXPRLOC: Final = 0x18
_MAX_NAME: Final = 4096
_MAX_RANGES: Final = 100_000
_SAMPLE: Final = 64

_dw: ctypes.CDLL | None = None
_elf: ctypes.CDLL | None = None


class _Attribute(ctypes.Structure):
    _fields_ = (("code", c_uint), ("form", c_uint), ("valp", c_void_p), ("cu", c_void_p))


class _Block(ctypes.Structure):
    _fields_ = (("length", c_uint64), ("data", c_void_p))


class Operation(ctypes.Structure):
    """One operation of a DWARF expression."""

    _fields_ = (("atom", ctypes.c_uint8), ("number", c_uint64), ("number2", c_uint64), ("offset", c_uint64))
    atom: int
    number: int
    number2: int
    offset: int


class _Data(ctypes.Structure):
    """Elf_Data."""

    _fields_ = (("buf", c_void_p), ("type", c_int), ("version", c_uint), ("size", c_size_t), ("off", c_long),
                ("align", c_size_t))  # fmt: skip


class _Shdr(ctypes.Structure):
    _fields_ = (("name", c_uint), ("type", c_uint), ("flags", c_uint64), ("addr", c_uint64), ("offset", c_uint64),
                ("size", c_uint64), ("link", c_uint), ("info", c_uint), ("align", c_uint64),
                ("entsize", c_uint64))  # fmt: skip


class Die(ctypes.Structure):
    """One entry; a value, which may be copied."""

    _fields_ = (("addr", c_void_p), ("unit", c_void_p), ("abbrev", c_void_p), ("padding", c_long))

    # --- what it is

    @property
    def tag(self) -> int:
        return int(_f.dwarf_tag(byref(self)))

    @property
    def offset(self) -> int:
        """In its section."""
        return int(_f.dwarf_dieoffset(byref(self)))

    @property
    def cu_offset(self) -> int:
        """In its unit."""
        return int(_f.dwarf_cuoffset(byref(self)))

    @property
    def dwarf(self) -> int:
        """The file that it is in: ``Dwarf.handle``."""
        return int(_f.dwarf_cu_getdwarf(self.unit) or 0)

    def cu(self) -> Die:
        """Returns the entry of its unit."""
        die = Die()
        _need(_f.dwarf_diecu(byref(self), byref(die), None, None))
        return die

    def unit_type(self) -> tuple[int, int]:
        """Returns the unit's DWARF version and type (DW_UT_*)."""
        version, kind = ctypes.c_uint16(), ctypes.c_uint8()
        _zero(_f.dwarf_cu_info(self.unit, byref(version), byref(kind), None, None, None, None, None))
        return version.value, kind.value

    # --- its relatives

    def child(self) -> Die | None:
        die = Die()
        return die if _f.dwarf_child(byref(self), byref(die)) == 0 else None

    def sibling(self) -> Die | None:
        die = Die()
        return die if _f.dwarf_siblingof(byref(self), byref(die)) == 0 else None

    def children(self) -> Iterator[Die]:
        die = self.child()
        while die is not None:
            yield die
            die = die.sibling()

    def scopes(self) -> list[Die]:
        """Returns this entry and those around it, the innermost first."""
        return _scopes(_f.dwarf_getscopes_die, byref(self))

    def scopes_at(self, pc: int) -> list[Die]:
        """Of a unit's entry: returns the innermost entries that have an address, first of all the innermost."""
        return _scopes(_f.dwarf_getscopes, byref(self), pc)

    def inline_instances(self) -> list[Die]:
        """Of an abstract function: returns its inlined copies in the same unit."""
        found: list[Die] = []

        def add(die: Any, _: int | None) -> int:
            found.append(_copy(die.contents))
            return 0

        _f.dwarf_func_inline_instances(byref(self), _CALLBACK(add), None)
        return found

    # --- its attributes

    def attribute(self, name: int, *, own: bool = False) -> Attribute | None:
        """Returns an attribute, which may be one of the abstract or declaring entry that this one refers to.

        Args:
            name: DW_AT_*.
            own: only of this very entry.
        """
        attribute = _Attribute()
        get = _f.dwarf_attr if own else _f.dwarf_attr_integrate
        return Attribute(attribute) if get(byref(self), name, byref(attribute)) else None

    def has(self, name: int, *, own: bool = False) -> bool:
        return bool((_f.dwarf_hasattr if own else _f.dwarf_hasattr_integrate)(byref(self), name))

    def name(self) -> str:
        return _text(_f.dwarf_diename(byref(self)))

    def string(self, name: int) -> str:
        attribute = self.attribute(name)
        return attribute.string() if attribute else ""

    def number(self, name: int, *, own: bool = False) -> int | None:
        """Returns a constant that is not negative."""
        attribute = self.attribute(name, own=own)
        return attribute.unsigned() if attribute else None

    def flag(self, name: int) -> bool:
        attribute = self.attribute(name)
        return attribute is not None and attribute.flag()

    def reference(self, name: int, *, own: bool = False) -> Die | None:
        """Returns the entry that an attribute leads to, which may be in another unit or file."""
        attribute = self.attribute(name, own=own)
        return attribute.die() if attribute else None

    # --- addresses and lines

    def covers(self, pc: int) -> bool:
        """Whether an address is in its code."""
        return int(_f.dwarf_haspc(byref(self), pc)) > 0

    def ranges(self) -> list[tuple[int, int]]:
        """Returns the addresses (from, up to) of its code."""
        found: list[tuple[int, int]] = []
        base, start, end = c_uint64(), c_uint64(), c_uint64()
        at = 0
        while len(found) < _MAX_RANGES:
            at = _f.dwarf_ranges(byref(self), at, byref(base), byref(start), byref(end))
            if at <= 0:
                break
            found.append((start.value, end.value))
        return found

    def entry(self) -> int | None:
        """Returns the address of its first instruction."""
        pc = c_uint64()
        if _f.dwarf_entrypc(byref(self), byref(pc)) == 0:
            return pc.value
        ranges = self.ranges()
        return ranges[0][0] if ranges else None

    def lines(self) -> Lines:
        """Of a unit's entry: returns its line table. Raises NoDebugInfo where it has none."""
        table, count = c_void_p(), c_size_t()
        if _f.dwarf_getsrclines(byref(self), byref(table), byref(count)) != 0 or not table.value:
            raise NoDebugInfo(f"no line table: {error()}")
        return Lines(table, count.value)


class Attribute:
    """An attribute's value."""

    def __init__(self, c: _Attribute) -> None:
        self._c = c

    def _as_expression(self) -> _Attribute:
        """Returns the attribute for who wants an expression. Since DWARF 4 that has a form of its own, and libdw takes no
        other; Go writes a block, which is the same bytes where its length fits into seven bits."""
        block = _Block()
        if self._c.form == _FORM_BLOCK1 and _f.dwarf_formblock(byref(self._c), byref(block)) == 0 < block.length < 128:
            return _Attribute(self._c.code, _FORM_EXPRLOC, self._c.valp, self._c.cu)
        return self._c

    @property
    def form(self) -> int:
        return int(self._c.form)

    def string(self) -> str:
        return _text(_f.dwarf_formstring(byref(self._c)))

    def unsigned(self) -> int | None:
        value = c_uint64()
        return value.value if _f.dwarf_formudata(byref(self._c), byref(value)) == 0 else None

    def signed(self) -> int | None:
        value = ctypes.c_int64()
        return value.value if _f.dwarf_formsdata(byref(self._c), byref(value)) == 0 else None

    def flag(self) -> bool:
        value = c_bool()
        return _f.dwarf_formflag(byref(self._c), byref(value)) == 0 and value.value

    def address(self) -> int | None:
        value = c_uint64()
        return value.value if _f.dwarf_formaddr(byref(self._c), byref(value)) == 0 else None

    def block(self) -> bytes | None:
        block = _Block()
        if _f.dwarf_formblock(byref(self._c), byref(block)) != 0:
            return None
        return ctypes.string_at(block.data, min(block.length, 1 << 16)) if block.data else b""

    def die(self) -> Die | None:
        die = Die()
        return die if _f.dwarf_formref_die(byref(self._c), byref(die)) else None

    def expression(self) -> list[Operation] | None:
        """Returns the expression that holds everywhere; None: it is not one."""
        ops, count = POINTER(Operation)(), c_size_t()
        if _f.dwarf_getlocation(byref(self._as_expression()), byref(ops), byref(count)) != 0:
            return None
        return [ops[i] for i in range(min(count.value, 4096))]

    def expression_at(self, pc: int) -> list[Operation] | None:
        """Returns the expression that holds at an address; None: there is none. Raises NoDebugInfo."""
        ops, count = POINTER(Operation)(), c_size_t()
        found = _f.dwarf_getlocation_addr(byref(self._as_expression()), pc, byref(ops), byref(count), 1)
        if found < 0:
            why = error()
            if self.block() == b"":  # Go says so of what is nowhere
                return None
            raise NoDebugInfo(why)
        return [ops[i] for i in range(min(count.value, 4096))] if found else None

    def operand(self, op: Operation) -> Attribute | None:
        """Returns the value that belongs to an operation of this attribute's expression."""
        attribute = _Attribute()
        if _f.dwarf_getlocation_attr(byref(self._c), byref(op), byref(attribute)) != 0:
            return None
        return Attribute(attribute)

    def implicit_value(self, op: Operation) -> bytes:
        block = _Block()
        if _f.dwarf_getlocation_implicit_value(byref(self._c), byref(op), byref(block)) != 0 or not block.data:
            return b""
        return ctypes.string_at(block.data, min(block.length, 1 << 16))


class _Row(NamedTuple):
    address: int
    line: int
    file: int
    statement: bool
    end: bool


class Lines:
    """The line table of a unit: rows by ascending address."""

    def __init__(self, table: c_void_p, count: int) -> None:
        self._table = table
        self._count = count

    def __len__(self) -> int:
        return self._count

    def of(self, line: int, files: frozenset[int]) -> Iterator[tuple[int, int, int]]:
        """Yields (address, line, number of the file) where a statement of ``line``, or else of the nearest line behind it,
        begins, in one of some files."""
        numbers = self._numbers()
        behind = np.flatnonzero(numbers >= line)
        behind = behind[np.argsort(numbers[behind], kind="stable")]
        nearest = None
        for i in behind.tolist():
            number = int(numbers[i])
            if nearest is not None and number > nearest:
                return
            row = self._row(i)
            if row.file in files and row.statement and not row.end and self._stands(i, row.address, row.file):
                nearest = number
                yield row.address, number, row.file

    def _numbers(self) -> npt.NDArray[np.int32]:
        """Returns the lines of all rows.

        libdw tells them one by one, a microsecond each, and a header's line is looked for in tens of millions of rows. They
        lie in an array of structs, whose layout is libdw's own business: where the line is in them is found by looking for
        the one place that has what libdw says, in rows from all over the table. Without such a place each row is asked for.
        """
        row_at, number = _f.dwarf_onesrcline, c_int()
        sample = range(0, self._count, max(self._count // _SAMPLE, 1))
        if self._count >= _SAMPLE:
            first = row_at(self._table, 0)
            size = row_at(self._table, 1) - first
            last = row_at(self._table, self._count - 1)
            if 16 <= size <= 128 and size % 4 == 0 and last == first + (self._count - 1) * size:
                memory = (ctypes.c_char * (size * self._count)).from_address(first)
                table = np.frombuffer(memory, np.int32).reshape(self._count, size // 4)
                said = np.array([self._row(i).line for i in sample], np.int32)
                places = np.flatnonzero((table[list(sample)] == said[:, None]).all(axis=0))
                if len(places) == 1:
                    return table[:, places[0]]
        numbers = np.zeros(self._count, np.int32)
        for i in range(self._count):
            _f.dwarf_lineno(row_at(self._table, i), byref(number))
            numbers[i] = number.value
        return numbers

    def at(self, pc: int) -> tuple[int, int] | None:
        """Returns the number of the file and the line of an address, as gdb does (symtab.c, find_pc_sect_line): of several
        rows for one address the last, but rather one where a statement begins; what has no line goes with what is before."""
        low, high = 0, self._count
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if self._row(middle).address <= pc else (low, middle)
        i = low - 1
        while i >= 0:
            row = self._row(i)
            if row.end:
                return None
            first = i
            while not row.statement and first and (before := self._row(first - 1)).address == row.address:
                first -= 1
                if before.end:
                    break
                if before.statement:
                    i, row = first, before
            if row.line:
                return row.file, row.line
            i -= 1
        return None

    def _row(self, i: int) -> _Row:
        row = _f.dwarf_onesrcline(self._table, i)
        address, number, file = c_uint64(), c_int(), c_size_t()
        statement, end = c_bool(), c_bool()
        _f.dwarf_lineaddr(row, byref(address))
        _f.dwarf_lineno(row, byref(number))
        _f.dwarf_line_file(row, byref(c_void_p()), byref(file))
        _f.dwarf_linebeginstatement(row, byref(statement))
        _f.dwarf_lineendsequence(row, byref(end))
        return _Row(address.value, number.value, file.value, statement.value, end.value)

    def _stands(self, i: int, pc: int, own: int) -> bool:
        """False: the row stands for no byte, since another file's, or the end, comes at the same address. That is what
        inlining leaves of a call; gdb drops such rows too (dwarf2/read.c, lnp_state_machine::record_line)."""
        address, flag, file, unused = c_uint64(), c_bool(), c_size_t(), byref(c_void_p())
        for j in range(i + 1, min(i + 64, self._count)):
            row = _f.dwarf_onesrcline(self._table, j)
            _f.dwarf_lineaddr(row, byref(address))
            if address.value != pc:
                return True
            _f.dwarf_lineendsequence(row, byref(flag))
            if flag.value:
                return False
            _f.dwarf_line_file(row, unused, byref(file))
            _f.dwarf_linebeginstatement(row, byref(flag))
            if flag.value and file.value != own:
                return False
        return True


class Cfi:
    """Call frame information, from .debug_frame or .eh_frame."""

    def __init__(self, handle: int) -> None:
        self._handle = handle

    def cfa(self, pc: int) -> list[Operation] | None:
        """Returns the expression for the canonical frame address at an address; None where nothing is known."""
        frame, ops, count = c_void_p(), POINTER(Operation)(), c_size_t()
        if _f.dwarf_cfi_addrframe(self._handle, pc, byref(frame)) != 0:
            return None
        if _f.dwarf_frame_cfa(frame, byref(ops), byref(count)) != 0:
            return None
        return [ops[i] for i in range(min(count.value, 4096))]


class Elf:
    """An open ELF file, mapped; sections that are compressed are read out when they are asked for."""

    def __init__(self, fd: int) -> None:
        _load()
        assert _elf is not None
        self.handle = _elf.elf_begin(fd, _ELF_C_READ_MMAP, None)
        if not self.handle:
            raise NoDebugInfo(f"not an ELF file: {_elf_error()}")

    def sections(self, wanted: frozenset[str]) -> dict[str, Memory]:
        """Returns sections by name without their beginning ``.debug_``."""
        assert _elf is not None
        strings = c_size_t()
        found: dict[str, Memory] = {}
        if _elf.elf_getshdrstrndx(self.handle, byref(strings)) != 0:
            return found
        section = None
        while section := _elf.elf_nextscn(self.handle, section):
            header = _Shdr()
            if not _elf.gelf_getshdr(section, byref(header)):
                continue
            name = _text(_elf.elf_strptr(self.handle, strings, header.name))
            short = name.removeprefix(".debug_").removeprefix(".zdebug_")
            if short == name or short not in wanted:
                continue
            data = _elf.elf_getdata(section, None)  # libdw has unpacked it in place
            if data and data.contents.buf:
                found[short] = Memory(data.contents.buf, data.contents.size)
        return found

    def eh_frame(self) -> Cfi | None:
        handle = _f.dwarf_getcfi_elf(self.handle)
        return Cfi(handle) if handle else None


class Dwarf:
    """The debug information of one file."""

    def __init__(self, elf: Elf) -> None:
        """Raises NoDebugInfo where there is none, or it is malformed."""
        self.handle = int(_f.dwarf_begin_elf(elf.handle, _DWARF_C_READ, None) or 0)
        if not self.handle:
            raise NoDebugInfo(f"no debug information that can be read: {error()}")

    def close(self) -> None:
        """Gives back what was read; no entry nor table of it may be used any more."""
        _f.dwarf_end(self.handle)
        self.handle = 0

    def set_alternate(self, other: Dwarf) -> None:
        """Names the file that dwz moved to what several files share."""
        _f.dwarf_setalt(self.handle, other.handle)

    def units(self) -> Iterator[tuple[int, Die]]:
        """Yields the units of .debug_info: (offset, entry)."""
        return self.units_from(0)

    def units_from(self, at: int) -> Iterator[tuple[int, Die]]:
        """Yields the unit at an offset and those behind it."""
        following, header = c_uint64(), c_size_t()
        while _f.dwarf_nextcu(self.handle, at, byref(following), byref(header), None, None, None) == 0:
            die = self.die(at + header.value)
            if die is not None:
                yield at, die
            if following.value <= at:
                return
            at = following.value

    def die(self, offset: int, *, types: bool = False) -> Die | None:
        """Returns the entry at an offset of .debug_info (or .debug_types); None where there is none."""
        die = Die()
        get = _f.dwarf_offdie_types if types else _f.dwarf_offdie
        return die if get(self.handle, offset, byref(die)) else None

    def debug_frame(self) -> Cfi | None:
        handle = _f.dwarf_getcfi(self.handle)
        return Cfi(handle) if handle else None


class Memory:
    """A section's bytes where they lie, mapped or unpacked."""

    def __init__(self, address: int, size: int) -> None:
        self._address = address
        self.size = size

    def find(self, needle: bytes) -> Iterator[int]:
        """Yields the offsets where bytes occur, ascending; they may overlap."""
        at = 0
        while at < self.size:
            found = _libc.memmem(self._address + at, self.size - at, needle, len(needle))
            if not found:
                return
            at = found - self._address
            yield at
            at += 1

    def bytes(self, start: int, size: int) -> bytes:
        """Returns the bytes that are there of ``size``."""
        there = min(size, self.size - start) if start >= 0 else 0
        return ctypes.string_at(self._address + start, there) if there > 0 else b""

    def text(self, at: int) -> str:
        """Returns the string at an offset."""
        return _text(self.bytes(at, _MAX_NAME).split(b"\0", 1)[0])


def error() -> str:
    """Returns what libdw says of the last thing that failed."""
    return _text(_f.dwarf_errmsg(-1)) or "no reason given"


def _elf_error() -> str:
    assert _elf is not None
    return _text(_elf.elf_errmsg(-1)) or "no reason given"


def _text(data: bytes | None) -> str:
    return data[:_MAX_NAME].decode("utf-8", "backslashreplace") if data else ""


def _copy(die: Die) -> Die:
    return Die.from_buffer_copy(die)


def _need(result: object) -> None:
    if not result:
        raise NoDebugInfo(f"an entry is malformed: {error()}")


def _zero(result: int) -> None:
    if result != 0:
        raise NoDebugInfo(f"an entry is malformed: {error()}")


def _scopes(get: Any, *args: Any) -> list[Die]:
    array = POINTER(Die)()
    count = get(*args, byref(array))
    if count <= 0:
        return []
    try:
        return [_copy(array[i]) for i in range(count)]
    finally:
        _free(array)


_CALLBACK = ctypes.CFUNCTYPE(c_int, POINTER(Die), c_void_p)
_libc = ctypes.CDLL(None)
_libc.free.argtypes = (c_void_p,)
_libc.free.restype = None
_libc.memmem.argtypes = (c_void_p, c_size_t, c_char_p, c_size_t)
_libc.memmem.restype = c_void_p


def _free(pointer: Any) -> None:
    _libc.free(ctypes.cast(pointer, c_void_p))


_P, _D, _A = c_void_p, POINTER(Die), POINTER(_Attribute)
_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "dwarf_attr": (_P, (_D, c_uint, _A)),
    "dwarf_attr_integrate": (_P, (_D, c_uint, _A)),
    "dwarf_begin_elf": (_P, (_P, c_int, _P)),
    "dwarf_cfi_addrframe": (c_int, (_P, c_uint64, _P)),
    "dwarf_child": (c_int, (_D, _D)),
    "dwarf_cu_getdwarf": (_P, (_P,)),
    "dwarf_cu_info": (c_int, (_P, _P, _P, _P, _P, _P, _P, _P)),
    "dwarf_cuoffset": (c_uint64, (_D,)),
    "dwarf_diecu": (_P, (_D, _D, _P, _P)),
    "dwarf_diename": (c_char_p, (_D,)),
    "dwarf_dieoffset": (c_uint64, (_D,)),
    "dwarf_end": (c_int, (_P,)),
    "dwarf_entrypc": (c_int, (_D, _P)),
    "dwarf_errmsg": (c_char_p, (c_int,)),
    "dwarf_formaddr": (c_int, (_A, _P)),
    "dwarf_formblock": (c_int, (_A, _P)),
    "dwarf_formflag": (c_int, (_A, _P)),
    "dwarf_formref_die": (_P, (_A, _D)),
    "dwarf_formsdata": (c_int, (_A, _P)),
    "dwarf_formstring": (c_char_p, (_A,)),
    "dwarf_formudata": (c_int, (_A, _P)),
    "dwarf_frame_cfa": (c_int, (_P, _P, _P)),
    "dwarf_func_inline_instances": (c_int, (_D, _CALLBACK, _P)),
    "dwarf_getcfi": (_P, (_P,)),
    "dwarf_getcfi_elf": (_P, (_P,)),
    "dwarf_getlocation": (c_int, (_A, _P, _P)),
    "dwarf_getlocation_addr": (c_int, (_A, c_uint64, _P, _P, c_size_t)),
    "dwarf_getlocation_attr": (c_int, (_A, _P, _A)),
    "dwarf_getlocation_implicit_value": (c_int, (_A, _P, _P)),
    "dwarf_getscopes": (c_int, (_D, c_uint64, _P)),
    "dwarf_getscopes_die": (c_int, (_D, _P)),
    "dwarf_getsrclines": (c_int, (_D, _P, _P)),
    "dwarf_hasattr": (c_int, (_D, c_uint)),
    "dwarf_hasattr_integrate": (c_int, (_D, c_uint)),
    "dwarf_line_file": (c_int, (_P, _P, _P)),
    "dwarf_haspc": (c_int, (_D, c_uint64)),
    "dwarf_lineaddr": (c_int, (_P, _P)),
    "dwarf_linebeginstatement": (c_int, (_P, _P)),
    "dwarf_lineendsequence": (c_int, (_P, _P)),
    "dwarf_lineno": (c_int, (_P, _P)),
    "dwarf_nextcu": (c_int, (_P, c_uint64, _P, _P, _P, _P, _P)),
    "dwarf_offdie": (_P, (_P, c_uint64, _D)),
    "dwarf_offdie_types": (_P, (_P, c_uint64, _D)),
    "dwarf_onesrcline": (_P, (_P, c_size_t)),
    "dwarf_ranges": (c_long, (_D, c_long, _P, _P, _P)),
    "dwarf_setalt": (None, (_P, _P)),
    "dwarf_siblingof": (c_int, (_D, _D)),
    "dwarf_tag": (c_int, (_D,)),
}
_ELF_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "elf_begin": (_P, (c_int, c_int, _P)),
    "elf_errmsg": (c_char_p, (c_int,)),
    "elf_getdata": (POINTER(_Data), (_P, _P)),
    "elf_getshdrstrndx": (c_int, (_P, _P)),
    "elf_nextscn": (_P, (_P, _P)),
    "elf_strptr": (c_char_p, (_P, c_size_t, c_size_t)),
    "gelf_getshdr": (_P, (_P, _P)),
}


class _Functions:
    """libdw's functions, by name."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"{name} before the library was loaded")


_f: Any = _Functions()


def _load() -> None:
    """Loads the library, once. Raises Unsupported where it is not installed."""
    global _dw, _elf
    if _dw is not None:
        return
    try:
        elf, dw = ctypes.CDLL("libelf.so.1"), ctypes.CDLL("libdw.so.1")
        for library, signatures in ((dw, _SIGNATURES), (elf, _ELF_SIGNATURES)):
            for name, (result, arguments) in signatures.items():
                function = getattr(library, name)
                function.restype, function.argtypes = result, arguments
                setattr(_f, name, function)
    except (OSError, AttributeError) as e:
        raise Unsupported(
            f"debug information is read with elfutils' libdw, which is not there: {e}",
            reason="NoLibdw",
            hint="install it: apt-get install libdw1, dnf install elfutils-libs",
        ) from e
    elf.elf_version(1)  # EV_CURRENT
    _dw, _elf = dw, elf


def load() -> None:
    """Loads the library now, while its file can be opened. Raises Unsupported."""
    _load()
