"""The symbols of one file, to be asked by name, pattern, offset, or by what a person types in a search box."""

from __future__ import annotations

import bisect
import difflib
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from fnmatch import translate
from typing import NamedTuple

import numpy as np

from trapline.errors import NotFound
from trapline_agent.symbols.elf import FUNC, IFUNC, ElfFile, Segment, SymbolTable

_BINDS = {0: "local", 1: "global", 2: "weak", 10: "global"}  # 10: STB_GNU_UNIQUE
_GO = "runtime.gopanic"
"""What every Go program has."""
_CHUNK = 100_000
"""Names that are looked at together: about 40 MB of arrays."""
_MAX_IDENTITIES = 10_000
_FEW = 20
"""So many matches in a search make looking for scattered letters needless."""
_ADDRESS_BYTES = 8
_NEAR = 256
"""Names that are compared letter by letter for did-you-mean."""


class SymbolAt(NamedTuple):
    """One symbol of a file."""

    name: str
    version: str
    default: bool
    """False: only meant where its version is asked for."""
    offset: int
    """File offset of its first instruction."""
    size: int
    """Bytes; 0 where the table does not say."""
    type: int
    bind: str

    @property
    def ifunc(self) -> bool:
        """True: the code at its offset is a resolver, which the loader calls once to choose the real function."""
        return self.type == IFUNC


class Match(NamedTuple):
    """One answer to a search; the best sorts first."""

    rank: int
    """0 the name, 1 its beginning, 2 a part of it, 3 its letters in order."""
    length: int
    name: str
    symbol: SymbolAt


class SymbolIndex:
    """What is known of a file without its debug information. Immutable once made, so any thread may ask."""

    def __init__(self, elf: ElfFile) -> None:
        """Reads a file; raises as ``ElfFile`` and its tables do."""
        self.path = elf.path
        self.size = elf.size
        self.build_id = elf.build_id()
        self.soname = elf.soname()
        self.segments: Sequence[Segment] = elf.segments
        self.code_sections = elf.code_sections()
        self.entry = elf.file_offset(elf.entry)
        self._relocated = elf.text_relocations()
        self.stripped = not elf.has_symtab
        full, dynamic = elf.symbols(), elf.dynamic_symbols()
        self.imports = elf.imports()
        self.dynamic_count = len(dynamic.names) if dynamic else 0
        self._symbols = _merge(full, dynamic)
        self._by_name: dict[str, list[int]] = {}
        for i, symbol in enumerate(self._symbols):
            self._by_name.setdefault(symbol.name, []).append(i)
        self.is_go = _GO in self._by_name
        # Functions first at an offset, so that the best of several names answers.
        self._order = sorted(
            range(len(self._symbols)), key=lambda i: (self._symbols[i].offset, _rank(self._symbols[i]))
        )
        self._starts = [self._symbols[i].offset for i in self._order]
        self._names = list(self._by_name)
        self._lower = [n.lower() for n in self._names]

    def __len__(self) -> int:
        return len(self._symbols)

    def find(self, name: str) -> list[SymbolAt]:
        """Returns the symbols of a name, one for each offset that has it.

        A plain name means default versions (as the linker does), or, where there is none, every version; ``name@V`` and
        ``name@@V`` mean that version.
        """
        base, _, version = name.partition("@")
        version = version.lstrip("@")
        found = [self._symbols[i] for i in self._by_name.get(name, ())]
        if version and not found:
            found = [s for i in self._by_name.get(base, ()) if (s := self._symbols[i]).version == version]
        elif not version:
            found = [s for s in found if s.default] or found
        return _one_per_offset(found)

    def glob(self, pattern: str) -> list[SymbolAt]:
        """Returns the default symbols whose names match a shell pattern, one for each offset, by offset."""
        matches = re.compile(translate(pattern)).match
        found = (self._symbols[i] for name in self._names if matches(name) for i in self._by_name[name])
        return _one_per_offset([s for s in found if s.default])

    def at(self, offset: int) -> SymbolAt | None:
        """Returns the symbol at or before a file offset in the same segment, whether or not it reaches so far."""
        segment = self.segment_at(offset)
        if segment is None:
            return None
        i = bisect.bisect_right(self._starts, offset)
        if not i or self._starts[i - 1] < segment.offset:
            return None
        return self._symbols[self._order[bisect.bisect_left(self._starts, self._starts[i - 1])]]

    def end_of(self, symbol: SymbolAt) -> int:
        """Returns the file offset behind a function: by its size, or without one by the next symbol."""
        segment = self.segment_at(symbol.offset)
        limit = segment.end if segment else symbol.offset
        if symbol.size:
            return min(symbol.offset + symbol.size, limit)
        i = bisect.bisect_right(self._starts, symbol.offset)
        return min(self._starts[i], limit) if i < len(self._starts) else limit

    def segment_at(self, offset: int) -> Segment | None:
        """Returns the executable segment that has a file offset."""
        return next((s for s in self.segments if s.offset <= offset < s.end), None)

    def is_relocated(self, offset: int, size: int) -> bool:
        """Whether the loader writes an address into some bytes of the file when it has mapped it."""
        i = bisect.bisect_left(self._relocated, offset + size)
        return i > 0 and self._relocated[i - 1] + _ADDRESS_BYTES > offset

    def search(self, query: str) -> list[Match]:
        """Looks for what a person may mean, ignoring case.

        Args:
            query: part of a name; empty: all.

        Returns:
            What matches, best first. Letters in this order (``prcmd``) count only where little else matches.
        """
        q = query.lower()
        found: list[Match] = []
        rest: list[int] = []
        for i, lower in enumerate(self._lower):
            at = lower.find(q)
            if at < 0:
                rest.append(i)
            else:
                found.append(self._match(2 if at else 1 if len(lower) > len(q) else 0, i))
        if len(found) < _FEW:
            letters = re.compile("[^\n]*?".join(map(re.escape, q[:64])))
            found += (self._match(3, i) for i in rest if len(self._lower[i]) < 512 and letters.search(self._lower[i]))
        found.sort()
        return found

    def _match(self, rank: int, name: int) -> Match:
        text = self._names[name]
        return Match(rank, len(text), text, self._symbols[self._by_name[text][0]])

    def near(self, name: str, count: int = 5) -> list[str]:
        """Returns names that someone who wrote ``name`` may have meant, best first; quick on a million names."""
        return near_names(name, self._names, count)

    def not_found(self, name: str, module: str) -> NotFound:
        """Returns the error for a name that is not here, with what may have been meant; ``module`` is the file's name."""
        detail = f"no symbol `{name}` in {module}"
        if name.partition("@")[0] in self.imports:
            hint = f"`*:{name}` probes it wherever it is defined"
            return NotFound(f"{detail}: it is imported there from another file", hint=hint, reason="Imported")
        if not self._symbols:
            detail += ": it has no symbols in code at all"
        elif self.stripped:
            detail += f": it is stripped, with {self.dynamic_count} dynamic symbols left"
        hint = "install its debug symbols' package, or probe a file offset (`OBJECT:0xOFFSET`)" if self.stripped else ""
        return NotFound(detail, suggestions=self.near(name), hint=hint, reason="Stripped" if self.stripped else "")


def near_names(name: str, names: Sequence[str], count: int = 5) -> list[str]:
    """Returns names close to ``name``, best first.

    difflib alone takes seconds for 100,000 names: first those with nearly the same set of characters and length are
    found with array operations.
    """
    if not names or not name:
        return []
    name = name[:256].lower()
    chunks = (names[at : at + _CHUNK] for at in range(0, len(names), _CHUNK))
    nearest = [n for chunk in chunks for n in _nearest_sets(name, chunk)]
    lower: dict[str, str] = {}
    for n in nearest:
        lower.setdefault(n.lower(), n)
    return [lower[n] for n in difflib.get_close_matches(name, list(lower), count, cutoff=0.7)]


def _nearest_sets(name: str, names: Sequence[str]) -> list[str]:
    data = np.frombuffer("\0".join(names).lower().encode("latin-1", "replace") + b"\0", np.uint8)
    ends = np.flatnonzero(data == 0)
    if len(ends) != len(names):
        return list(names[:_NEAR])
    starts = np.concatenate(([0], ends[:-1] + 1))
    bit = np.left_shift(np.uint64(1), np.arange(256, dtype=np.uint64) % np.uint64(61))
    bits = np.bitwise_or.reduceat(bit[data], starts)
    wanted = np.bitwise_or.reduce(bit[np.frombuffer(name.encode("latin-1", "replace"), np.uint8)]) | bit[0]
    distance = np.bitwise_count(bits ^ wanted).astype(np.int64) + np.abs(ends - starts - len(name))
    nearest = np.argpartition(distance, min(_NEAR, len(names) - 1))[:_NEAR]
    return [names[i] for i in nearest.tolist()]


def _rank(symbol: SymbolAt) -> tuple[bool, bool, bool, int, str]:
    """Sorts the best of several names of one place first: a function, global, a default version, no underscores."""
    underscores = len(symbol.name) - len(symbol.name.lstrip("_"))
    return symbol.type not in (FUNC, IFUNC), symbol.bind == "local", not symbol.default, underscores, symbol.name


def _one_per_offset(symbols: Sequence[SymbolAt]) -> list[SymbolAt]:
    best: dict[int, SymbolAt] = {}
    for symbol in sorted(symbols, key=_rank):
        best.setdefault(symbol.offset, symbol)
    return [best[offset] for offset in sorted(best)]


def _rows(table: SymbolTable | None) -> Iterator[SymbolAt]:
    if table is None:
        return
    columns = zip(
        table.names,
        table.versions,
        table.default.tolist(),
        table.offsets.tolist(),
        table.sizes.tolist(),
        table.types.tolist(),
        table.binds.tolist(),
        strict=True,
    )
    for name, version, default, offset, size, kind, bind in columns:
        yield SymbolAt(name, version, default, offset, size, kind, _BINDS.get(bind, "local"))


def _merge(full: SymbolTable | None, dynamic: SymbolTable | None) -> list[SymbolAt]:
    """.symtab's symbols, and those of .dynsym that it lacks; where both have one, .dynsym knows the version."""
    if full is None:
        return list(_rows(dynamic))
    versions = {(s.name, s.offset): s for s in _rows(dynamic)}
    merged: list[SymbolAt] = []
    for symbol in _rows(full):
        twin = versions.pop((symbol.name, symbol.offset), None)
        merged.append(symbol._replace(version=twin.version, default=twin.default) if twin else symbol)
    merged.extend(versions.values())
    return merged


class Identity(NamedTuple):
    """How a file calls itself."""

    soname: str
    build_id: str


class IndexCache:
    """Keeps what was read of files, by (device, inode, modification time, size). Any thread may call."""

    def __init__(self, max_symbols: int = 3_000_000) -> None:
        """``max_symbols``: what is kept altogether; about 300 bytes each."""
        self._max_symbols = max_symbols
        self._indices: OrderedDict[_Stamp, SymbolIndex] = OrderedDict()
        self._identities: OrderedDict[_Stamp, Identity] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, fd: int, path: str) -> SymbolIndex:
        """Returns the index of an open file, reading it where it is not known. Raises as ``SymbolIndex`` does."""
        key = _stamp(fd)
        with self._lock:
            if (known := self._indices.get(key)) is not None:
                self._indices.move_to_end(key)
                return known
        made = SymbolIndex(ElfFile(fd, path))
        with self._lock:
            self._indices[key] = made
            total = sum(len(i) for i in self._indices.values())
            while total > self._max_symbols and len(self._indices) > 1:
                _, oldest = self._indices.popitem(last=False)
                total -= len(oldest)
        return made

    def identity(self, fd: int, path: str) -> Identity:
        """Returns an open file's soname and build-id, without reading its symbols. Raises as ``ElfFile`` does."""
        key = _stamp(fd)
        with self._lock:
            if (known := self._identities.get(key)) is not None:
                self._identities.move_to_end(key)
                return known
        elf = ElfFile(fd, path)
        made = Identity(elf.soname(), elf.build_id())
        with self._lock:
            self._identities[key] = made
            while len(self._identities) > _MAX_IDENTITIES:
                self._identities.popitem(last=False)
        return made


_Stamp = tuple[int, int, int, int]


def _stamp(fd: int) -> _Stamp:
    st = os.fstat(fd)
    return st.st_dev, st.st_ino, st.st_mtime_ns, st.st_size
