"""Programs at the trap: the tree of a value (``trapline_agent.plans``) made into Python functions, once for each probe.

Nothing here can fail: what cannot be read or computed is a value with its status. What one hit reads is bounded by the
program, and read once: fields that are near one another with one pread.
"""

from __future__ import annotations

import operator
import os
import socket
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from trapline.protocol.hits import ValueStatus
from trapline.protocol.stacks import MAX_DEPTH as MAX_FRAMES
from trapline.protocol.stacks import End
from trapline_agent.arch.x86_64.registers import INDEX, RIP
from trapline_agent.kernel.containers import container_of
from trapline_agent.patterns import compile_pattern
from trapline_agent.plans import (
    Bits,
    Bytes,
    Const,
    Context,
    Entry,
    Frames,
    Here,
    Load,
    Missing,
    Names,
    Op,
    Register,
    Symbol,
    Text,
    Value,
    Xmm,
)

USER_TOP = 0x7FFF_FFFF_F000
"""End of user addresses with four-level page tables (Documentation/arch/x86/x86_64/mm.rst); above it reads fault anyway."""
MASK = (1 << 64) - 1
MAX_DEPTH = 200
MAX_NODES = 4096
MAX_BYTES = 4096
_BLOCK_BYTES = 1024
"""Fields of one struct that lie within so many bytes are read together."""
_PROC_BYTES = 4096
_WORD = 8
_ONE_FRAME = int(End.LIMIT).to_bytes(_WORD, "little")

Scalar = int | float | bytes
"""What a value is; a bool is an int."""
Kept = tuple[tuple[Scalar, int], ...]
"""What a call keeps for its return: (value, status)."""
Walk = Callable[[int, Sequence[int], int, int, int], bytes]
"""``unwind.walk.Stacks.walk``: process, registers, descriptor of its memory, most frames, frames to skip; a packed stack."""
Floats = Callable[[int], bytes]
"""Returns xmm0 to xmm15 of a stopped thread, 16 bytes each; raises OSError."""


class NoValue(Exception):
    """A value that cannot be had, and why."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


_NULL, _FAULT = NoValue(ValueStatus.NULL), NoValue(ValueStatus.FAULT)
_NOT_COMPUTED = (ArithmeticError, LookupError, ValueError, TypeError)


class Hit:
    """One hit while it is looked at."""

    __slots__ = ("cells", "kept", "latency", "memory", "pid", "tid", "truncated", "ts", "words")

    def __init__(
        self, ts: int, pid: int, tid: int, words: Sequence[int], memory: int, cells: int, latency: int, kept: Kept
    ) -> None:
        self.ts = ts
        self.pid = pid
        self.tid = tid
        self.words = words
        self.memory = memory
        self.latency = latency
        self.kept = kept
        self.truncated = False
        self.cells: list[Any] = [None] * cells


Function = Callable[[Hit], Any]


class Values:
    """Values, and a condition, that are computed of one hit."""

    def __init__(
        self,
        values: Sequence[Value],
        condition: Value | None = None,
        floats: Floats | None = None,
        walk: Walk | None = None,
        comms: Mapping[int, str] | None = None,
    ) -> None:
        """
        Args:
            values: what to compute.
            condition: whether to.
            floats: reads floating-point registers; none: they cannot be had.
            walk: takes stacks; none: they cannot be had.
            comms: names of processes by pid: a value that is `comm` alone is that, and costs nothing; none: the thread's.
        """
        roots = [*values] if condition is None else [*values, condition]
        self._entries = list(dict.fromkeys(e.of for root in roots for e in _walk(root) if isinstance(e, Entry)))
        self._at_entry = _Compiled(self._entries, {}, floats, walk)
        self._at_hit = _Compiled(roots, {e: i for i, e in enumerate(self._entries)}, floats, walk)
        self._cells = self._at_hit.cells
        functions = self._at_hit.functions
        self._functions = functions[: len(values)]
        if comms is not None:
            self._functions = [
                (lambda hit: comms.get(hit.pid, "").encode()) if value == Context("comm") else function
                for value, function in zip(values, self._functions, strict=True)
            ]
        self._condition = None if condition is None else functions[-1]

    def keep(self, words: Sequence[int], memory: int) -> Kept:
        """Computes what is asked of a function's entry."""
        if not self._entries:
            return ()
        hit = Hit(0, 0, 0, words, memory, self._at_entry.cells, 0, ())
        return tuple(_computed(f, hit) for f in self._at_entry.functions)

    def hit(
        self, ts: int, pid: int, tid: int, words: Sequence[int], memory: int, latency: int = 0, kept: Kept = ()
    ) -> Hit:
        """Returns a hit to look at; the arguments are as in ``engines.base.Sink`` and ``ReturnSink``."""
        return Hit(ts, pid, tid, words, memory, self._cells, latency, kept)

    def holds(self, hit: Hit) -> bool:
        """Whether the condition is true; one that has no value is not."""
        if self._condition is None:
            return True
        try:
            return bool(self._condition(hit))
        except (NoValue, *_NOT_COMPUTED):
            return False

    def __call__(self, hit: Hit) -> list[tuple[Scalar, int]]:
        """Returns (value, status) for each; the value is 0 where the status is above ``TRUNCATED``."""
        return [_computed(f, hit) for f in self._functions]


def _computed(function: Function, hit: Hit) -> tuple[Scalar, int]:
    hit.truncated = False
    try:
        value = function(hit)
    except NoValue as e:
        return 0, e.status
    except _NOT_COMPUTED:
        return 0, int(ValueStatus.UNSUPPORTED)
    return value, int(ValueStatus.TRUNCATED) if hit.truncated else 0


def _walk(value: Value, *, into_entry: bool = True) -> Iterator[Value]:
    yield value
    if isinstance(value, Entry) and not into_entry:
        return
    for inner in parts(value):
        yield from _walk(inner, into_entry=into_entry)


def parts(value: Value) -> tuple[Value, ...]:
    """Returns what a value is computed of."""
    match value:
        case Load(base=of) | Bits(of=of) | Text(address=of) | Entry(of=of) | Names(of=of) | Symbol(address=of):
            return (of,)
        case Bytes(address=of, size=size):
            return of, size
        case Op(of=some):
            return some
    return ()


class _Compiled:
    """Functions for some values that are computed of the same hit."""

    def __init__(
        self, roots: Iterable[Value], kept: dict[Value, int], floats: Floats | None, walk: Walk | None
    ) -> None:
        self._walk = walk
        self._kept = kept
        self._floats = floats
        self.cells = 0
        """Results that more than one of them needs."""
        roots = list(roots)
        fetches = [
            v
            for root in roots
            for v in _walk(root, into_entry=False)
            if isinstance(v, Load | Text | Bytes | Context | Frames | Symbol)
        ]
        count = Counter(fetches)
        self._shared = {v for v, n in count.items() if n > 1}
        self._blocks: dict[Value, tuple[int, int]] = {}
        """By the address that they are around: (first, last) offset."""
        near: dict[Value, list[tuple[int, int]]] = {}
        for load in count:
            if isinstance(load, Load):
                near.setdefault(load.base, []).append((load.offset, load.offset + load.size))
        for base, spans in near.items():
            low, high = min(a for a, _ in spans), max(b for _, b in spans)
            if len(spans) > 1 and high - low <= _BLOCK_BYTES:
                self._blocks[base] = low, high
        self._done: dict[Value, Function] = {}
        self._read: dict[Value, Function] = {}
        self.functions = [self._function(root) for root in roots]

    def _function(self, value: Value) -> Function:
        made = self._done.get(value)
        # (A bool, an integer and a float may be equal and yet not the same.)
        if made is None or isinstance(value, Const):
            made = self._make(value)
            if value in self._shared:
                made = self._once(made)
            self._done[value] = made
        return made

    def _once(self, function: Function) -> Function:
        """Computes it at the first call for a hit, and remembers it for the next."""
        cell = self.cells
        self.cells += 1

        def once(hit: Hit) -> Any:
            known = hit.cells[cell]
            if known is None:
                before, hit.truncated = hit.truncated, False
                try:
                    known = function(hit), hit.truncated
                except NoValue as e:
                    known = e, False
                hit.cells[cell] = known
                hit.truncated = before
            value, truncated = known
            if isinstance(value, NoValue):
                raise value
            if truncated:
                hit.truncated = True
            return value

        return once

    def _make(self, value: Value) -> Function:
        match value:
            case Const(value=known):
                return lambda hit: known
            case Missing(status=status):
                return _raising(status)
            case Register(name=name):
                register = INDEX[name]
                return lambda hit: hit.words[register]
            case Here(distance=distance):
                return lambda hit: (hit.words[RIP] + distance) & MASK
            case Xmm(number=number):
                return self._xmm(number)
            case Load():
                return self._load(value)
            case Bits(of=of, shift=shift, width=width, as_=as_):
                return _bits(self._function(of), shift, width, as_)
            case Text(address=address, limit=limit):
                return _text(self._function(address), limit)
            case Bytes(address=address, size=size, limit=limit):
                return _bytes(self._function(address), self._function(size), limit)
            case Context(name=name):
                return _CONTEXT.get(name) or _raising(ValueStatus.UNSUPPORTED)
            case Frames(depth=depth, skip=skip):
                return _frames(self._walk, depth, skip)
            case Symbol(address=address):
                return _symbol(self._walk, self._function(address))
            case Entry(of=of):
                return self._at_entry(of)
            case Names(of=of, names=names):
                number_of, text_of = self._function(of), dict(names)
                return lambda hit: text_of.get(n := number_of(hit)) or b"%d" % n
        return _operation(value.op, [self._function(v) for v in value.of], value.of)

    def _at_entry(self, of: Value) -> Function:
        if of not in self._kept:
            return self._function(of)  # it is the entry
        index = self._kept[of]

        def kept(hit: Hit) -> Any:
            value, status = hit.kept[index]
            if status > ValueStatus.TRUNCATED:
                raise NoValue(status)
            if status:
                hit.truncated = True
            return value

        return kept

    def _xmm(self, number: int) -> Function:
        read = self._floats
        if read is None:
            return _raising(ValueStatus.UNSUPPORTED)

        def fetch(hit: Hit) -> int:
            try:
                return int.from_bytes(read(hit.tid)[16 * number : 16 * number + 8], "little")
            except OSError:
                raise _FAULT from None

        return fetch

    def _load(self, load: Load) -> Function:
        base, offset, size = self._function(load.base), load.offset, load.size
        convert = _converter(load.as_, size)
        block = self._blocks.get(load.base)
        if block is None:
            return lambda hit: convert(_read(hit.memory, base(hit), offset, size))
        low, high = block
        whole = self._read.get(load.base)
        if whole is None:

            def read(hit: Hit) -> bytes:
                address = base(hit)
                try:
                    return _read_some(hit.memory, address, low, high - low)
                except NoValue as e:
                    if e is _NULL:
                        raise
                    return b""  # its first byte is not there; others may be

            whole = self._read[load.base] = self._once(read)
        start = offset - low

        def part(hit: Hit) -> Any:
            data = whole(hit)[start : start + size]
            return convert(data if len(data) == size else _read(hit.memory, base(hit), offset, size))

        return part


# --- fetches ---------------------------------------------------------------------------------------------------------


def _raising(status: int) -> Function:
    def fail(hit: Hit) -> Any:
        raise NoValue(status)

    return fail


def _read_some(memory: int, base: int, offset: int, size: int) -> bytes:
    """Reads from the memory of the stopped process; less, where the rest is not mapped (fs/proc/base.c, mem_rw)."""
    if base == 0:
        raise _NULL
    address = (base + offset) & MASK
    if address >= USER_TOP:
        raise _FAULT
    try:
        data = os.pread(memory, size, address)
    except OSError:
        raise _FAULT from None
    if not data:
        raise _FAULT
    return data


def _read(memory: int, base: int, offset: int, size: int) -> bytes:
    data = _read_some(memory, base, offset, size)
    if len(data) < size:
        raise _FAULT
    return data


def _converter(as_: str, size: int) -> Callable[[bytes], int | float]:
    if as_ == "f":
        form = struct.Struct("<f" if size == 4 else "<d")
        return lambda data: form.unpack(data)[0]
    if as_ == "b":
        return lambda data: any(data)
    if as_ == "i":
        return lambda data: int.from_bytes(data, "little", signed=True)
    return lambda data: int.from_bytes(data, "little")


def _bits(of: Function, shift: int, width: int, as_: str) -> Function:
    mask, sign = (1 << width) - 1, 1 << (width - 1)
    if as_ == "f":
        size = width // 8
        convert = _converter("f", size)
        return lambda hit: convert(((of(hit) >> shift) & mask).to_bytes(size, "little"))
    if as_ == "b":
        return lambda hit: (of(hit) >> shift) & mask != 0
    if as_ == "i":
        return lambda hit: (((of(hit) >> shift) & mask) ^ sign) - sign
    return lambda hit: (of(hit) >> shift) & mask


def _text(address: Function, limit: int) -> Function:
    def fetch(hit: Hit) -> bytes:
        data = _read_some(hit.memory, address(hit), 0, limit)
        end = data.find(b"\0")
        if end >= 0:
            return data[:end]
        hit.truncated = True
        return data

    return fetch


def _bytes(address: Function, size: Function, limit: int) -> Function:
    def fetch(hit: Hit) -> bytes:
        wanted = size(hit)
        if wanted <= 0:
            return b""
        data = _read_some(hit.memory, address(hit), 0, min(wanted, limit))
        if len(data) < wanted:
            hit.truncated = True
        return data

    return fetch


def _frames(walk: Walk | None, depth: int, skip: int) -> Function:
    if walk is None:
        return _raising(ValueStatus.UNSUPPORTED)

    def fetch(hit: Hit) -> bytes:
        packed = walk(hit.pid, hit.words, hit.memory, depth, skip)
        if packed[0] > End.LIMIT:
            hit.truncated = True
        return packed

    return fetch


def _symbol(walk: Walk | None, address: Function) -> Function:
    if walk is None:
        return _raising(ValueStatus.UNSUPPORTED)

    def fetch(hit: Hit) -> bytes:
        words = list(hit.words)
        words[RIP] = address(hit)
        if not words[RIP]:
            raise _NULL
        # The innermost frame of a thread that stood there.
        packed = walk(hit.pid, words, hit.memory, 1, 0)
        if len(packed) < 2 * _WORD or not int.from_bytes(packed[_WORD : 2 * _WORD], "little") >> 32:
            raise _FAULT
        return _ONE_FRAME + packed[_WORD : 2 * _WORD]

    return fetch


def _proc(path: str) -> bytes:
    """Reads a file of /proc about a process that is stopped."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return os.read(fd, _PROC_BYTES)
        finally:
            os.close(fd)
    except OSError:
        raise _FAULT from None


def _comm(hit: Hit) -> bytes:
    return _proc(f"/proc/{hit.pid}/task/{hit.tid}/comm").rstrip(b"\n")


def _exe(hit: Hit) -> bytes:
    try:
        return os.readlink(b"/proc/%d/exe" % hit.pid)
    except OSError:
        raise _FAULT from None


def _uid(hit: Hit) -> int:
    """The real user id: proc_pid_status(5)."""
    return int(_proc(f"/proc/{hit.pid}/task/{hit.tid}/status").partition(b"\nUid:")[2].split(None, 1)[0])


def _cgroup(hit: Hit) -> bytes:
    """The path in the unified hierarchy: cgroups(7)."""
    return _proc(f"/proc/{hit.pid}/cgroup").rpartition(b"0::")[2].partition(b"\n")[0]


def _container(hit: Hit) -> bytes:
    return container_of(_proc(f"/proc/{hit.pid}/cgroup")).encode()


def _cpu(hit: Hit) -> int:
    """Where the thread ran last: field 39 of proc_pid_stat(5)."""
    return int(_proc(f"/proc/{hit.pid}/task/{hit.tid}/stat").rpartition(b")")[2].split()[36])


_CONTEXT: dict[str, Function] = {
    "pid": lambda hit: hit.pid,
    "tid": lambda hit: hit.tid,
    "ts": lambda hit: hit.ts,
    "latency": lambda hit: hit.latency,
    "comm": _comm,
    "exe": _exe,
    "uid": _uid,
    "cgroup": _cgroup,
    "container": _container,
    "cpu": _cpu,
}
CONTEXT_NAMES = frozenset(_CONTEXT)

# --- operations ------------------------------------------------------------------------------------------------------

_FAMILIES = {int(socket.AF_INET): slice(4, 8), int(socket.AF_INET6): slice(8, 24)}
"""Where a sockaddr has its address: ip(7), ipv6(7)."""


def _ip(address: bytes | int) -> bytes:
    """The text of 4 or 16 bytes, or of a word that holds 4."""
    if isinstance(address, int):
        address = address.to_bytes(4, "little")
    return socket.inet_ntop(socket.AF_INET if len(address) == 4 else socket.AF_INET6, address).encode()


def _sockaddr(data: bytes) -> bytes:
    """The address in a sockaddr of IPv4 or IPv6, without its port."""
    family = int.from_bytes(data[:2], "little")
    if family not in _FAMILIES:
        raise ValueError
    return _ip(data[_FAMILIES[family]])


_UNARY: dict[str, Callable[[Any], Any]] = {
    "neg": operator.neg,
    "pos": operator.pos,
    "not": operator.not_,
    "invert": operator.invert,
    "len": len,
    "address": lambda n: n & MASK,
    "ip": _ip,
    "sockaddr": _sockaddr,
}


def _shifted(by: int) -> int:
    if not 0 <= by < 64:
        raise ValueError
    return by


_BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": operator.truediv,
    "floordiv": operator.floordiv,
    "mod": operator.mod,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "shl": lambda n, by: n << _shifted(by),
    "shr": lambda n, by: n >> _shifted(by),
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "in": lambda part, whole: part in whole,
    "startswith": lambda text, start: text.startswith(start),
    "endswith": lambda text, end: text.endswith(end),
}
_EXACT = ("eq", "ne", "startswith")
"""With a constant of which the text was read as far as it takes."""
OPERATIONS = frozenset(("all", "any", "if", "matches", *_UNARY, *_BINARY))


def _operation(op: str, of: list[Function], trees: tuple[Value, ...]) -> Function:
    match op:
        case "all":
            return lambda hit: all(f(hit) for f in of)
        case "any":
            return lambda hit: any(f(hit) for f in of)
        case "if":
            test, then, other = of
            return lambda hit: then(hit) if test(hit) else other(hit)
        case "matches":
            pattern = trees[1]
            assert isinstance(pattern, Const)
            assert isinstance(pattern.value, bytes)
            search, subject = compile_pattern(pattern.value), of[0]
            return lambda hit: search(subject(hit)) is not None
    if op in _UNARY:
        one, (inner,) = _UNARY[op], of
        return lambda hit: one(inner(hit))
    two, (left, right) = _BINARY[op], of
    if op in _EXACT and isinstance(trees[1], Const) and isinstance(trees[1].value, bytes):
        known = trees[1].value

        def exact(hit: Hit) -> Any:
            before = hit.truncated
            found = two(left(hit), known)
            hit.truncated = before
            return found

        return exact
    if isinstance(trees[1], Const):
        fixed = trees[1].value
        return lambda hit: two(left(hit), fixed)
    return lambda hit: two(left(hit), right(hit))


# --- what comes from elsewhere ---------------------------------------------------------------------------------------


def fits(*values: Value) -> bool:
    """Whether the values of a program are of a size that is computed at a hit. Takes bounded time in any case."""
    nodes, stack = 0, [(value, 0) for value in values]
    while stack:
        one, depth = stack.pop()
        nodes += 1
        if depth > MAX_DEPTH or nodes > MAX_NODES:
            return False
        stack += [(part, depth + 1) for part in parts(one)]
    return True


def wrong(value: Value) -> str:
    """Returns why a value cannot be computed here, in a few words; an empty string where it can."""
    if not fits(value):
        return "it is too large"
    stack = [value]
    while stack:
        one = stack.pop()
        match one:
            case Register(name=name) if name not in INDEX:
                return f"no register `{name}`"
            case Xmm(number=n) if not 0 <= n < 16:
                return f"no register xmm{n}"
            case Load(size=size, as_=as_) if (
                not 1 <= size <= 8 or as_ not in "uifb" or (as_ == "f" and size not in (4, 8))
            ):
                return f"a load of {size} bytes as `{as_}`"
            case Bits(shift=shift, width=width, as_=as_) if (
                not 1 <= width <= 64
                or not 0 <= shift <= 64
                or as_ not in "uifb"
                or (as_ == "f" and width not in (32, 64))
            ):
                return f"{width} bits as `{as_}`"
            case Text(limit=limit) | Bytes(limit=limit) if not 1 <= limit <= MAX_BYTES:
                return f"{limit} bytes, not 1 to {MAX_BYTES}"
            case Frames(depth=depth_, skip=skip) if not 1 <= depth_ <= MAX_FRAMES or not 0 <= skip <= MAX_FRAMES:
                return f"{depth_} frames of a stack"
            case Context(name=name) if name not in CONTEXT_NAMES:
                return f"no `{name}`"
            case Op(op=op, of=of) if op not in OPERATIONS or not _fits(op, of):
                return f"no operation `{op}` of {len(of)}"
        stack += parts(one)
    return ""


def _fits(op: str, of: tuple[Value, ...]) -> bool:
    if op in ("all", "any"):
        return True
    if op == "matches":
        return len(of) == 2 and isinstance(of[1], Const) and isinstance(of[1].value, bytes)
    return len(of) == (1 if op in _UNARY else 3 if op == "if" else 2)
