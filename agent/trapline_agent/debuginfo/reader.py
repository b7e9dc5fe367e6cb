"""The answers of one file's debug information. Runs in the reader process alone; libdw does the work.

Names are not indexed: a name's bytes are looked for in .debug_str, its offset there in .debug_info, and the entries around
such places are read. That takes a fraction of a second for hundreds of megabytes, without having read an entry before.
"""

from __future__ import annotations

import bisect
import difflib
import itertools
import posixpath
import re
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple

import msgspec

from trapline.errors import NoDebugInfo, NotFound
from trapline_agent.debuginfo import dwarf as dw
from trapline_agent.debuginfo import expressions, lineheader, names
from trapline_agent.debuginfo.libdw import Attribute, Cfi, Die, Dwarf, Elf, Lines, Memory
from trapline_agent.debuginfo.model import Function, LinePlace, Location, Op, Scope, Type, TypeRef, Variable
from trapline_agent.debuginfo.types import TypeReader
from trapline_agent.symbols.elf import ElfFile

FORMAT: Final = 1
"""Of ``Index``; one of another format is made anew."""
_SECTIONS: Final = frozenset(("info", "line", "line_str", "str", "str_offsets"))
_MAX_UNITS: Final = 1_000_000
_MAX_PLACES: Final = 10_000
_MAX_CHAIN: Final = 64
_MAX_VARIABLES: Final = 5_000
_MAX_HEADER: Final = 1 << 20
_MAX_HEADERS: Final = 64
_MAX_ROWS: Final = 1_000_000
"""About 50 MB."""
_NEAR: Final = 5
_SKIPPED: Final = frozenset((dw.TAG_subprogram, dw.TAG_inlined_subroutine))


class Index(msgspec.Struct):
    """What takes a look at every unit: where their code and their files are. Kept on disk."""

    format: int
    units: list[int]
    """Offsets in .debug_info, ascending."""
    starts: list[int]
    """Addresses where a unit's code begins, ascending; with ``ends`` and ``owners``."""
    ends: list[int]
    owners: list[int]
    """Index into ``units``."""
    files: dict[str, list[tuple[str, list[int]]]]
    """By their last component: (path, indexes into ``units``)."""


class Segment(NamedTuple):
    """Of the program, which the debug information may lie apart from."""

    offset: int
    vaddr: int
    size: int


_NOTHING: Final = Memory(0, 0)


class _File(NamedTuple):
    """One file of debug information: the main one, or what dwz took out of it."""

    dwarf: Dwarf
    sections: dict[str, Memory]
    units: list[int]

    def section(self, name: str) -> Memory:
        return self.sections.get(name, _NOTHING)

    def unit_at(self, offset: int) -> int:
        """Returns the index of the unit that an offset of .debug_info is in."""
        return bisect.bisect_right(self.units, offset) - 1


class Reader:
    """One file; a single thread."""

    def __init__(self, program: int, debug: int | None, alternate: int | None, segments: list[Segment]) -> None:
        """
        Args:
            program: descriptor of the file that is mapped to run.
            debug: of the file with its debug information, where that is another.
            alternate: of the file that dwz moved a part of it to.
            segments: the program's code.

        Raises:
            NoDebugInfo: it has none, or it is malformed.
            Unsupported: libdw is not there.
        """
        self._program = Elf(program)
        elf = self._elf = Elf(debug) if debug is not None else self._program
        self._segments = segments
        self.thread_block = ElfFile(program, "the program").thread_block()
        """See ``expressions.Frame``."""
        main = Dwarf(elf)
        other: _File | None = None
        if alternate is not None:
            shared = Elf(alternate)
            dwarf = Dwarf(shared)
            main.set_alternate(dwarf)
            other = _File(dwarf, shared.sections(_SECTIONS), [at for at, _ in dwarf.units()])
        self._main = _File(main, elf.sections(_SECTIONS), [])
        self._other = other
        self._cfis: list[Cfi] | None = None
        self._index: Index | None = None
        self._types = TypeReader(self._reference, self.qualified, self._definition)
        self._names: OrderedDict[_Key, str] = OrderedDict()
        self._headers: OrderedDict[int, list[str]] = OrderedDict()
        self._rows: dict[int, int] = {}
        """Of the line tables that libdw keeps, by unit."""

    # --- the index

    def use(self, data: bytes) -> bool:
        """Takes an index that ``index`` made once; False: it is of another format."""
        try:
            index = msgspec.msgpack.decode(data, type=Index)
        except msgspec.MsgspecError:
            return False
        same = len(index.starts) == len(index.ends) == len(index.owners)
        if index.format != FORMAT or not same or any(not 0 <= n < len(index.units) for n in index.owners):
            return False
        self._take(index)
        return True

    def index(self) -> bytes:
        """Makes the index, and returns it for others to keep. Raises NoDebugInfo."""
        units: list[int] = []
        spans: list[tuple[int, int, int]] = []
        files: dict[str, dict[str, list[int]]] = {}
        split = 0
        for number, (offset, die) in enumerate(self._main.dwarf.units()):
            if number >= _MAX_UNITS:
                raise NoDebugInfo(f"it has more than {_MAX_UNITS} units")
            units.append(offset)
            split += die.tag == dw.TAG_skeleton_unit or die.has(dw.AT_GNU_dwo_name) or die.has(dw.AT_dwo_name)
            spans += ((start, end, number) for start, end in die.ranges() if end > start and self._is_code(start))
            for path in dict.fromkeys(path for path in self._files(die) if path):
                files.setdefault(posixpath.basename(path), {}).setdefault(path, []).append(number)
        if not units:
            raise NoDebugInfo("it has no units of debug information")
        if split == len(units):
            raise NoDebugInfo(
                "its debug information is in .dwo files, which are not read",
                reason="SplitDwarf",
                hint="build it without -gsplit-dwarf",
            )
        spans.sort()
        index = Index(
            FORMAT,
            units,
            [start for start, _, _ in spans],
            [end for _, end, _ in spans],
            [owner for _, _, owner in spans],
            {name: list(paths.items()) for name, paths in files.items()},
        )
        self._take(index)
        return msgspec.msgpack.encode(index)

    def _take(self, index: Index) -> None:
        self._index = index
        self._main = self._main._replace(units=index.units)
        self._reach: list[int] = []
        """The highest end of the spans so far: how far back one may have to look."""
        highest = 0
        for end in index.ends:
            highest = max(highest, end)
            self._reach.append(highest)

    def _need(self) -> Index:
        if self._index is None:
            self.index()
        assert self._index is not None
        return self._index

    def _files(self, unit: Die) -> list[str]:
        """Returns the paths of a unit's files by their number; empty where there is none of that number."""
        table = unit.number(dw.AT_stmt_list, own=True)
        if table is None:
            return []
        if table not in self._headers:
            data = self._main.section("line").bytes(table, _MAX_HEADER)
            try:
                paths = lineheader.file_names(data, self._line_string, unit.string(dw.AT_comp_dir))
            except lineheader.Malformed:
                paths = []
            if len(self._headers) >= _MAX_HEADERS:
                self._headers.popitem(last=False)
            self._headers[table] = paths
        return self._headers[table]

    def _declared(self, die: Die) -> tuple[str, int]:
        """Returns the file and the line of an entry's declaration."""
        attribute = die.attribute(dw.AT_decl_file)
        number = attribute.unsigned() if attribute is not None else None
        line = die.number(dw.AT_decl_line) or 0
        for _ in range(_MAX_CHAIN):  # the number is one of the unit that has the attribute
            if die.has(dw.AT_decl_file, own=True):
                break
            origin = die.reference(dw.AT_abstract_origin, own=True) or die.reference(dw.AT_specification, own=True)
            if origin is None:
                return "", line
            die = origin
        if number is None or die.dwarf != self._main.dwarf.handle:
            return "", line
        files = self._files(die.cu())
        return files[number] if number < len(files) else "", line

    def _line_string(self, at: int, line_string: bool) -> str:
        return self._main.section("line_str" if line_string else "str").text(at)

    # --- places

    def _is_code(self, vaddr: int) -> bool:
        return any(s.vaddr <= vaddr < s.vaddr + s.size for s in self._segments)

    def _vaddr(self, offset: int) -> int | None:
        return next((offset - s.offset + s.vaddr for s in self._segments if 0 <= offset - s.offset < s.size), None)

    def _offset(self, vaddr: int) -> int | None:
        return next((vaddr - s.vaddr + s.offset for s in self._segments if 0 <= vaddr - s.vaddr < s.size), None)

    def _unit_of(self, pc: int) -> Die | None:
        """Returns the entry of the unit that has an address; of several the one with the smallest range."""
        index = self._need()
        best: tuple[int, int] | None = None
        i = bisect.bisect_right(index.starts, pc) - 1
        while i >= 0 and self._reach[i] > pc:
            if index.ends[i] > pc:
                size = index.ends[i] - index.starts[i]
                best = min(best or (size, index.owners[i]), (size, index.owners[i]))
            i -= 1
        return None if best is None else self._unit(index.units[best[1]])

    def _unit(self, offset: int) -> Die | None:
        """Returns the entry of the unit at an offset: the first of its section behind the header."""
        return next((die for at, die in self._main.dwarf.units_from(offset) if at == offset), None)

    # --- scopes

    def scope(self, offset: int) -> Scope | None:
        """See ``DebugInfo.scope``."""
        self._tidy()
        pc = self._vaddr(offset)
        unit = self._unit_of(pc) if pc is not None else None
        if pc is None or unit is None:
            return None
        chain = self._chain(unit, pc)
        outermost = next((i for i in reversed(range(len(chain))) if chain[i].tag == dw.TAG_subprogram), None)
        if outermost is None:
            return None
        entry = chain[outermost].entry() == pc
        # At the entry what is inlined there has not begun: the arguments are those of the function itself.
        chain = chain[outermost : outermost + 1] if entry else chain[: outermost + 1]
        frame = _Frame(self, chain[-1], pc)
        innermost = next(i for i, die in enumerate(chain) if die.tag in _SKIPPED)
        variables = self._variables(chain[: innermost + 1], frame)
        around = [self.qualified(die) for die in chain[innermost + 1 :] if die.tag in _SKIPPED]
        file, line = self._line_at(unit, pc) or ("", 0)
        return Scope(self._function(chain[innermost], variables), variables, tuple(around), file, line, entry)

    def _chain(self, unit: Die, pc: int) -> list[Die]:
        """Returns the entries around an address, the innermost first, as they lie in one another."""
        found = unit.scopes_at(pc)
        if found:
            return found[0].scopes()
        # It wants the entry that an inlined copy comes from in the same unit: with link time optimisation it is not.
        return _covering(unit, pc, [unit]) or []

    def _variables(self, scopes: list[Die], frame: _Frame) -> tuple[Variable, ...]:
        found: list[Variable] = []
        for scope in scopes:
            seen: set[_Key] = set()
            for die in self._members(scope):
                origin = die.reference(dw.AT_abstract_origin, own=True) or die
                key = _key(origin)
                if key in seen or len(found) >= _MAX_VARIABLES:
                    continue
                seen.add(key)
                if name := die.name():
                    found.append(self._variable(die, name, frame))
        return tuple(found)

    def _members(self, scope: Die) -> Iterator[Die]:
        """Yields the parameters and variables of a block or function: those that it has, in the order of their declaration,
        and then what only its abstract entry has, which is nowhere any more."""
        yield from (d for d in scope.children() if d.tag in (dw.TAG_formal_parameter, dw.TAG_variable))
        origin = scope.reference(dw.AT_abstract_origin, own=True)
        if origin is not None:
            yield from (d for d in origin.children() if d.tag in (dw.TAG_formal_parameter, dw.TAG_variable))

    def _variable(self, die: Die, name: str, frame: _Frame) -> Variable:
        target = die.reference(dw.AT_type)
        parameter = die.tag == dw.TAG_formal_parameter and not die.flag(dw.AT_variable_parameter)  # Go's results
        return Variable(
            name,
            None if target is None else self._reference(target),
            self._location(die, frame),
            parameter,
            die.flag(dw.AT_artificial),
            die.number(dw.AT_decl_line) or 0,
        )

    def _location(self, die: Die, frame: _Frame) -> Location:
        attribute = die.attribute(dw.AT_location)
        if attribute is not None:
            return frame.location(attribute)
        attribute = die.attribute(dw.AT_const_value)
        if attribute is None:
            return expressions.OPTIMISED_OUT
        data = attribute.block()
        if data is not None:
            return expressions.constant(data)
        value = attribute.signed() if attribute.form in _SIGNED_FORMS else attribute.unsigned()
        if value is None:
            text = attribute.string()
            return expressions.constant(text.encode() + b"\0") if text else expressions.OPTIMISED_OUT
        return Location("value", (("const", value),))

    def _function(self, die: Die, variables: tuple[Variable, ...]) -> Function:
        file, line = self._declared(die)
        unit = die.cu()
        language = dw.LANGUAGES.get(unit.number(dw.AT_language) or 0, "")
        origin = die.reference(dw.AT_abstract_origin, own=True) or die
        parameters = self._parameters(origin, variables)
        returns = die.reference(dw.AT_type)
        children = list(origin.children())
        results = [d for d in children if d.tag == dw.TAG_formal_parameter and d.flag(dw.AT_variable_parameter)]
        if returns is None and len(results) == 1:
            returns = results[0].reference(dw.AT_type)
        return Function(
            self.qualified(die),
            die.string(dw.AT_linkage_name) or die.string(dw.AT_MIPS_linkage_name),
            language,  # type: ignore[arg-type]
            file,
            line,
            parameters,
            None if returns is None else self._reference(returns),
            any(d.tag == dw.TAG_unspecified_parameters for d in children),
        )

    def _parameters(self, origin: Die, variables: tuple[Variable, ...]) -> tuple[Variable, ...]:
        """Returns the parameters in the order of their declaration: a copy may have them in another one."""
        found = [v for v in variables if v.parameter]
        order = {
            name: i
            for i, name in enumerate(d.name() for d in origin.children() if d.tag == dw.TAG_formal_parameter)
            if name
        }
        return tuple(sorted(found, key=lambda v: order.get(v.name, len(order))))

    def qualified(self, die: Die) -> str:
        """Returns an entry's name with the namespaces, classes and modules that it is declared in."""
        for _ in range(_MAX_CHAIN):
            key = _key(die)
            if key in self._names:
                self._names.move_to_end(key)
                return self._names[key]
            origin = die.reference(dw.AT_abstract_origin, own=True) or die.reference(dw.AT_specification, own=True)
            if origin is None:
                break
            die = origin
        name = die.name()
        if name and dw.LANGUAGES.get(die.cu().number(dw.AT_language) or 0) not in ("c", "go"):
            outer = [d for d in die.scopes()[1:] if d.tag in _NAMESPACES]
            parts = [d.name() or "(anonymous namespace)" for d in reversed(outer)]
            name = "::".join((*parts, name))
        self._names[key] = name
        if len(self._names) > _MAX_PLACES:
            self._names.popitem(last=False)
        return name

    def frame_information(self) -> list[Cfi]:
        if self._cfis is None:
            self._cfis = [c for c in (self._main.dwarf.debug_frame(), self._program.eh_frame()) if c is not None]
        return self._cfis

    # --- types

    def type(self, ref: TypeRef) -> Type:
        """See ``DebugInfo.type``."""
        self._tidy()
        which, offset = ref & 3, ref >> 2
        file = self._other if which == _OTHER else self._main
        die = file.dwarf.die(offset, types=which == _TYPES) if file is not None else None
        if die is None:
            raise NoDebugInfo(f"there is no type {ref}")
        return self._types.read(die)

    def _reference(self, die: Die) -> TypeRef:
        if self._other is not None and die.dwarf == self._other.dwarf.handle:
            return die.offset << 2 | _OTHER
        version, kind = die.unit_type()
        return die.offset << 2 | (_TYPES if version < 5 and kind == _UT_TYPE else _MAIN)

    def _definition(self, die: Die) -> Die | None:
        """Finds the type that another unit defines and this one declares: of the same name and tag."""
        name = die.name()
        if not name:
            return None
        whole = self.qualified(die)
        for chain in self._named(name):
            found = chain[-1]
            defined = found.tag == die.tag and not found.flag(dw.AT_declaration) and found.name() == name
            if defined and self.qualified(found) == whole:
                return found
        return None

    # --- names

    def variable(self, name: str) -> Variable | None:
        """See ``DebugInfo.variable``."""
        self._tidy()
        named: dict[_Key, Die] = {}
        for chain in self._named(names.last(name)):
            die = chain[-1]
            if die.tag not in (dw.TAG_variable, dw.TAG_member) or any(d.tag in _SKIPPED for d in chain):
                continue
            if die.tag == dw.TAG_member and not die.flag(dw.AT_declaration):
                continue  # a field; before DWARF 5 a class' static member is one that is declared (DWARF 4, 5.5.6)
            if names.is_called(name, self.qualified(die), die.string(dw.AT_linkage_name)):
                named |= {_key(d): d for d in (die, *self._described(die, chain[0]))}
        known: Variable | None = None
        # What names it may be a declaration, or with link time optimisation lack the place.
        for die in itertools.chain(named.values(), self._referring(named)):
            made = self._variable(die, self.qualified(die), _Frame(self, None, 0))
            if made.location.kind != "optimised-out":
                return made
            if not die.flag(dw.AT_declaration):
                known = made
        return known

    def inlined(self, function: str) -> list[LinePlace]:
        """See ``DebugInfo.inlined``."""
        self._tidy()
        named: dict[_Key, Die] = {}
        for chain in self._named(names.last(function)):
            die = chain[-1]
            if die.tag != dw.TAG_subprogram:
                continue
            if names.is_called(function, self.qualified(die), die.string(dw.AT_linkage_name)):
                named |= {_key(d): d for d in (die, *self._described(die, chain[0]))}
        # With link time optimisation, dwz and Go what refers to them is in other units, by the section's offset.
        elsewhere = list(self._referring(named))
        named |= {_key(die): die for die in elsewhere if die.tag == dw.TAG_subprogram}
        copies: dict[int, LinePlace] = {}
        found = [die for die in elsewhere if die.tag == dw.TAG_inlined_subroutine]
        for die in named.values():
            if die.number(dw.AT_inline, own=True) in (1, 3):
                found += die.inline_instances()
        for die in found[:_MAX_PLACES]:
            pc = die.entry()
            offset = self._offset(pc) if pc else None
            if offset is not None and offset not in copies:
                file, line = self._declared(die)
                copies[offset] = LinePlace(offset, self.qualified(die), file, line, True)
        return [copies[at] for at in sorted(copies)]

    def _described(self, die: Die, unit: Die) -> Iterator[Die]:
        """Yields the entries of a unit that describe what a class declares."""
        if not die.flag(dw.AT_declaration):
            return
        for child in unit.children():
            if child.tag not in (die.tag, dw.TAG_variable):
                continue
            said = child.reference(dw.AT_specification, own=True)
            if said is not None and said.offset == die.offset:
                yield child

    def _referring(self, named: Iterable[_Key]) -> Iterator[Die]:
        """Yields the entries that refer to one of some entries as their origin, by its offset in its section."""
        wanted = set(named)
        words = sorted({offset for _, offset in wanted})
        for chain in self._around(self._main, names.find_words(self._main.section("info"), words)):
            die = chain[-1]
            origin = die.reference(dw.AT_abstract_origin, own=True) or die.reference(dw.AT_specification, own=True)
            if origin is not None and _key(origin) in wanted:
                yield die

    def _named(self, name: str) -> Iterator[list[Die]]:
        """Yields the entries that have a name, or a string that ends in it, with those around it: outermost first."""
        self._need()
        if not name:
            return
        wanted = name.encode()
        yield from self._around(self._main, self._places_of(self._main, self._main, wanted))
        if self._other is not None:
            yield from self._around(self._main, self._references(self._main, self._other, wanted))
            yield from self._around(self._other, self._places_of(self._other, self._other, wanted))

    def _places_of(self, file: _File, strings: _File, wanted: bytes) -> list[int]:
        """Returns where .debug_info has a string itself, or its offset in .debug_str."""
        return sorted({*file.section("info").find(wanted + b"\0"), *self._references(file, strings, wanted)})

    def _references(self, file: _File, strings: _File, wanted: bytes) -> Iterator[int]:
        text = strings.section("str")
        found = list(text.find(wanted + b"\0"))
        # The linker keeps one copy of a string: by itself, or else as the end of one of those that end in it.
        alone = [at for at in found if at == 0 or text.bytes(at - 1, 1) == b"\0"]
        generic = [at + 1 for at in text.find(b"\0" + wanted + b"<")]  # ``swap<int>`` is called swap too
        offsets = sorted({*(alone or found), *generic})
        if not offsets:
            return
        yield from names.find_words(file.section("info"), offsets)
        table = file.section("str_offsets")
        if table.size:
            yield from self._indexed(file, table, list(names.find_words(table, offsets)))

    def _indexed(self, file: _File, table: Memory, places: list[int]) -> Iterator[int]:
        """Yields a place in each unit that may have a string by its index: all their entries are to be looked at."""
        if not places:
            return
        bases: list[tuple[int, int]] = []
        for offset in file.units:
            unit = self._unit(offset)
            base = unit.number(dw.AT_str_offsets_base) if unit is not None else None
            if base is not None:
                bases.append((base, offset))
        bases.sort()
        starts = [base for base, _ in bases]
        for i in {bisect.bisect_right(starts, at) - 1 for at in places}:
            if i >= 0 and (unit := self._unit(bases[i][1])) is not None:
                yield from (die.offset for die in names.descendants(unit, 0))

    def _around(self, file: _File, places: Iterable[int]) -> Iterator[list[Die]]:
        """Yields, for each place in .debug_info, the entries that it lies in, from the unit's on."""
        by_unit: dict[int, list[int]] = {}
        for at in places:
            number = file.unit_at(at)
            if number >= 0:
                by_unit.setdefault(number, []).append(at)
        for number, inside in by_unit.items():
            unit = next((die for _, die in file.dwarf.units_from(file.units[number])), None)
            if unit is not None:
                yield from names.holding(unit, inside, [unit])

    # --- lines

    def source(self, offset: int) -> tuple[str, int] | None:
        """See ``DebugInfo.source``."""
        self._tidy()
        pc = self._vaddr(offset)
        unit = self._unit_of(pc) if pc is not None else None
        return self._line_at(unit, pc) if unit is not None and pc is not None else None

    def _line_at(self, unit: Die, pc: int) -> tuple[str, int] | None:
        try:
            found = self._lines(unit).at(pc)
        except NoDebugInfo:
            return None
        if found is None:
            return None
        files = self._files(unit)
        return files[found[0]] if found[0] < len(files) else "", found[1]

    def line(self, file: str, line: int) -> list[LinePlace]:
        """See ``DebugInfo.line``."""
        index = self._need()
        wanted = posixpath.normpath(file)
        name = posixpath.basename(wanted)
        paths = [
            (path, units) for path, units in index.files.get(name, ()) if path == wanted or path.endswith("/" + wanted)
        ]
        if not paths:
            raise NotFound(
                f"no file {file} in its debug information", suggestions=_near_files(name, index), reason="NoSuchFile"
            )
        rows: list[tuple[int, int, str]] = []
        for number in sorted({n for _, units in paths for n in units}):
            self._tidy()
            unit = self._unit(index.units[number])
            if unit is None:
                continue
            meant = {path for path, units in paths if number in units}
            files = self._files(unit)
            numbers = frozenset(i for i, path in enumerate(files) if path in meant)
            try:
                rows += ((pc, at, files[i]) for pc, at, i in self._lines(unit).of(line, numbers))
            except NoDebugInfo:
                continue
        nearest = min((at for _, at, _ in rows), default=None)
        places: dict[int, tuple[tuple[bool, int], LinePlace]] = {}
        for pc, at, path in rows:
            if at == nearest and (made := self._line_place(pc, at, path, asked=line)) is not None:
                key, rank, place = made
                if key not in places or rank < places[key][0]:
                    places[key] = rank, place
        if not places:
            raise NotFound(
                f"no code at line {line} of {file}, nor behind it in the same function",
                reason="NoSuchLine",
                suggestions=[] if nearest is None else [f"{file}:{nearest}"],
            )
        return sorted((place for _, place in places.values()), key=lambda p: p.offset)

    def _lines(self, unit: Die) -> Lines:
        """Returns a unit's line table, which libdw keeps. Raises NoDebugInfo."""
        table = unit.lines()
        self._rows.setdefault(unit.offset, len(table))
        return table

    def _tidy(self) -> None:
        """Gives back the line tables that libdw keeps, where they are large: no entry may be in use."""
        if sum(self._rows.values()) < _MAX_ROWS:
            return
        self._rows.clear()
        self._names.clear()
        self._cfis = None
        self._main.dwarf.close()
        main = Dwarf(self._elf)
        if self._other is not None:
            main.set_alternate(self._other.dwarf)
        self._main = self._main._replace(dwarf=main)

    def _line_place(
        self, pc: int, line: int, path: str, *, asked: int
    ) -> tuple[int, tuple[bool, int], LinePlace] | None:
        """Returns one row as a place: (its function or copy, how good it is among that function's, the place)."""
        unit = self._unit_of(pc)
        offset = self._offset(pc)
        if offset is None:
            return None
        chain = self._chain(unit, pc) if unit is not None else []
        function = next((die for die in chain if die.tag in _SKIPPED), None)
        if function is None:
            if unit is None or unit.number(dw.AT_language) != dw.LANG_assembler:
                return None  # a thunk of the compiler's own
            return -pc, (False, pc), LinePlace(offset, "", path, line, False)
        if line != asked and self._declared(function)[1] > asked:
            return None  # the line is before the function: nothing of it is meant
        # A part that was split off for being cold may lie before the function: it is the last choice.
        entry = function.entry()
        main = any(start <= pc < end and entry is not None and start <= entry < end for start, end in function.ranges())
        inlined = function.tag == dw.TAG_inlined_subroutine
        return function.offset, (not main, pc), LinePlace(offset, self.qualified(function), path, line, inlined)


_MAIN, _TYPES, _OTHER = 0, 1, 2
"""Which section a TypeRef's offset is in."""
_UT_TYPE: Final = 2
_SIGNED_FORMS: Final = frozenset((dw.FORM_sdata, dw.FORM_implicit_const))
_CODE: Final = frozenset(
    (dw.TAG_subprogram, dw.TAG_inlined_subroutine, dw.TAG_lexical_block, dw.TAG_try_block, dw.TAG_catch_block)
)
_NAMESPACES: Final = frozenset(
    (dw.TAG_namespace, dw.TAG_class_type, dw.TAG_structure_type, dw.TAG_union_type, dw.TAG_module)
)


class _Frame:
    """A function's frame at one address, for the expressions of its variables."""

    def __init__(self, reader: Reader, function: Die | None, pc: int) -> None:
        self._reader = reader
        self._function = function
        self._pc = pc
        self._attribute: Attribute | None = None
        self._base: Location | None = None

    def location(self, attribute: Attribute) -> Location:
        try:
            steps = attribute.expression_at(self._pc) if self._function is not None else attribute.expression()
        except NoDebugInfo as e:
            return Location("unsupported", reason=f"a location that libdw does not read: {e.detail}")
        if steps is None:
            return expressions.OPTIMISED_OUT
        outer, self._attribute = self._attribute, attribute
        try:
            return expressions.location(steps, self)
        finally:
            self._attribute = outer

    def frame_base(self) -> Location:
        if self._base is None:
            self._base = Location("unsupported", reason="a place on the stack, outside of a function")
            attribute = self._function.attribute(dw.AT_frame_base) if self._function is not None else None
            if attribute is not None:
                self._base = self.location(attribute)
        return self._base

    def cfa(self) -> tuple[Op, ...] | None:
        for cfi in self._reader.frame_information() if self._function is not None else ():
            steps = cfi.cfa(self._pc)
            if steps:
                found = expressions.location(steps, _NoFrame())
                if found.kind in ("memory", "value"):
                    return found.ops
        return None

    def indexed(self, step: expressions.Step) -> int | None:
        value = self._attribute.operand(step) if self._attribute is not None else None  # type: ignore[arg-type]
        if value is None:
            return None
        address = value.address()
        return value.unsigned() if address is None else address

    def thread_block(self) -> int | None:
        return self._reader.thread_block

    def implicit(self, step: expressions.Step) -> bytes:
        return self._attribute.implicit_value(step) if self._attribute is not None else b""  # type: ignore[arg-type]


class _NoFrame:
    """The rules of call frame information refer to nothing but registers."""

    def frame_base(self) -> Location:
        return Location("unsupported", reason="frame information that refers to a frame")

    def cfa(self) -> None:
        return None

    def indexed(self, step: expressions.Step) -> None:
        return None

    def thread_block(self) -> None:
        return None

    def implicit(self, step: expressions.Step) -> bytes:
        return b""


def _covering(parent: Die, pc: int, chain: list[Die]) -> list[Die] | None:
    """Returns the entries around an address, the innermost first; None where no function in ``parent`` has it."""
    if len(chain) > _MAX_CHAIN:
        return None
    for child in parent.children():
        tag = child.tag
        if tag in _CODE and child.covers(pc):
            inside = [child, *chain]
            return _covering(child, pc, inside) or inside
        if tag in _NAMESPACES and (found := _covering(child, pc, [child, *chain])) is not None:
            return found
    return None


_Key = tuple[int, int]


def _key(die: Die) -> _Key:
    """Tells entries apart: the file, and the offset in its section."""
    return die.dwarf, die.offset


def _near_files(name: str, index: Index) -> list[str]:
    stem = re.sub(r"\.\w+\Z", "", name)
    near = [n for n in index.files if n.startswith(stem + ".")] + difflib.get_close_matches(name, index.files, _NEAR)
    return list(dict.fromkeys(near))[:_NEAR]
