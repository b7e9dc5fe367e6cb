"""Walks a stopped thread's stack, at the trap: from its registers to its callers, by unwind tables and by frame pointers.

Nothing here fails, waits or writes: a stack that cannot be followed ends, and says why. What it reads: the thread's
registers, its stack by pread of /proc/PID/mem in pieces of 4 to 16 KiB, and /proc/PID/maps where that may have changed.

Tables are made by the agent (``eh_frame``), asked for when a process' files are first seen. Code without one (just now, or
for good: Go's, what a JIT made) is followed by frame pointers where these look like a chain, and the stack says so.

A packed stack is u64 words, little-endian: its ``End`` and flags; then a frame each, innermost first: number of the file <<
32 | offset in it. The offset is that of the instruction itself in the first frame and in one that a signal interrupted,
else of a call's last byte, so that it is the caller's wherever the call may stand. Files are numbered for the tracer's life.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from array import array
from bisect import bisect_right
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import NamedTuple

from trapline.protocol.stacks import BY_FRAME_POINTER, MAX_DEPTH, End, StackFile
from trapline_agent.arch.x86_64.registers import INDEX, RIP
from trapline_agent.arch.x86_64.registers import RSP as RSP_WORD
from trapline_agent.plans import FileKey
from trapline_agent.targets import maps
from trapline_agent.unwind.table import EMPTY, NO_RULE, RA, RBP, RSP, At, Cfa, Place, Rule, UnwindTable, decode

log = logging.getLogger(__name__)

_FIRST_BYTES = 4096
_MORE_BYTES = 16384
_MAX_READS = 64
"""Pieces of one stack: 1 MiB."""
_MAX_FRAME_BYTES = 8 << 20
"""Of a frame that a frame pointer leads over; more is no chain."""
_MAX_FILES = 1 << 16
_MAX_STEPS = 1 << 16
"""Program counters of one process that are remembered."""
_MAX_TABLE_ROWS = 32_000_000
"""Of all tables together: 256 MB."""
_MAX_SEEN = 4096
"""Walks of one process that are remembered, and the most bytes of stack that one may need."""
_MAX_SEEN_BYTES = 32768
_WORD = 8
_LOOK_AGAIN_NS = 100_000_000
"""How often a process' mappings are read again because an address is in none of them."""
_ASK_AGAIN_NS = 1_000_000_000
_FAILED = array("Q", (End.UNSUPPORTED,)).tobytes()
_MASK = (1 << 64) - 1
_VDSO = b"[vdso]"
_NO_FILE = FileKey("", 0)
"""Of the vDSO, whose table it names, and of code without a file."""
_EXECUTABLE = re.compile(
    rb"^([0-9a-f]+)-([0-9a-f]+) ..x. ([0-9a-f]+) ([0-9a-f]+:[0-9a-f]+) ([0-9]+)[ ]*(.*)$", re.MULTILINE
)
_WORD_OF = tuple(
    INDEX[name]
    for name in (
        *("rax", "rdx", "rcx", "rbx", "rsi", "rdi", "rbp", "rsp"),
        *("r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rip"),
    )
)
"""By DWARF's number, the index of a register among a thread's words."""
_BP_WORD = INDEX["rbp"]

_SIGRETURN = b"\x48\xc7\xc0\x0f\x00\x00\x00\x0f\x05"
"""mov $15, %rax; syscall"""
_SIGNAL = Rule(
    Cfa.DEREF,
    RSP,
    160,
    0,
    True,
    tuple(
        Place(register, At.REGISTER, RSP, 40 + 8 * i)
        for i, register in enumerate((8, 9, 10, 11, 12, 13, 14, 15, 5, 4, RBP, 3, 1, 0, 2, RSP, RA))
    ),
)
"""A signal's frame, as the kernel lays it out: struct rt_sigframe and sigcontext, arch/x86/include/uapi/asm/sigcontext.h;
its ucontext is where the stack pointer points when the handler has returned."""

_BY_SP, _BY_BP, _BY_RULE, _OUTERMOST, _NO_RULE = range(5)


class _Region(NamedTuple):
    """One executable mapping."""

    start: int
    end: int
    offset: int
    """File offset of its start; 0 where there is no file."""
    file: int
    """Its number << 32."""
    table: UnwindTable | None
    """None: it has not come yet."""


class _Step(NamedTuple):
    """What is known of one program counter in one process."""

    frame: int
    kind: int
    cfa_offset: int = 0
    bp_offset: int = 0
    """Of the word at CFA + this, which is the caller's rbp; 0: it is unchanged."""
    rule: Rule | None = None
    end: End = End.NO_UNWIND_INFO
    """Where there is no rule: why."""


_Key = tuple[int, int, int, int, int]
"""Instruction, stack and frame pointer; most frames, frames to skip."""


class _Seen(NamedTuple):
    """A walk that was made."""

    size: int
    """Bytes of the stack that it needs."""
    pick: Callable[[Sequence[int]], tuple[int, ...]]
    """Takes the words that it read out of these."""
    values: tuple[int, ...]
    """What they were."""
    packed: bytes


class NewFile(NamedTuple):
    """A file that was first seen in a process whose stacks are walked."""

    file: FileKey
    path: str
    pid: int
    start: int
    end: int


class Stacks:
    """What is known of all processes: files, tables, mappings. Any thread may call; a process is walked by one at a time."""

    def __init__(self, want: Callable[[NewFile], None] = lambda new: None) -> None:
        """``want``: asked for a file's table by the thread that walks, whenever a process is met that has it: the file may
        be another one than the last time. The answer is ``add``; none is needed where nothing has changed."""
        self.want = want
        self._lock = threading.Lock()
        self._numbers: dict[tuple[FileKey, str], int] = {}
        self._files: list[tuple[FileKey, str]] = [(_NO_FILE, "")]
        """By number."""
        self._build_ids: dict[FileKey, str] = {}
        self._tables: dict[FileKey, UnwindTable] = {}
        self._rows = 0
        self._asked: dict[FileKey, int] = {}
        """CLOCK_MONOTONIC ns."""
        self._spaces: dict[int, _Space] = {}
        self.epoch = 0
        """Counts up when a table comes."""

    def add(self, file: FileKey, build_id: str, data: bytes) -> None:
        """Takes a file's table; empty ``data``: it has none. Raises ProtocolError where it is malformed."""
        table = decode(data) if data else EMPTY
        with self._lock:
            old = self._tables.get(file, EMPTY)
            if self._rows + len(table) - len(old) > _MAX_TABLE_ROWS:
                table = EMPTY
            self._rows += len(table) - len(old)
            self._tables[file] = table
            self._build_ids[file] = build_id
            self.epoch += 1

    def ask_again(self) -> None:
        """Another agent has come: all is asked of it that is met."""
        with self._lock:
            self._asked.clear()
            self.epoch += 1

    def meet(self, pid: int, text: bytes) -> None:
        """Asks for the tables of what a process maps, by its maps text, before its stacks are walked."""
        for found in _EXECUTABLE.finditer(text):
            self.region(pid, found)

    def changed(self, pid: int) -> None:
        """A process' mappings may have changed."""
        space = self._spaces.get(pid)
        if space is not None:
            space.fresh = False

    def gone(self, pid: int) -> None:
        """A process has ended."""
        self._spaces.pop(pid, None)

    def file(self, number: int) -> StackFile:
        """Returns the file of a number in a packed stack."""
        file, path = self._files[number if number < len(self._files) else 0]
        identity = f"{file.dev} {file.inode}" if file.inode else ""
        build_id = self._build_ids.get(file, "") if identity or path == _VDSO.decode() else ""
        return StackFile(path=path, build_id=build_id, file=identity)

    def walk(self, pid: int, words: Sequence[int], memory: int, depth: int, skip: int = 0) -> bytes:
        """Returns the packed stack of a stopped thread.

        Args:
            pid: its process.
            words: its registers, as they were before the instruction that it stands at.
            memory: descriptor of its /proc/PID/mem.
            depth: the most frames.
            skip: innermost frames to leave out.
        """
        try:
            space = self._spaces.get(pid)
            if space is None:
                space = self._spaces[pid] = _Space(self, pid)
            if not space.fresh or space.epoch != self.epoch:
                space.look()
            return space.walk(words, memory, min(depth, MAX_DEPTH), skip)
        except Exception:
            # Ours; the hit is to be counted whatever becomes of its stack.
            log.exception("a stack of process %d was not walked", pid)
            return _FAILED

    # --- of the spaces

    def region(self, pid: int, found: re.Match[bytes]) -> _Region:
        start, end, offset, dev, inode, name = found.groups()
        path = os.fsdecode(name.removesuffix(b" (deleted)"))
        first, last = int(start, 16), int(end, 16)
        file = FileKey(dev.decode(), int(inode))
        is_file = file.inode != 0
        if not is_file:
            path = path if name in (_VDSO, b"[vsyscall]") else "[anon]"
        key = file if is_file else _NO_FILE
        number = self._number(key, path) << 32
        if not is_file and name != _VDSO:
            return _Region(first, last, 0, number, EMPTY)
        now = time.monotonic_ns()
        if now - self._asked.get(key, -_ASK_AGAIN_NS) >= _ASK_AGAIN_NS:
            with self._lock:
                if len(self._asked) >= _MAX_FILES:
                    self._asked.clear()
                self._asked[key] = now
            self.want(NewFile(key, path, pid, first, last))
        return _Region(first, last, int(offset, 16), number, self._tables.get(key))

    def _number(self, file: FileKey, path: str) -> int:
        with self._lock:
            number = self._numbers.get((file, path))
            if number is None:
                if len(self._files) >= _MAX_FILES:
                    return 0
                number = self._numbers[file, path] = len(self._files)
                self._files.append((file, path.encode("utf-8", "backslashreplace").decode()))
            return number


class _Space:
    """One process' mappings, and what is known of its program counters. Walked by one thread at a time."""

    def __init__(self, stacks: Stacks, pid: int) -> None:
        self._stacks = stacks
        self._pid = pid
        self._text = b""
        self._regions: list[_Region] = []
        self._starts: list[int] = []
        self._exact: dict[int, _Step] = {}
        self._calls: dict[int, _Step] = {}
        self._seen: dict[_Key, _Seen] = {}
        self._looked_ns = 0
        self.fresh = False
        self.epoch = -1

    def look(self) -> None:
        """Reads the mappings again."""
        self.fresh, epoch = True, self._stacks.epoch
        self._looked_ns = time.monotonic_ns()
        try:
            text = maps.read_maps(self._pid)
        except OSError:
            text = b""
        if text == self._text and epoch == self.epoch:
            return
        self._text, self.epoch = text, epoch
        self._regions = [self._stacks.region(self._pid, m) for m in _EXECUTABLE.finditer(text)]
        self._starts = [r.start for r in self._regions]
        self._exact.clear()
        self._calls.clear()
        self._seen.clear()

    def walk(self, words: Sequence[int], memory: int, depth: int, skip: int) -> bytes:
        key = (words[RIP], words[RSP_WORD], words[_BP_WORD], depth, skip)
        seen = self._seen.get(key)
        if seen is not None:
            try:
                data = os.pread(memory, seen.size, key[1] & ~7)
            except OSError:
                data = b""
            if len(data) == seen.size and seen.pick(memoryview(data).cast("Q")) == seen.values:
                return seen.packed
        stack = _Stack(memory, key[1])
        reads: list[int] = []
        values: list[int] = []
        frames, end = self._walk_plain(words, stack, depth + skip, reads, values)
        packed = array("Q", (end, *frames[skip : skip + depth])).tobytes()
        if end <= End.LIMIT and len(reads) > 1:
            self._see(key, reads, values, packed)
        return packed

    def _see(self, key: _Key, reads: list[int], values: list[int], packed: bytes) -> None:
        """Remembers a walk: it is a function of the registers in the key and of the words that it read, so the next one
        that finds these again need not be made."""
        base = key[1] & ~7
        size = max(reads) + _WORD - base
        if min(reads) < base or size > _MAX_SEEN_BYTES:
            return
        if len(self._seen) >= _MAX_SEEN:
            self._seen.clear()
        self._seen[key] = _Seen(size, itemgetter(*((at - base) >> 3 for at in reads)), tuple(values), packed)

    def _walk_plain(
        self, words: Sequence[int], stack: _Stack, depth: int, reads: list[int], values: list[int]
    ) -> tuple[list[int], int]:
        """By stack pointer and frame pointer alone, which nearly all code needs; falls back to ``_walk_whole``.

        Enters into ``reads`` and ``values`` what it read of the stack, addresses and words. Where that is not all that it
        went by there is nothing in them, or the end is flagged ``BY_FRAME_POINTER``.
        """
        pc, sp, bp = words[RIP], words[RSP_WORD], words[_BP_WORD]
        steps = self._exact
        step = steps.get(pc) or self._step(pc, stack.memory, exact=True)
        steps = self._calls
        frames = [step.frame]
        flags = 0
        base, end, window = stack.base, stack.end, stack.words
        while True:
            _, kind, cfa_offset, bp_offset, _, why = step
            if kind == _BY_SP:
                cfa = sp + cfa_offset
            elif kind == _BY_BP:
                cfa = bp + cfa_offset
            elif kind == _OUTERMOST:
                return frames, End.COMPLETE | flags
            elif kind == _BY_RULE:
                reads.clear()
                return self._walk_whole(words, stack, depth)
            else:
                found = self._by_frame_pointer(len(frames) == 1, sp, bp, stack)
                if found is None:
                    # A chain of frame pointers ends in 0: System V ABI, AMD64 supplement, 3.4.1.
                    return frames, (End.COMPLETE if bp == 0 and flags else why) | flags
                pc, cfa, bp = found
                flags = BY_FRAME_POINTER
                base, end, window = stack.base, stack.end, stack.words
            if cfa <= sp:
                return frames, End.LOOP | flags
            if kind != _NO_RULE:
                at = cfa - 8
                if at & 7:
                    return frames, End.FAULT | flags
                low = at + 8 + bp_offset if bp_offset else at
                if low < base or at >= end:
                    if not stack.read(min(low, at), at):
                        return frames, End.FAULT | flags
                    base, end, window = stack.base, stack.end, stack.words
                pc = window[(at - base) >> 3]
                reads.append(at)
                values.append(pc)
                if bp_offset:
                    bp = window[(low - base) >> 3]
                    reads.append(low)
                    values.append(bp)
            sp = cfa
            if pc == 0:
                return frames, End.COMPLETE | flags
            if len(frames) >= depth:
                return frames, End.LIMIT | flags
            step = steps.get(pc) or self._step(pc, stack.memory, exact=False)
            frames.append(step.frame)
            if step.end is End.BAD_PC:
                return frames, End.BAD_PC | flags

    def _walk_whole(self, words: Sequence[int], stack: _Stack, depth: int) -> tuple[list[int], int]:
        """With all registers: signal frames, realigned stacks, PLT entries, assembly."""
        regs: list[int | None] = [words[i] for i in _WORD_OF]
        frames: list[int] = []
        flags, exact = 0, True
        while True:
            pc, sp = regs[RA], regs[RSP]
            assert pc is not None
            assert sp is not None
            steps = self._exact if exact else self._calls
            step = steps.get(pc) or self._step(pc, stack.memory, exact=exact)
            frames.append(step.frame)
            if step.end is End.BAD_PC and step.rule is None:
                return frames, End.BAD_PC | flags
            if step.kind == _OUTERMOST:
                return frames, End.COMPLETE | flags
            if step.rule is None:
                bp = regs[RBP]
                found = self._by_frame_pointer(len(frames) == 1, sp, bp, stack) if bp is not None else None
                if found is None:
                    return frames, (End.COMPLETE if bp == 0 and flags else step.end) | flags
                flags = BY_FRAME_POINTER
                regs[RA], cfa, regs[RBP] = found
                regs[RSP], exact = cfa, False
            else:
                why = self._apply(step.rule, regs, stack)
                if why is not None:
                    return frames, why | flags
                exact = step.rule.signal
                cfa = regs[RSP] or 0
            # (A signal's handler may run on a stack of its own.)
            if cfa <= sp and not exact:
                return frames, End.LOOP | flags
            if not regs[RA]:
                return frames, End.COMPLETE | flags
            if len(frames) >= depth:
                return frames, End.LIMIT | flags

    def _apply(self, rule: Rule, regs: list[int | None], stack: _Stack) -> End | None:
        """Brings the registers to those of the caller; returns why that cannot be done."""
        base = regs[rule.register]
        if base is None:
            return End.NO_UNWIND_INFO
        cfa: int | None = (base + rule.offset) & _MASK
        assert cfa is not None
        if rule.cfa is Cfa.DEREF:
            cfa = stack.word(cfa)
            if cfa is None:
                return End.FAULT
            cfa = (cfa + rule.extra) & _MASK
        elif rule.cfa is Cfa.PLT:
            cfa += 8 * (((regs[RA] or 0) & 15) >= rule.extra)
        elif rule.cfa is not Cfa.REGISTER:
            return End.UNSUPPORTED
        before = list(regs)
        regs[RSP] = cfa
        for register, at, other, offset in rule.places:
            value: int | None
            if at is At.CFA:
                value = stack.word((cfa + offset) & _MASK)
            elif at is At.CFA_VALUE:
                value = (cfa + offset) & _MASK
            elif at is At.UNDEFINED or at is At.UNSUPPORTED or before[other] is None:
                value = None
            else:
                value = (before[other] + offset) & _MASK  # type: ignore[operator]
                if at is At.REGISTER:
                    value = stack.word(value)
            if value is None and register in (RA, RSP):
                return End.UNSUPPORTED if at is At.UNSUPPORTED else End.FAULT
            regs[register] = value
        return None

    def _by_frame_pointer(self, first: bool, sp: int, bp: int, stack: _Stack) -> tuple[int, int, int] | None:
        """Returns (return address, CFA, caller's rbp) of a frame whose code says nothing, where that can be found."""
        if first:
            # Most probes are at a function's first instruction, before it has pushed anything.
            back = stack.word(sp)
            if back is not None and self._follows_call(back, stack):
                return back, sp + 8, bp
        if bp & 7 or not sp <= bp <= sp + _MAX_FRAME_BYTES:
            return None
        back, outer = stack.word(bp + 8), stack.word(bp)
        if not back or outer is None or self._region(back) is None:
            return None
        return back, bp + 16, outer

    def _follows_call(self, addr: int, stack: _Stack) -> bool:
        """Whether an address is in code, behind what looks like a call instruction (Intel SDM 2A, CALL)."""
        if self._region(addr) is None:
            return False
        try:
            code = os.pread(stack.memory, 7, addr - 7)
        except (OSError, OverflowError):
            return False
        if len(code) < 7:
            return False
        if code[2] in (0xE8, 0xCC):  # int3: where a breakpoint of ours is on the call
            return True
        # ff /2, with a ModRM byte alone, and SIB, and 1 or 4 bytes of displacement
        return any(code[-n] == 0xFF and code[1 - n] >> 3 & 7 == 2 for n in (2, 3, 4, 6, 7))

    def _region(self, pc: int) -> _Region | None:
        i = bisect_right(self._starts, pc) - 1
        if i >= 0 and pc < self._regions[i].end:
            return self._regions[i]
        return None

    def _step(self, pc: int, memory: int, *, exact: bool) -> _Step:
        """Finds out about a program counter, and remembers it."""
        at = pc if exact else pc - 1
        region = self._region(at)
        if region is None and time.monotonic_ns() - self._looked_ns > _LOOK_AGAIN_NS:
            self.look()
            region = self._region(at)
        if region is None:
            return _Step(at & 0xFFFF_FFFF, _NO_RULE, end=End.BAD_PC)
        offset = at - region.start + region.offset
        rule = region.table.at(offset) if region.table is not None else NO_RULE
        if not exact and rule.cfa is Cfa.NONE and _is_trampoline(pc, memory):
            rule = _SIGNAL
        if rule.signal:
            offset = pc - region.start + region.offset  # it was never called: the kernel put it there
        frame = region.file | offset & 0xFFFF_FFFF
        steps = self._exact if exact else self._calls
        if len(steps) >= _MAX_STEPS:
            steps.clear()
        if rule.cfa is Cfa.NONE:
            step = _Step(frame, _NO_RULE, end=End.NO_TABLE_YET if region.table is None else End.NO_UNWIND_INFO)
        else:
            step = _step_of(frame, rule)
        steps[pc] = step
        return step


def _is_trampoline(pc: int, memory: int) -> bool:
    """Whether a signal's handler returns here, in a C library that does not say so (musl's, Go's): rt_sigreturn."""
    try:
        return os.pread(memory, len(_SIGRETURN), pc) == _SIGRETURN
    except (OSError, OverflowError):  # the vsyscall page's address is no offset
        return False


def _step_of(frame: int, rule: Rule) -> _Step:
    places = {p.register: p for p in rule.places}
    back = places.pop(RA, None)
    if back is not None and back.at is At.UNDEFINED:
        return _Step(frame, _OUTERMOST)
    bp = places.pop(RBP, None)
    plain = (
        rule.cfa is Cfa.REGISTER
        and rule.register in (RSP, RBP)
        and not rule.signal
        and back == Place(RA, At.CFA, 0, -8)
        and RSP not in places
        and (bp is None or (bp.at is At.CFA and bp.offset < 0 and bp.offset % 8 == 0))
    )
    if not plain:
        return _Step(frame, _BY_RULE, rule=rule)
    kind = _BY_SP if rule.register == RSP else _BY_BP
    return _Step(frame, kind, rule.offset, bp.offset if bp else 0, rule)


class _Stack:
    """A thread's stack, read in pieces; the present one is ``words``, of the addresses from ``base`` up to ``end``."""

    def __init__(self, memory: int, sp: int) -> None:
        self.memory = memory
        self.base = self.end = 0
        self.words: Sequence[int] = ()
        self._reads = 0
        # The rest of a page costs nothing; of the next one, a look-up and a copy.
        start = sp & ~7
        self._take(start, _FIRST_BYTES)

    def _take(self, start: int, size: int) -> bool:
        self._reads += 1
        if self._reads > _MAX_READS or not 0 <= start < 1 << 63:
            return False
        try:
            data = os.pread(self.memory, size, start)
        except OSError:
            return False
        count = len(data) >> 3
        self.words = memoryview(data)[: count << 3].cast("Q")
        self.base, self.end = start, start + (count << 3)
        return True

    def read(self, low: int, high: int) -> bool:
        """Reads another piece, with the words at ``low`` and ``high`` in it; returns whether both could be read."""
        if high - low > _MORE_BYTES // 2 or low & 7:
            return False
        return self._take(low, _MORE_BYTES) and high < self.end

    def word(self, addr: int) -> int | None:
        """Returns the word at an address; None where it cannot be read."""
        if addr & 7:
            return None
        if not self.base <= addr < self.end and not self.read(addr, addr):
            return None
        return self.words[(addr - self.base) >> 3]
