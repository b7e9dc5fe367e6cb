"""The symbols of one file, to be asked by name, pattern, offset, or by what a person types in a search box.

They are columns, not objects: two million symbols are some 200 MB. They come from .symtab, which may be in a separate debug
file or in .gnu_debugdata, from .dynsym, and in a stripped Go program from .gopclntab.
"""

from __future__ import annotations

import contextlib
import difflib
import itertools
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from fnmatch import translate
from pathlib import Path
from typing import NamedTuple

import numpy as np

from trapline.errors import NotFound, ResolveError, Unsupported
from trapline_agent.patterns import compile_pattern
from trapline_agent.symbols import demangle, gopclntab, separate, store
from trapline_agent.symbols.elf import FUNC, IFUNC, ElfFile, Segment, SymbolTable
from trapline_agent.symbols.names import CHUNK, Names
from trapline_agent.symbols.ranges import FunctionRanges

_BINDS = {0: "local", 1: "global", 2: "weak", 10: "global"}  # 10: STB_GNU_UNIQUE
_GO = "runtime.gopanic"
"""What every Go program has."""
_MAX_IDENTITIES = 10_000
_FEW = 20
"""So many matches in a search make looking for scattered letters needless."""
_ADDRESS_BYTES = 8
_NEAR = 256
"""Names that are compared letter by letter for did-you-mean."""
_NEAR_CHUNK = 100_000
"""Names that are looked at together: about 40 MB of arrays."""
_MAX_NEAR = 500_000
_MAX_ALIASES = 64
"""Names of one place that are looked at: libc has places with ten."""
_MAX_DEMANGLED = 200_000
"""Names that a search demangles: half a second."""
_MAX_REGEX_S = 5.0
_MAX_MATCHED = 16_384
"""Bytes of a name that a regular expression is tried on."""
_MAX_PATTERNS, _MAX_KEPT = 8, 100_000
"""So many patterns' matches are kept, of so many symbols at most."""
_CLOCK_NAMES, _LONG = 16, 1000
"""The clock is looked at after so many names, and at each one of more bytes."""
_NEEDS_DEMANGLING = re.compile(r"::|[ <>(){}~&]")


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
    demangled: str
    """Empty where the name is not mangled."""


class SymbolIndex:
    """What is known of a file without its debug information. It does not change, so any thread may ask."""

    def __init__(self, elf: ElfFile, debug: ElfFile | None = None) -> None:
        """Reads a file; raises as ``ElfFile`` and its tables do.

        Args:
            elf: the file.
            debug: its separate debug file, asked for symbols where the file itself is stripped.
        """
        full = elf.symbols()
        stripped, source = full is None, "symtab"
        if full is None and debug is not None:
            full, source = _ignoring_errors(lambda: debug.symbols(elf)), "debug file"
        if full is None:
            full, source = separate.minidebuginfo(elf), "minidebuginfo"
        if full is None:
            full, source = gopclntab.functions(elf), "gopclntab"
        dynamic = elf.dynamic_symbols()
        self._set(
            store.Stored(
                path=elf.path,
                size=elf.size,
                build_id=elf.build_id(),
                soname=elf.soname(),
                segments=elf.segments,
                entry=elf.file_offset(elf.entry),
                relocated=elf.text_relocations(),
                stripped=stripped,
                source=source if full is not None else "",
                dynamic_count=len(dynamic.names) if dynamic else 0,
                imports=elf.imports().blob,
                table=store.StoredTable.of(_merge(full, dynamic)),
            )
        )

    @classmethod
    def of(cls, stored: store.Stored) -> SymbolIndex:
        """Returns an index that was made before."""
        made = cls.__new__(cls)
        made._set(stored)
        return made

    def _set(self, stored: store.Stored) -> None:
        self.stored = stored
        self.path = stored.path
        self.size = stored.size
        self.build_id = stored.build_id
        self.soname = stored.soname
        self.segments: Sequence[Segment] = stored.segments
        self.entry = stored.entry
        self.stripped = stored.stripped
        """The file itself has no .symtab."""
        self.source = stored.source
        """Where local symbols are from: ``symtab``, ``debug file``, ``minidebuginfo``, ``gopclntab`` or empty."""
        self.dynamic_count = stored.dynamic_count
        self.imports = Names(stored.imports)
        table = self._table = stored.table.columns()
        # Several names of one place are put in order when they are asked for.
        self._order = np.frombuffer(stored.table.order, np.uint32)
        self._starts = table.offsets[self._order]
        self._lock = threading.Lock()
        self._matched: dict[str, np.ndarray[tuple[int], np.dtype[np.uint32]]] = {}
        self.is_go = bool(table.names.find(_GO))

    def __len__(self) -> int:
        return len(self._table.names)

    def __iter__(self) -> Iterator[SymbolAt]:
        """Yields all symbols, in no order."""
        return (self._symbol(i) for i in range(len(self)))

    def _symbol(self, i: int) -> SymbolAt:
        t = self._table
        return SymbolAt(
            t.names[i],
            t.versions[int(t.version[i])],
            bool(t.default[i]),
            int(t.offsets[i]),
            int(t.sizes[i]),
            int(t.types[i]),
            _BINDS.get(int(t.binds[i]), "local"),
        )

    # --- by name

    def find(self, name: str) -> list[SymbolAt]:
        """Returns the symbols of a name, one for each offset that has it.

        A plain name means default versions (as the linker does), or, where there is none, every version; ``name@V`` and
        ``name@@V`` mean that version.
        """
        base, _, version = name.partition("@")
        version = version.lstrip("@")
        found = [self._symbol(i) for i in self._table.names.find(name)]
        if version and not found:
            found = [s for i in self._table.names.find(base) if (s := self._symbol(i)).version == version]
        elif not version:
            found = [s for s in found if s.default] or found
        return _one_per_offset(found)

    def glob(self, pattern: str) -> Iterator[SymbolAt]:
        """Yields the default symbols whose names match a shell pattern, one for each offset, by offset.

        A pattern with ``::`` is matched against demangled names without their parameters.
        """
        matches = re.compile(translate(pattern)).match
        demangled = "::" in pattern

        def wanted(names: list[str]) -> Iterator[int]:
            if not demangled:
                return (i for i, name in enumerate(names) if matches(name))
            which = [i for i, n in enumerate(names) if n.startswith(demangle.PREFIXES) and not demangle.is_part(n)]
            bare = demangle.demangle([names[i] for i in which], parameters=False)
            return (i for i, name in zip(which, bare, strict=True) if matches(name))

        return self._matching(f"*{pattern}", wanted)

    def regex(self, pattern: str) -> Iterator[SymbolAt]:
        """Yields the default symbols with a match of a regular expression anywhere in the name, or in the demangled name;
        one for each offset, by offset. Time is linear in the names' length, whatever the pattern (RE2), but the pattern's
        size counts too.

        Raises:
            SpecError: it is no regular expression, or would take too much memory.
            ResolveError: it takes too long.
        """
        search = compile_pattern(pattern)
        deadline = time.monotonic() + _MAX_REGEX_S

        def matches(text: str) -> bool:
            return len(text) <= _MAX_MATCHED and search(text.encode()) is not None

        def wanted(names: list[str]) -> Iterator[int]:
            full = demangle.demangle(names)
            for i, (name, text) in enumerate(zip(names, full, strict=True)):
                if (not i % _CLOCK_NAMES or len(name) > _LONG) and time.monotonic() > deadline:
                    raise ResolveError(
                        f"`/{pattern}/` was not done with {self.path} in {_MAX_REGEX_S:g} s",
                        hint="write a simpler expression, or a glob such as `foo*`",
                        reason="TooSlow",
                    )
                if matches(name) or (text is not name and matches(text)):
                    yield i

        return self._matching(f"/{pattern}", wanted)

    def find_text(self, text: str) -> list[SymbolAt]:
        """Returns the symbols that a name of the source language means, one for each offset, by offset.

        Args:
            text: such as ``ns::Cls::operator->`` or ``f(int)``; without parameters all overloads, without template
                arguments all instances.
        """
        which = self._mangled(demangle.literals(text))
        names = [self._table.names[i] for i in which]
        bare, full = demangle.demangle(names, parameters=False), demangle.demangle(names)
        found = [
            self._symbol(i)
            for i, name, f, b in zip(which, names, full, bare, strict=True)
            if f != name and demangle.meant(text, f, b) and not demangle.is_part(name)
        ]
        return _one_per_offset([s for s in found if s.default])

    def _mangled(self, literals: Sequence[bytes]) -> list[int]:
        """Returns which symbols have mangled names with all of some bytes in them."""
        names = self._table.names
        prefixes = tuple(p.encode() for p in demangle.PREFIXES)
        if literals:
            first, *rest = literals
            raw = ((i, names.raw(i)) for i in names.containing(first))
            return [i for i, name in raw if name.startswith(prefixes) and all(part in name for part in rest)]
        return [at + i for at, chunk in names.chunks() for i, n in enumerate(chunk) if n.startswith(demangle.PREFIXES)]

    def _matching(self, key: str, wanted: Callable[[list[str]], Iterator[int]]) -> Iterator[SymbolAt]:
        """Yields the best default symbol of each offset that has a name which is wanted.

        What the last few patterns matched is kept: an agent asks again every few seconds.
        """
        which = self._matched.get(key)
        if which is None:
            found = [np.fromiter(wanted(chunk), np.int64) + at for at, chunk in self._table.names.chunks()]
            which = np.concatenate(found) if found else np.zeros(0, np.int64)
            which = which[self._table.default[which]].astype(np.uint32)
            with self._lock:
                while len(self._matched) >= _MAX_PATTERNS:
                    del self._matched[next(iter(self._matched))]
                if len(which) <= _MAX_KEPT:
                    self._matched[key] = which
        offsets = self._table.offsets[which]
        order = np.argsort(offsets, kind="stable")
        which, offsets = which[order], offsets[order]
        _, begins = np.unique(offsets, return_index=True)
        for begin, end in itertools.pairwise([*begins.tolist(), len(which)]):
            group = which[begin : min(end, begin + _MAX_ALIASES)].tolist()
            yield min((self._symbol(i) for i in group), key=_rank)

    # --- by offset

    def at(self, offset: int) -> SymbolAt | None:
        """Returns the symbol at or before a file offset in the same segment, whether or not it reaches so far."""
        segment = self.segment_at(offset)
        if segment is None:
            return None
        i = int(np.searchsorted(self._starts, np.uint64(offset), "right"))
        if not i or self._starts[i - 1] < segment.offset:
            return None
        return self._here(int(self._starts[i - 1]))[0]

    def aliases(self, symbol: SymbolAt) -> list[str]:
        """Returns the other names of a symbol's place: aliases, and functions that were folded together."""
        names = (s.name if s.default else f"{s.name}@{s.version}" for s in self._here(symbol.offset))
        own = symbol.name if symbol.default else f"{symbol.name}@{symbol.version}"
        return [n for n in dict.fromkeys(names) if n != own]

    def _here(self, offset: int) -> list[SymbolAt]:
        """Returns the symbols that begin at an offset, the best first."""
        first = int(np.searchsorted(self._starts, np.uint64(offset)))
        last = min(int(np.searchsorted(self._starts, np.uint64(offset), "right")), first + _MAX_ALIASES)
        return sorted((self._symbol(i) for i in self._order[first:last].tolist()), key=_rank)

    def end_of(self, symbol: SymbolAt) -> int:
        """Returns the file offset behind a function: by its size, or without one by the next symbol."""
        segment = self.segment_at(symbol.offset)
        limit = segment.end if segment else symbol.offset
        if symbol.size:
            return min(symbol.offset + symbol.size, limit)
        i = int(np.searchsorted(self._starts, np.uint64(symbol.offset), "right"))
        return min(int(self._starts[i]), limit) if i < len(self._starts) else limit

    def segment_at(self, offset: int) -> Segment | None:
        """Returns the executable segment that has a file offset."""
        return next((s for s in self.segments if s.offset <= offset < s.end), None)

    def is_relocated(self, offset: int, size: int) -> bool:
        """Whether the loader writes an address into some bytes of the file when it has mapped it."""
        i = int(np.searchsorted(self.stored.relocated, offset + size))
        return i > 0 and self.stored.relocated[i - 1] + _ADDRESS_BYTES > offset

    # --- search

    def search(self, query: str, limit: int = 1000) -> tuple[int, list[Match]]:
        """Looks for what a person may mean, ignoring case.

        Args:
            query: part of a name, mangled or demangled; empty: all.
            limit: most matches to return.

        Returns:
            How many match, and the best of them, each name once. Letters in this order (``prcmd``) count only where
            little else matches.
        """
        names = self._table.names
        q = query.lower()
        ranks = np.full(len(names), 9, np.uint8)
        wanted = q.encode("utf-8", "backslashreplace")
        if not q:
            ranks[:] = 1
        elif "\0" not in q:
            which = np.array(names.containing(wanted, names.blob.lower()), np.int64)
            ranks[which] = 2
        if _NEEDS_DEMANGLING.search(q):
            ranks[self._demangled_with(q)] = 2
        if np.count_nonzero(ranks < 9) < _FEW:
            letters = re.compile("".join(f"[^{re.escape(c)}]*+{re.escape(c)}" for c in q[:64]))
            for at, chunk in names.chunks():
                for i, name in enumerate(chunk):
                    if ranks[at + i] == 9 and len(name) < 512 and letters.match(name.lower()):
                        ranks[at + i] = 3
        which = np.flatnonzero(ranks < 9)
        lengths = names.lengths()[which].astype(np.int64)
        # A name or its beginning is short or long: these are looked for among all that match.
        if len(which) <= _MAX_DEMANGLED:
            for i in which[ranks[which] == 2].tolist():
                raw = names.raw(i).lower()
                if raw.startswith(wanted):
                    ranks[i] = 1 if len(raw) > len(wanted) else 0
        best = which[np.lexsort((lengths, ranks[which]))][: 2 * limit]
        texts = [names[i] for i in best.tolist()]
        full = demangle.demangle(texts)
        found: dict[str, Match] = {}
        for i, name, text in zip(best.tolist(), texts, full, strict=True):
            match = Match(int(ranks[i]), len(name), name, self._symbol(i), "" if text == name else text)
            if name not in found or _rank(match.symbol) < _rank(found[name].symbol):
                found[name] = match
        return len(which), sorted(found.values(), key=lambda m: m[:3])[:limit]

    def _demangled_with(self, q: str) -> list[int]:
        """Returns which symbols have a text, in lower case, in their demangled names."""
        names = self._table.names
        lower = names.blob.lower()
        literals = [w.lower() for w in demangle.literals(q)]
        if literals:
            which = [i for i in names.containing(literals[0], lower) if names.raw(i).startswith((b"_Z", b"_R", b"__"))]
        else:
            which = self._mangled(())
        found: list[int] = []
        wanted = demangle.form(q)
        for at in range(0, min(len(which), _MAX_DEMANGLED), CHUNK):
            part = which[at : at + CHUNK]
            full = demangle.demangle([names[i] for i in part])
            found += (
                i for i, text in zip(part, full, strict=True) if q in (t := text.lower()) or wanted in demangle.form(t)
            )
        return found

    def near(self, name: str, count: int = 5) -> list[str]:
        """Returns names that someone who wrote ``name`` may have meant, best first; quick on a million names.

        What has ``::`` or parameters is compared with demangled names.
        """
        if not _NEEDS_DEMANGLING.search(name):
            return [*self._scoped(name, count), *near_names(name, self._table.names, count)][:count]
        which = self._mangled(())[:_MAX_DEMANGLED]
        texts = [self._table.names[i] for i in which]
        bare = demangle.demangle(texts, parameters="(" in name.replace("(anonymous", ""))
        return near_names(name, list(dict.fromkeys(b for b, t in zip(bare, texts, strict=True) if b != t)), count)

    def _scoped(self, name: str, count: int) -> list[str]:
        """Returns functions of that name in some namespace, as the source writes them: ``f`` is ``ns::f``."""
        if not name.isidentifier():
            return []
        names = self._table.names
        which = [i for i in names.containing(name.encode()) if names.raw(i)[:2] in (b"_Z", b"_R")]
        which = which[:_MAX_DEMANGLED]
        bare = demangle.demangle([names[i] for i in which], parameters=False)
        return list(dict.fromkeys(b for b in bare if b.endswith(f"::{name}")))[:count]

    def not_found(self, name: str, module: str) -> NotFound:
        """Returns the error for a name that is not here, with what may have been meant; ``module`` is the file's name."""
        detail = f"no symbol `{name}` in {module}"
        if self._is_imported(name):
            hint = f"`*:{name.partition('@')[0]}` probes it wherever it is defined"
            return NotFound(f"{detail}: it is imported there from another file", hint=hint, reason="Imported")
        bare = self.stripped and not self.source
        if not len(self):
            detail += ": it has no symbols in code at all"
        elif bare:
            detail += f": it is stripped, with {self.dynamic_count} dynamic symbols left"
        hint = "install its debug symbols' package, or probe a file offset (`OBJECT:0xOFFSET`)" if bare else ""
        return NotFound(detail, suggestions=self.near(name), hint=hint, reason="Stripped" if bare else "")

    def _is_imported(self, name: str) -> bool:
        """Whether another file must define a function of this name; ``name@plt`` is the stub that leads there."""
        if self.imports.find(name.partition("@")[0]):
            return True
        literals = demangle.literals(name) if _NEEDS_DEMANGLING.search(name) else []
        texts = [self.imports[i] for i in self.imports.containing(literals[0])] if literals else []
        bare, full = demangle.demangle(texts, parameters=False), demangle.demangle(texts)
        return any(f != t and demangle.meant(name, f, b) for t, f, b in zip(texts, full, bare, strict=True))


def near_names(name: str, names: Sequence[str] | Names, count: int = 5) -> list[str]:
    """Returns names close to ``name``, best first.

    difflib alone takes seconds for 100,000 names: first those with nearly the same set of characters and length are
    found with array operations.
    """
    if not len(names) or not name:
        return []
    name = name[:256].lower()
    chunks = (names[at : at + _NEAR_CHUNK] for at in range(0, min(len(names), _MAX_NEAR), _NEAR_CHUNK))
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


def _ignoring_errors(read: Callable[[], SymbolTable | None]) -> SymbolTable | None:
    """A debug file that cannot be read leaves the program without its names, not without a probe."""
    try:
        return read()
    except (ResolveError, Unsupported):
        return None


def _merge(full: SymbolTable | None, dynamic: SymbolTable | None) -> SymbolTable:
    """.symtab's symbols, and those of .dynsym that it lacks; where both have one, .dynsym knows the version."""
    if full is None or dynamic is None:
        return full or dynamic or SymbolTable.empty()
    order = np.argsort(full.offsets, kind="stable")
    starts = full.offsets[order]
    first = np.searchsorted(starts, dynamic.offsets)
    last = np.minimum(np.searchsorted(starts, dynamic.offsets, "right"), first + _MAX_ALIASES)
    twins = np.full(len(dynamic.names), -1, np.int64)
    mine, theirs = full.names.lengths(), dynamic.names.lengths()
    for step in range(int((last - first).max(initial=0))):
        open_ = np.flatnonzero((first + step < last) & (twins < 0))
        candidates = order[first[open_] + step]
        same = mine[candidates] == theirs[open_]
        for i, j in zip(open_[same].tolist(), candidates[same].tolist(), strict=True):
            if dynamic.names.raw(i) == full.names.raw(j):
                twins[i] = j
    versions = [*full.versions, *dynamic.versions]
    shifted = dynamic.version + np.uint16(len(full.versions))
    version, default = full.version.copy(), full.default.copy()
    known = twins >= 0
    version[twins[known]], default[twins[known]] = shifted[known], dynamic.default[known]
    more = np.flatnonzero(~known)
    blob = full.names.blob + b"".join(dynamic.names.raw(i) + b"\0" for i in more.tolist())
    return SymbolTable(
        Names(blob),
        versions,
        np.concatenate((version, shifted[more])),
        np.concatenate((default, dynamic.default[more])),
        np.concatenate((full.offsets, dynamic.offsets[more])),
        np.concatenate((full.sizes, dynamic.sizes[more])),
        np.concatenate((full.types, dynamic.types[more])),
        np.concatenate((full.binds, dynamic.binds[more])),
    )


# --- the cache


class Identity(NamedTuple):
    """How a file calls itself."""

    soname: str
    build_id: str


class IndexCache:
    """Keeps what was read of files, in memory by their inodes, on disk by their build-ids. Any thread may call."""

    def __init__(self, max_symbols: int = 3_000_000, directory: Path | None = None) -> None:
        """
        Args:
            max_symbols: what is kept in memory altogether; about 100 bytes each.
            directory: where indices are kept for later processes; None: nowhere.
        """
        self._max_symbols = max_symbols
        self._store = store.Store(directory) if directory else None
        self._indices: OrderedDict[tuple[object, ...], SymbolIndex] = OrderedDict()
        self._ranges: OrderedDict[tuple[object, ...], FunctionRanges] = OrderedDict()
        self._identities: OrderedDict[tuple[object, ...], Identity] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, fd: int, path: str) -> SymbolIndex:
        """Returns the index of an open file, reading it where it is not known. Raises as ``SymbolIndex`` does."""
        identity = self.identity(fd, path)
        debug = separate.debug_path(identity.build_id)
        key = (*store.stamp(fd), debug)
        with self._lock:
            if (known := self._indices.get(key)) is not None:
                self._indices.move_to_end(key)
                return known
        made = self._made(fd, path, identity.build_id, debug)
        with self._lock:
            self._indices[key] = made
            total = sum(len(i) for i in self._indices.values())
            while total > self._max_symbols and len(self._indices) > 1:
                _, oldest = self._indices.popitem(last=False)
                total -= len(oldest)
        return made

    def _made(self, fd: int, path: str, build_id: str, debug: separate.DebugPath | None) -> SymbolIndex:
        if self._store is not None:
            kept = self._store.load(fd, build_id, debug)
            if kept is not None:
                kept.path = path
                with contextlib.suppress(ValueError):  # it does not hang together
                    return SymbolIndex.of(kept)
        elf = ElfFile(fd, path)
        with separate.opened(debug, build_id) as debug_file:
            made = SymbolIndex(elf, debug_file)
        if self._store is not None:
            self._store.save(fd, build_id, debug, elf.reads, made.stored)
        return made

    def ranges(self, fd: int, path: str) -> FunctionRanges:
        """Returns where the functions of an open file are by its unwind table; none where it has no usable one."""
        key = store.stamp(fd)
        with self._lock:
            if (known := self._ranges.get(key)) is not None:
                self._ranges.move_to_end(key)
                return known
        made = FunctionRanges(ElfFile(fd, path))
        with self._lock:
            self._ranges[key] = made
            while sum(len(r) for r in self._ranges.values()) > self._max_symbols and len(self._ranges) > 1:
                self._ranges.popitem(last=False)
        return made

    def identity(self, fd: int, path: str) -> Identity:
        """Returns an open file's soname and build-id, without reading its symbols. Raises as ``ElfFile`` does."""
        key = store.stamp(fd)
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
