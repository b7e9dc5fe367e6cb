"""Makes unwind tables of .eh_frame: what compilers say of every instruction, how to find the caller from there.

Formats: the Linux Standard Base's core specification, "Exception Frames"; DWARF 5, 6.4; the S of signal frames is GCC's
(gcc/dwarf2out.cc). The section is found by PT_GNU_EH_FRAME, as the C++ runtime does, so stripped files have it too.

Files come from anywhere: bytes and rows are bounded, each byte is looked at once, and what is malformed raises
ResolveError, or, inside of one function, costs that function's rows alone.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import NamedTuple

import numpy as np

from trapline.errors import ResolveError
from trapline_agent.symbols.elf import ElfFile
from trapline_agent.unwind.table import EMPTY, MAX_ROWS, NO_RULE, RA, RSP, At, Cfa, Place, Rule, UnwindTable

MAX_BYTES = 64 << 20
"""Of .eh_frame; browsers have some 20 MB."""
_MAX_REMEMBERED = 64
_MAX_OFFSET = 1 << 31
_WORD = (1 << 64) - 1
_OMIT, _INDIRECT = 0xFF, 0x80
_SIZES = {0: 8, 2: 2, 3: 4, 4: 8, 10: 2, 11: 4, 12: 8}
_OP_LIT, _OP_BREG, _OP_DEREF, _OP_AND, _OP_PLUS, _OP_PLUS_UCONST, _OP_SHL, _OP_GE = (
    0x30, 0x70, 0x06, 0x1A, 0x22, 0x23, 0x24, 0x2A,
)  # fmt: skip

_OFFSETS = frozenset((0x05, 0x11, 0x14, 0x15, 0x2F))
"""DW_CFA_offset_extended, _sf, val_offset, _sf, GNU_negative_offset_extended"""

_Cfa = tuple[int, int, int, int]
"""(kind, register, offset, extra)"""
_Regs = dict[int, tuple[int, int, int]]
"""register: (where, other register, offset)"""


_Key = tuple[_Cfa, bool, tuple[tuple[int, tuple[int, int, int]], ...]]
"""A rule, before it is made one: (CFA, signal, registers in order)."""


class _Bad(Exception):
    """The bytes at hand make no sense."""


class _Cie(NamedTuple):
    code_align: int
    data_align: int
    encoding: int
    augmented: bool
    signal: bool
    cfa: _Cfa
    regs: _Regs


_NONE: _Cfa = (Cfa.NONE, 0, 0, 0)
_UNSUPPORTED: _Cfa = (Cfa.UNSUPPORTED, 0, 0, 0)


def read_table(elf: ElfFile) -> UnwindTable:
    """Returns a file's table; an empty one where it has no .eh_frame. Takes about 4 us a row.

    Raises:
        ResolveError: the file is malformed, or has more than ``MAX_BYTES`` or ``MAX_ROWS`` of it.
    """
    found = elf.eh_frame(MAX_BYTES)
    if found is None:
        return EMPTY
    vaddr, data = found
    return _Reader(elf, vaddr, data).table()


class _Reader:
    def __init__(self, elf: ElfFile, vaddr: int, data: bytes) -> None:
        self._elf = elf
        self._vaddr = vaddr
        self._data = data
        self._rules: dict[_Key, int] = {(_NONE, False, ()): 0}
        self._starts: list[int] = []
        self._which: list[int] = []
        segments = sorted((s for s in elf.segments), key=lambda s: s.vaddr)
        self._segments = segments
        self._segment_starts = [s.vaddr for s in segments]

    def table(self) -> UnwindTable:
        data, at, end = self._data, 0, len(self._data)
        cies: dict[int, _Cie | None] = {}
        while at + 4 <= end:
            length = int.from_bytes(data[at : at + 4], "little")
            if length == 0:
                break
            begin, body = at, at + 4
            if length == 0xFFFF_FFFF:
                length = int.from_bytes(data[body : body + 8], "little")
                body += 8
            stop = body + length
            if stop > end or length < 4:
                break  # behind the last entry of a file without a terminator
            cie = int.from_bytes(data[body : body + 4], "little")
            try:
                if cie == 0:
                    cies[begin] = self._cie(body + 4, stop)
                elif (known := cies.get(body - cie)) is not None:
                    self._fde(known, body + 4, stop)
            except (_Bad, IndexError):
                cies.setdefault(begin, None)
            if len(self._starts) > MAX_ROWS:
                raise ResolveError(f"{self._elf.path} has more than {MAX_ROWS:,} rows of unwind information")
            at = stop
        return self._sorted()

    def _sorted(self) -> UnwindTable:
        if not self._starts:
            return EMPTY
        starts, which = np.array(self._starts, np.uint32), np.array(self._which, np.uint32)
        # At one offset an end comes before a beginning, and then the last one holds.
        order = np.lexsort((which != 0, starts))
        starts, which = starts[order], which[order]
        last = np.append(starts[1:] != starts[:-1], True)
        starts, which = starts[last], which[last]
        news = np.append(True, which[1:] != which[:-1])
        return UnwindTable(starts[news], which[news], [_made(key) for key in self._rules])

    # --- entries

    def _cie(self, at: int, stop: int) -> _Cie:
        data = self._data
        version = data[at]
        if version not in (1, 3):
            raise _Bad
        nul = data.find(b"\0", at + 1, stop)
        if nul < 0:
            raise _Bad
        augmentation = data[at + 1 : nul]
        code_align, at = self._uleb(nul + 1, stop)
        data_align, at = self._sleb(at, stop)
        if version == 1:
            ra, at = data[at], at + 1
        else:
            ra, at = self._uleb(at, stop)
        encoding, signal = 0, False
        if augmentation[:1] == b"z":
            size, at = self._uleb(at, stop)
            body, at = at, at + size
            for letter in augmentation[1:]:
                if letter == ord("R"):
                    encoding, body = data[body], body + 1
                elif letter == ord("P"):
                    kind = data[body]
                    _, body = self._encoded(body + 1, kind & 0x0F)
                elif letter == ord("L"):
                    body += 1
                elif letter == ord("S"):
                    signal = True
                else:
                    break  # of others: the size is known, and what comes before it
        elif augmentation:
            raise _Bad
        if at > stop or ra != RA:
            raise _Bad
        cie = _Cie(code_align, data_align, encoding, augmentation[:1] == b"z", signal, _NONE, {})
        cfa, regs = self._run(cie, at, stop, 0, None)
        return cie._replace(cfa=cfa, regs=regs)

    def _fde(self, cie: _Cie, at: int, stop: int) -> None:
        start, at = self._encoded(at, cie.encoding)
        size, at = self._encoded(at, cie.encoding & 0x0F)
        if cie.augmented:
            length, at = self._uleb(at, stop)
            at += length
        i = bisect_right(self._segment_starts, start) - 1
        if i < 0 or size <= 0 or at > stop:
            return
        segment = self._segments[i]
        begin = start - segment.vaddr + segment.offset
        end = begin + size
        if end > segment.end or end >= 1 << 32:
            return  # the linker left it out, or it is beyond what a table holds
        before = len(self._starts)
        try:
            self._run(cie, at, stop, begin, end)
        except (_Bad, IndexError):
            self._emit(begin if len(self._starts) == before else self._starts[-1], _NONE, {}, False)
        # What lies behind the function's own end is none of its business.
        self._starts.append(end)
        self._which.append(0)

    # --- instructions

    def _emit(self, offset: int, cfa: _Cfa, regs: _Regs, signal: bool) -> None:
        key = (cfa, signal, tuple(sorted(regs.items())))
        rule = self._rules.get(key)
        if rule is None:
            rule = self._rules[key] = len(self._rules)
        self._starts.append(offset)
        self._which.append(rule)

    def _run(self, cie: _Cie, at: int, stop: int, pc: int, end: int | None) -> tuple[_Cfa, _Regs]:
        """Runs the instructions of an entry; emits a row wherever its place advances, unless ``end`` is None (a CIE)."""
        data, code_align, data_align = self._data, cie.code_align, cie.data_align
        uleb, sleb = self._uleb, self._sleb
        cfa, regs = cie.cfa, dict(cie.regs)
        kept: list[tuple[_Cfa, _Regs]] = []
        while at < stop:
            op = data[at]
            at += 1
            high, low = op & 0xC0, op & 0x3F
            step = -1
            if high == 0x40:  # advance_loc
                step = low
            elif high == 0x80:  # offset
                n, at = uleb(at, stop) if data[at] & 0x80 else (data[at], at + 1)
                if low <= RA:
                    regs[low] = (At.CFA, 0, n * data_align)
            elif high == 0xC0:  # restore
                _restore(regs, cie.regs, low)
            elif op == 0x0E:  # def_cfa_offset
                n, at = uleb(at, stop)
                cfa = (cfa[0], cfa[1], n, 0) if cfa[0] == Cfa.REGISTER else _UNSUPPORTED
            elif op == 0x00:
                continue
            elif op == 0x02:
                step, at = data[at], at + 1
            elif op == 0x03:
                step, at = int.from_bytes(data[at : at + 2], "little"), at + 2
            elif op == 0x04:
                step, at = int.from_bytes(data[at : at + 4], "little"), at + 4
            elif op == 0x0A:  # remember_state
                if len(kept) == _MAX_REMEMBERED:
                    raise _Bad
                kept.append((cfa, dict(regs)))
            elif op == 0x0B:  # restore_state: the CFA too, as GCC means it
                if not kept:
                    raise _Bad
                cfa, regs = kept.pop()
            elif op == 0x0C:  # def_cfa
                register, at = uleb(at, stop)
                n, at = uleb(at, stop)
                cfa = (Cfa.REGISTER, register, n, 0)
            elif op == 0x0D:  # def_cfa_register
                register, at = uleb(at, stop)
                cfa = (Cfa.REGISTER, register, cfa[2], 0) if cfa[0] == Cfa.REGISTER else _UNSUPPORTED
            elif op == 0x0F:  # def_cfa_expression
                size, at = uleb(at, stop)
                cfa, at = self._cfa_expression(at, at + size, stop), at + size
            elif op in (0x10, 0x16):  # expression, val_expression
                register, at = uleb(at, stop)
                size, at = uleb(at, stop)
                if register <= RA:
                    kind = At.REGISTER if op == 0x10 else At.REGISTER_VALUE
                    found = self._breg(at, at + size, stop)
                    regs[register] = (kind, *found) if found else (At.UNSUPPORTED, 0, 0)
                at += size
            elif op == 0x12:  # def_cfa_sf
                register, at = uleb(at, stop)
                n, at = sleb(at, stop)
                cfa = (Cfa.REGISTER, register, n * data_align, 0)
            elif op == 0x13:  # def_cfa_offset_sf
                n, at = sleb(at, stop)
                cfa = (cfa[0], cfa[1], n * data_align, 0) if cfa[0] == Cfa.REGISTER else _UNSUPPORTED
            elif op in _OFFSETS:
                register, at = uleb(at, stop)
                n, at = sleb(at, stop) if op in (0x11, 0x15) else uleb(at, stop)
                n = n * data_align if op != 0x2F else -n * data_align
                if register <= RA:
                    regs[register] = (At.CFA_VALUE if op in (0x14, 0x15) else At.CFA, 0, n)
            elif op == 0x06:  # restore_extended
                register, at = uleb(at, stop)
                _restore(regs, cie.regs, register)
            elif op == 0x07:  # undefined
                register, at = uleb(at, stop)
                if register <= RA:
                    regs[register] = (At.UNDEFINED, 0, 0)
            elif op == 0x08:  # same_value
                register, at = uleb(at, stop)
                regs.pop(register, None)
            elif op == 0x09:  # register
                register, at = uleb(at, stop)
                other, at = uleb(at, stop)
                if register <= RA:
                    regs[register] = (At.REGISTER_VALUE, other, 0) if other < RA else (At.UNSUPPORTED, 0, 0)
            elif op == 0x2E:  # GNU_args_size
                _, at = uleb(at, stop)
            else:  # set_loc, which nobody writes here, and what is unknown
                raise _Bad
            if step >= 0:
                if end is None:
                    raise _Bad
                if step:
                    self._emit(pc, cfa, regs, cie.signal)
                    pc += step * code_align
                    if pc >= end:
                        return cfa, regs
        if end is not None:
            self._emit(pc, cfa, regs, cie.signal)
        return cfa, regs

    def _cfa_expression(self, at: int, end: int, stop: int) -> _Cfa:
        """Returns what an expression says where it is one of those that are in use: of PLT entries, of realigned stacks, of
        signal frames."""
        if end > stop or at >= end:
            raise _Bad
        data = self._data
        register = data[at] - _OP_BREG
        if not 0 <= register < RA:
            return _UNSUPPORTED
        offset, at = self._sleb(at + 1, end)
        rest = data[at:end]
        if rest[:1] == bytes((_OP_DEREF,)):
            if len(rest) == 1:
                return Cfa.DEREF, register, offset, 0
            if rest[1] == _OP_PLUS_UCONST:
                extra, at = self._uleb(at + 2, end)
                return (Cfa.DEREF, register, offset, extra) if at == end else _UNSUPPORTED
        plt = bytes((_OP_BREG + RA, 0, _OP_LIT + 15, _OP_AND, rest[4] if len(rest) > 4 else 0, _OP_GE))
        plt += bytes((_OP_LIT + 3, _OP_SHL, _OP_PLUS))
        if rest == plt and _OP_LIT <= rest[4] < _OP_LIT + 16:
            return Cfa.PLT, register, offset, rest[4] - _OP_LIT
        return _UNSUPPORTED

    def _breg(self, at: int, end: int, stop: int) -> tuple[int, int] | None:
        """Returns (register, offset) of an expression that is no more than that."""
        if end > stop:
            raise _Bad
        register = self._data[at] - _OP_BREG if at < end else -1
        if not 0 <= register < RA:
            return None
        offset, at = self._sleb(at + 1, end)
        return (register, offset) if at == end else None

    # --- numbers

    def _uleb(self, at: int, stop: int) -> tuple[int, int]:
        value = shift = 0
        while at < stop and shift < 64:
            byte = self._data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value, at
        raise _Bad

    def _sleb(self, at: int, stop: int) -> tuple[int, int]:
        value, after = self._uleb(at, stop)
        bits = 7 * (after - at)
        return (value - (1 << bits) if value >> (bits - 1) & 1 else value), after

    def _encoded(self, at: int, encoding: int) -> tuple[int, int]:
        """Reads an address or a size (DW_EH_PE_*)."""
        kind = encoding & 0x0F
        size = _SIZES.get(kind)
        if size is None or encoding & _INDIRECT or at + size > len(self._data):
            raise _Bad
        value = int.from_bytes(self._data[at : at + size], "little", signed=bool(kind & 8))
        application = encoding & 0x70
        if application == 0x10:  # relative to its own place
            value += self._vaddr + at
        elif application:
            raise _Bad
        return value & _WORD, at + size


def _restore(regs: _Regs, initial: _Regs, register: int) -> None:
    if register in initial:
        regs[register] = initial[register]
    else:
        regs.pop(register, None)


def _made(key: _Key) -> Rule:
    """Returns the rule of an interned key; one with numbers that a table does not hold is unsupported."""
    cfa, signal, regs = key
    kind, register, offset, extra = cfa
    if kind == Cfa.NONE:
        return NO_RULE
    places = tuple(Place(r, At(at), other, n) for r, (at, other, n) in regs)
    numbers = (offset, extra, *(p.offset for p in places))
    if kind == Cfa.UNSUPPORTED or register >= RA or not all(-_MAX_OFFSET <= n < _MAX_OFFSET for n in numbers):
        return Rule(Cfa.UNSUPPORTED)
    if any(p.register == RSP and p.at is At.CFA_VALUE and p.offset == 0 for p in places):
        places = tuple(p for p in places if p.register != RSP)
    return Rule(Cfa(kind), register, offset, extra, signal, places)
