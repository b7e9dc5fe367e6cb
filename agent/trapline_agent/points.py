"""Places in one file: what a probe's point means there, and whether an instruction begins there."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from trapline.errors import NotFound, ResolveError, TraplineError, Unsupported
from trapline.model import PointKind, ProbeSpec
from trapline_agent.arch.x86_64.calls import GO_CHECK_BYTES, go_body
from trapline_agent.debuginfo.model import Location, Type
from trapline_agent.plans import SEMAPHORE_BYTES, Semaphore
from trapline_agent.symbols.boundaries import MAX_DECODED, instruction_over
from trapline_agent.symbols.elf import ElfFile
from trapline_agent.symbols.index import SymbolAt, SymbolIndex, near_names
from trapline_agent.symbols.ranges import Range
from trapline_agent.symbols.usdt import UsdtProbe, parse_arguments
from trapline_agent.symbols.usdt import probes as usdt_probes

CODE_BYTES = 15
"""The longest instruction."""


@dataclass(frozen=True)
class Place:
    """One instruction that is asked for: an offset, and the symbol it is told by."""

    offset: int
    symbol: SymbolAt | None = None
    error: TraplineError | None = None
    go: bool = False
    """It is behind the stack check of a Go function."""
    shown: str = ""
    """What it is called where that is not a symbol or an offset."""
    file: str = ""
    line: int = 0
    usdt: UsdtProbe | None = None
    semaphore: Semaphore | None = None
    """Of the USDT probe."""

    @property
    def symbol_offset(self) -> int:
        return self.offset - self.symbol.offset if self.symbol else 0

    @property
    def label(self) -> str:
        if self.shown:
            return self.shown
        if self.symbol is None:
            return f"0x{self.offset:x}"
        return f"{self.symbol.name}+0x{self.symbol_offset:x}" if self.symbol_offset else self.symbol.name


def inside(index: SymbolIndex, offset: int) -> SymbolAt | None:
    """Returns the symbol that a place is in; None where none reaches so far."""
    symbol = index.at(offset)
    return symbol if symbol is not None and offset < index.end_of(symbol) else None


def symbol_places(spec: ProbeSpec, index: SymbolIndex, module: str) -> Iterator[Place]:
    """Yields the places that a probe's point means in a file. Raises NotFound where it has none."""
    point = spec.point
    found: Iterable[SymbolAt]
    match point.kind:
        case PointKind.OFFSET:
            yield Place(point.offset, inside(index, point.offset))
            return
        case PointKind.GLOB | PointKind.REGEX:
            matching = index.glob(point.value) if point.kind is PointKind.GLOB else index.regex(point.value)
            first = next(matching, None)
            if first is None:
                shown = point.value if point.kind is PointKind.GLOB else f"/{point.value}/"
                raise NotFound(f"no symbol in {module} matches `{shown}`")
            found = itertools.chain((first,), matching)
        case _:
            # A name of the source language may look like a symbol: `f(int)`, or a C++ function outside of namespaces.
            exact = [] if point.kind is PointKind.TEXT else index.find(point.value)
            found = exact or index.find_text(point.value)
            if not found:
                raise index.not_found(point.value, module)
    for symbol in found:
        yield _symbol_place(index, symbol, point.offset, module)


def usdt_arguments(probe: UsdtProbe) -> tuple[tuple[Type, Location], ...]:
    """Returns the arguments of a USDT probe, as its note has them."""
    return tuple(
        (
            Type("base", size=a.size, encoding="float" if a.floating else "signed" if a.signed else "unsigned"),
            a.location,
        )
        for a in parse_arguments(probe.arguments)
    )


def usdt_places(spec: ProbeSpec, elf: ElfFile, index: SymbolIndex, module: str) -> Iterator[Place]:
    """Yields the places of a USDT probe, which may be compiled into several functions. Raises NotFound."""
    probes = usdt_probes(elf)
    wanted = spec.point.value
    found = [p for p in probes if p.is_meant(wanted, glob=spec.point.kind is PointKind.GLOB)]
    if not found:
        names = sorted({f"{p.provider}:{p.name}" for p in probes})
        detail = f"no USDT probe `{wanted}` in {module}"
        if not probes:
            raise NotFound(f"{detail}: it has none at all", reason="NoUsdt")
        near = near_names(wanted, names) or near_names(wanted, [n.partition(":")[2] for n in names])
        raise NotFound(
            detail, suggestions=near, hint=f"it has {', '.join(names[:8])}" if not near else "", reason="NoUsdt"
        )
    counters: dict[int, set[int]] = {}
    for probe in probes:
        if probe.semaphore:
            counters.setdefault(probe.offset, set()).add(probe.semaphore)
    for probe in found:
        error = semaphore = None
        try:
            semaphore = _semaphore(probe, elf, module, counters)
        except Unsupported as e:
            error = e
        shown = f"{probe.provider}:{probe.name}"
        yield Place(probe.offset, inside(index, probe.offset), error, shown=shown, usdt=probe, semaphore=semaphore)


def _semaphore(probe: UsdtProbe, elf: ElfFile, module: str, counters: Mapping[int, set[int]]) -> Semaphore | None:
    """Returns the counter of a USDT probe, or None where it has none. Raises Unsupported where that cannot be raised.

    Args:
        probe: the probe.
        elf: its file.
        module: what that is called.
        counters: virtual addresses of the counters, by the offset of the probe's instruction.
    """
    if not probe.semaphore:
        return None
    what = f"the semaphore of the USDT probe `{probe.provider}:{probe.name}` in {module}, at 0x{probe.semaphore:x},"
    hint = "probe the function that has it by its symbol"
    offset = elf.data_offset(probe.semaphore, SEMAPHORE_BYTES)
    segment = elf.segment_at(probe.offset)
    if len(counters[probe.offset]) > 1:
        raise Unsupported(f"{what} is one of several of the very same instruction", hint=hint, reason="Semaphore")
    if offset is None or segment is None or offset % SEMAPHORE_BYTES:
        why = "is not in data that the file has" if offset is None else "is not where a number of 16 bits may be"
        raise Unsupported(f"{what} {why}, so that it cannot be raised", hint=hint, reason="Semaphore")
    return Semaphore(offset, probe.semaphore - (probe.offset - segment.offset + segment.vaddr))


def _symbol_place(index: SymbolIndex, symbol: SymbolAt, offset: int, module: str) -> Place:
    error: TraplineError | None = None
    size = index.end_of(symbol) - symbol.offset
    if symbol.ifunc:
        near = [s.name for s in index.glob(f"__{symbol.name}_*") if not s.ifunc and not s.name.endswith("_chk")]
        error = Unsupported(
            f"`{symbol.name}` in {module} is an indirect function: the code of that name only chooses the real one, once",
            hint="probe the implementation that is used on this processor",
            suggestions=sorted(near, key=len)[:5],
            reason="IndirectFunction",
        )
    elif offset and offset >= size:
        error = Unsupported(
            f"`{symbol.name}+0x{offset:x}` is beyond the end of `{symbol.name}`, which is 0x{size:x} bytes long",
            hint=f"for another place in {module} write its offset in the file: 0x{symbol.offset + offset:x}",
            reason="BeyondFunction",
        )
    return Place(symbol.offset + offset, symbol, error)


def entry(fd: int, index: SymbolIndex, place: Place, module: str, ranges: Callable[[int], Range | None]) -> Place:
    """Returns the place where a return probe sees calls begin: a function's first instruction, where the return address is
    the word that the stack pointer leads to. In Go that is behind the stack check, which begins the function anew."""
    if place.error is not None:
        return place
    symbol = place.symbol
    if symbol is None:
        range_ = ranges(place.offset)
        if range_ is not None and range_.function and range_.start == place.offset:
            return place
        if range_ is None:
            return replace(place, error=_unknown(place, module))
        start = [f"ur:{module}:0x{range_.start:x}"] if range_.function else []
        return replace(place, error=_no_function(place, module, start))
    if place.symbol_offset:
        return replace(place, error=_no_function(place, module, [f"ur:{module}:{symbol.name}"]))
    check = 0
    if index.is_go:
        size = min(GO_CHECK_BYTES, max(0, index.end_of(symbol) - symbol.offset))
        check = go_body(read(fd, index, place.offset, size))
    return replace(place, offset=place.offset + check, go=index.is_go)


def read(fd: int, index: SymbolIndex, offset: int, size: int) -> bytes:
    try:
        return os.pread(fd, size, offset)
    except OSError as e:
        raise ResolveError(f"{index.path} cannot be read: {e.strerror}") from e


def not_executable(index: SymbolIndex, offset: int) -> Unsupported:
    if offset >= index.size:
        why = f"it is beyond the end of the file, which is 0x{index.size:x} bytes long"
    else:
        spans = ", ".join(f"0x{s.offset:x} to 0x{s.end:x}" for s in index.segments) or "nowhere"
        why = f"code is at {spans}"
    return Unsupported(
        f"offset 0x{offset:x} of {index.path} is not in its code: {why}",
        hint="an offset is one in the file, not an address; `symbol+offset` is easier to get right",
        reason="NotExecutable",
    )


def _no_function(place: Place, module: str, suggestions: list[str]) -> Unsupported:
    return Unsupported(
        f"{module}:{place.label} is inside of a function, and a return probe needs its first instruction",
        hint="a call's return address is where the stack pointer leads to only there",
        suggestions=suggestions,
        reason="NotAFunction",
    )


def _unknown(place: Place, module: str) -> Unsupported:
    return Unsupported(
        f"whether an instruction begins at {module}:{place.label} cannot be told: no symbol and no unwind information says "
        "where its function begins",
        hint="probe a place in a function that has a symbol, or install the debug symbols' package",
        reason="UnknownBoundary",
    )


def require_boundary(
    fd: int, index: SymbolIndex, place: Place, module: str, ranges: Callable[[int], Range | None]
) -> None:
    """Raises Unsupported where no instruction begins at a place, or where nobody can tell.

    It is found by decoding from the nearest beginning of a function: code is not decoded across a function's end, where
    data may be.
    """
    if place.symbol is not None and not place.symbol_offset:
        return
    if place.offset == index.entry:
        return
    symbol = place.symbol or inside(index, place.offset)
    starts = [symbol.offset] if symbol is not None else []
    if symbol is None or not symbol.size:
        starts += [r.start for r in (ranges(place.offset),) if r is not None]
    start = max(starts, default=None)
    segment = index.segment_at(place.offset)
    if start is None or place.offset - start > MAX_DECODED:
        raise _unknown(place, module)
    to_addr = segment.vaddr - segment.offset if segment else 0
    code = read(fd, index, start, place.offset - start + CODE_BYTES)
    over = instruction_over(code, start + to_addr, place.offset + to_addr)
    if over is None or over.addr == place.offset + to_addr:
        return
    begin = over.addr - to_addr
    near = [f"{module}:{Place(o, place.symbol).label}" for o in (begin, begin + over.length)]
    raise Unsupported(
        f"{module}:{place.label} is in the middle of the instruction `{over.text}`",
        hint="a probe goes where an instruction begins",
        suggestions=near,
        reason="MidInstruction",
    )
