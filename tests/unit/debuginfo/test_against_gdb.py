"""Debug information: the same answers as gdb gives of the same program, at -O0 and -O2, in C, C++, Rust and Go."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import needs
from tests.support.children import run
from tests.unit.debuginfo.programs import ask_gdb, build, described, elf_of, line_of, marks, place_for_gdb, vaddr_of
from trapline.errors import NotFound
from trapline_agent.debuginfo.files import DebugFiles, FileDebugInfo
from trapline_agent.debuginfo.model import Scope
from trapline_agent.objects import on_disk
from trapline_agent.symbols.index import SymbolIndex

pytestmark = needs.libdw

BUILDS = [
    pytest.param(language, level, marks=[mark, needs.gdb], id=f"{language}-{level}")
    for language, mark in (("c", needs.gcc), ("c++", needs.gxx), ("rust", needs.rustc), ("go", needs.go))
    for level in ("O0", "O2")
]
SOURCE = {"c": "shapes.c", "c++": "shapes.cpp", "rust": "shapes.rs", "go": "shapes.go"}


class Program:
    def __init__(self, path: Path, language: str, level: str, info: FileDebugInfo) -> None:
        self.path, self.language, self.level, self.info = path, language, level, info
        self.elf = elf_of(path)
        self.symbols = SymbolIndex(self.elf)

    def vaddrs(self, offsets: list[int]) -> list[int]:
        return sorted(vaddr_of(self.elf, o) for o in offsets)

    def function(self, pattern: str) -> int:
        """Returns the offset of the function whose symbol matches."""
        found = {s.offset for s in self.symbols if re.fullmatch(pattern, s.name) and s.size}
        assert len(found) == 1, pattern
        return found.pop()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DebugFiles]:
    made = DebugFiles(tmp_path_factory.mktemp("state"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory, files: DebugFiles) -> Any:
    built: dict[tuple[str, str], Program] = {}

    def get(language: str, level: str) -> Program:
        if (language, level) not in built:
            path = build(tmp_path_factory.mktemp(f"{language[0]}{level}"), language, level)
            built[language, level] = Program(path, language, level, files.need(on_disk(str(path))))
        return built[language, level]

    return get


FUNCTIONS = {
    "c": ("area", "mixed", "variadic", "main"),
    "c++": ("_ZNK5outer3BoxI.E7doubledEi", "_ZN5outer12by_reference.*", "_ZN5outer10overloadedEi", "main"),
    "rust": (".*inner5total.*", ".*Point6length.*", "_ZN6shapes8describe17h.*|_R.*6shapes8describe"),
    "go": (r"main\.\(\*shape\)\.area", r"main\.totals"),
}


@pytest.mark.parametrize(("language", "level"), BUILDS)
def test_values_are_gdbs(language: str, level: str, programs: Any) -> None:
    """At functions' entries (where gdb reads the same, perhaps wrong, places) and at every marked line: each variable that
    gdb names has the very bytes that our location leads to, or is optimised out for both."""
    program: Program = programs(language, level)
    offsets: dict[int, str] = {}
    for mark in marks(language):
        try:
            for place in program.info.line(SOURCE[language], line_of(language, mark)):
                offsets[place.offset] = mark
        except NotFound:
            continue
    places = [place_for_gdb(program.info, program.elf, offset) for offset in offsets]
    by_vaddr = {vaddr_of(program.elf, o): (mark, program.info.scope(o)) for o, mark in offsets.items()}
    rows = ask_gdb(program.path, places=places)["values"]
    compared = 0
    for row in rows:
        mark, scope = by_vaddr[row["vaddr"]]
        assert isinstance(scope, Scope)
        if [scope.function.name, *scope.inlined_into] != names_in_frames(row):
            # gdb shows the outer frame where an inlined one begins, and so do we at a function's entry
            assert scope.entry or row["function"] in scope.inlined_into, (mark, row["function"], scope)
            continue
        ours = row["ours"]
        for name, (kind, data) in row["gdb"].items():
            if kind == "error":
                continue
            if name not in ours and kind == "optimised-out":
                continue  # of a block whose first instruction went elsewhere: gdb has its name, and nothing more
            assert name in ours, (mark, name)
            if ours[name][0] == "unsupported":
                continue
            if ours[name][0] == "optimised-out" and ours[name][1]:
                continue  # gdb looks into the caller's frame for what the function was called with
            assert ours[name][0] == kind, (mark, name, hex(row["vaddr"]))
            assert kind != "bytes" or ours[name][1] == data, (mark, name, hex(row["vaddr"]))
            compared += kind == "bytes"
        assert set(ours) <= set(row["gdb"]), (mark, row["vaddr"])
        assert row["line"] == scope.line, mark
    assert compared >= {"c": 25, "c++": 15, "rust": 8, "go": 8}[language], compared


def names_in_frames(row: dict[str, Any]) -> list[str]:
    names = (row["function"], *row["frames"])
    return [re.sub(r"(?<=\w)\(.*", "", n) if "::" in n else n for n in names]


@pytest.mark.parametrize(("language", "level"), BUILDS)
def test_lines_are_gdbs(language: str, level: str, programs: Any) -> None:
    """Each line of the source: the places are among gdb's, which may have several in one function, and there is one in each
    function or copy that gdb has one in."""
    program: Program = programs(language, level)
    file = SOURCE[language]
    lines = (program.path.parent / file).read_text().splitlines()
    theirs = ask_gdb(program.path, lines=[f"{file}:{n}" for n in range(1, len(lines) + 3)])["lines"]
    rows = run(["readelf", "--debug-dump=decodedline", "-W", program.path], timeout=60).stdout
    found = re.findall(rf"^{re.escape(file)} +(\d+) +(0x\w+) .*x$", rows, re.M)
    statements = {(int(line), int(pc, 16)) for line, pc in found}
    compared = 0
    for n in range(1, len(lines) + 3):
        gdb = [] if isinstance(theirs[f"{file}:{n}"], str) else theirs[f"{file}:{n}"]
        try:
            places = program.info.line(file, n)
        except NotFound:
            places = []
        expected: set[tuple[str, ...]] = set()
        for pc in gdb:
            offset = program.elf.file_offset(pc)
            scope = program.info.scope(offset) if offset is not None else None
            # gdb goes on into functions that begin behind the line.
            if scope is not None and (scope.function.line <= n or (places and places[0].line == n)):
                expected.add((scope.function.name, *scope.inlined_into))
        ours = set(program.vaddrs([p.offset for p in places]))
        if not ours <= set(gdb):
            # gdb joins rows of one line, also where only the second begins a statement, and then takes a later line.
            assert ours <= {pc for line, pc in statements if line == n}, (n, places, [hex(pc) for pc in gdb])
            continue
        assert {p.function for p in places} == {names[0] for names in expected}, (n, places, expected)
        assert len(places) >= len(expected)
        assert len({p.line for p in places}) <= 1
        compared += len(places)
    assert compared >= 20


@pytest.mark.parametrize(("language", "level"), BUILDS)
def test_the_source_of_each_instruction_is_gdbs(language: str, level: str, programs: Any) -> None:
    program: Program = programs(language, level)
    offsets: list[int] = []
    for pattern in FUNCTIONS[language]:
        for symbol in program.symbols:
            if re.fullmatch(pattern, symbol.name) and symbol.size:
                offsets += range(symbol.offset, symbol.offset + symbol.size)
    assert len(offsets) > 100
    theirs = ask_gdb(program.path, sources=[vaddr_of(program.elf, o) for o in offsets])["sources"]
    for offset in offsets:
        ours, gdb = program.info.source(offset), theirs[str(vaddr_of(program.elf, offset))]
        assert ours is not None
        assert ours[1] == gdb[1], hex(vaddr_of(program.elf, offset))
        assert Path(ours[0]).name == Path(gdb[0]).name


@needs.gcc
@needs.gdb
@pytest.mark.parametrize("level", ["O0", "O2"])
def test_types_of_c_are_gdbs(level: str, programs: Any) -> None:
    program: Program = programs("c", level)
    wanted = {"first": "struct shape", "tight": "struct tight", "large": "enum wide"}
    theirs = ask_gdb(program.path, types=list(wanted.values()))["types"]
    for variable, name in wanted.items():
        found = program.info.variable(variable)
        assert found is not None
        assert found.type is not None
        ours = without_base_names(described(program.info, program.info.type(found.type)))
        gdbs = without_base_names(theirs[name])
        if variable == "first":  # `text[]`, which gdb's Python says has one
            assert ours[3].pop()[:5] == ["text", 96 * 8, 0, False, ["array", [0], ["base", 1]]]
            gdbs[3].pop()
        assert ours == gdbs
    nobody = program.info.variable("nobody")
    assert nobody is not None
    assert nobody.type is not None
    opaque = program.info.type(program.info.type(nobody.type).target or 0)
    assert (opaque.kind, opaque.name, opaque.size, opaque.members) == ("struct", "opaque", 0, ())


def without_base_names(t: Any) -> Any:
    """gdb has names of its own for integers, and for pointers to them."""
    if not isinstance(t, list):
        return t
    if t[:1] == ["base"]:
        return ["base", t[2]]
    if t[:1] == ["pointer"] and not set(t[2].split()) - {"short", "long", "unsigned", "signed", "int", "char"}:
        return t[:2]
    return [without_base_names(part) for part in t]


@needs.gxx
@needs.gdb
@pytest.mark.parametrize("level", ["O0", "O2"])
def test_types_of_cxx_are_gdbs(level: str, programs: Any) -> None:
    program: Program = programs("c++", level)
    scope = program.info.scope(program.info.line("shapes.cpp", line_of("c++", "reference"))[0].offset)
    assert scope is not None
    parameters = {v.name: v for v in scope.function.parameters}
    theirs = ask_gdb(program.path, types=["outer::Box<int>", "outer::Base", "outer::Mode", "std::string"])["types"]
    box = program.info.type(parameters["box"].type or 0)
    assert box.kind == "reference"
    made = program.info.type(box.target or 0)
    members = {m[0]: m for m in without_base_names(described(program.info, made))[3]}
    gdbs = {m[0]: m for m in without_base_names(theirs["outer::Box<int>"])[3]}
    members.pop("member"), gdbs.pop("member")  # a pointer to a member, whose kind is unknown here
    assert members == gdbs
    assert (made.name, made.size) == ("outer::Box<int>", theirs["outer::Box<int>"][2])
    text = program.info.type(program.info.type(parameters["text"].type or 0).target or 0)
    assert text.alias.endswith("string")
    assert described(program.info, text)[2] == theirs["std::string"][2]
    assert [p.name for p in scope.function.parameters] == ["text", "numbers", "box"]
    assert scope.function.name == "outer::by_reference"
    assert scope.function.linkage_name.startswith("_ZN5outer12by_reference")


@needs.gdb
@pytest.mark.parametrize(
    ("language", "level", "names"),
    [
        pytest.param("c", "O2", ["hidden_counter", "visible_counter", "first", "greeting"], marks=needs.gcc),
        pytest.param("c++", "O0", ["outer::Box<int>::made", "outer::(anonymous namespace)::anonymous_counter"],
                     marks=needs.gxx),
        pytest.param("rust", "O0", ["shapes::COUNTER"], marks=needs.rustc),
        pytest.param("go", "O2", ["main.counter"], marks=needs.go),
    ],
)  # fmt: skip
def test_globals_are_gdbs(language: str, level: str, names: list[str], programs: Any) -> None:
    program: Program = programs(language, level)
    quoted = [f"'{n}'" if "(" in n or language == "go" else n for n in names]
    theirs = ask_gdb(program.path, globals=quoted)["globals"]
    for name, key in zip(names, quoted, strict=True):
        found = program.info.variable(name)
        assert found is not None
        assert found.location.kind == "memory"
        assert found.location.ops == (("load", theirs[key]),), name
    assert program.info.variable("no_such_variable") is None


@needs.gxx
@pytest.mark.parametrize("version", ["-gdwarf-4", "-gdwarf-5"])
def test_a_field_is_no_global(version: str, tmp_path: Path) -> None:
    """Before DWARF 5 both a field and a class' static member are members."""
    files = DebugFiles()
    info = files.need(on_disk(str(build(tmp_path, "c++", "O2", version))))
    for field in ("outer::Box<int>::mode", "outer::Box<int>::flag", "flag"):
        assert info.variable(field) is None, field
    made = info.variable("outer::Box<int>::made")
    assert made is not None
    assert made.location.kind == "memory"
    files.close()


@needs.binutils
@pytest.mark.parametrize(
    ("language", "level", "name"),
    [
        pytest.param("c", "O0", "scale", marks=needs.gcc),
        pytest.param("c", "O2", "scale", marks=needs.gcc),
        pytest.param("c++", "O2", "outer::helper", marks=needs.gxx),
        pytest.param("go", "O2", "main.small", marks=needs.go),
    ],
)
def test_inlined_copies_are_readelfs(language: str, level: str, name: str, programs: Any) -> None:
    """Not gdb's: this release takes a copy's lowest address for its beginning, and not DW_AT_entry_pc."""
    program: Program = programs(language, level)
    dump = run(["readelf", "--debug-dump=info", program.path], timeout=60).stdout
    entries = re.split(r"^ <\w+><(?=\w+>: Abbrev)", dump, flags=re.M)
    last = name.rpartition("::")[2]
    abstract = {e[: e.index(">")] for e in entries if re.search(rf"AT_name +:.*[: ]{re.escape(last)}$", e, re.M)}
    abstract |= {e[: e.index(">")] for e in entries for a in abstract if f"AT_specification: <0x{a}>" in e}
    copies = [e for e in entries if "(DW_TAG_inlined_subroutine)" in e.split("\n")[0]]
    copies = [e for e in copies if re.search(r"AT_abstract_origin: <0x(\w+)>", e)[1] in abstract]  # type: ignore[index]
    expected = {
        int((re.search(r"AT_entry_pc +: 0x(\w+)", e) or re.search(r"AT_low_pc +: 0x(\w+)", e))[1], 16)  # type: ignore[index]
        for e in copies
    }
    ours = program.info.inlined(name)
    assert len(expected) >= 1
    assert program.vaddrs([p.offset for p in ours]) == sorted(expected)
    assert {p.function for p in ours} == {name}
    assert program.info.inlined("nothing_of_this_name") == []


@needs.gcc
def test_a_functions_entry(programs: Any) -> None:
    """There, its declared parameters in their order; inside of it, what is inlined there and where it is."""
    program: Program = programs("c", "O2")
    scope = program.info.scope(program.function("mixed"))
    assert scope is not None
    assert scope.entry
    assert [p.name for p in scope.function.parameters] == ["d", "f", "c", "b", "l", "by_value", "p"]
    kinds = [program.info.type(p.type or 0) for p in scope.function.parameters]
    assert [t.encoding for t in kinds[:5]] == ["float", "float", "char", "unsigned", "signed"]
    assert [t.alias for t in kinds[3:6]] == ["uint8_t", "int64_t", "point_t"]
    assert scope.function.language == "c"
    assert program.info.type(scope.function.returns or 0).name == "double"
    varied = program.info.scope(program.function("variadic"))
    assert varied is not None
    assert varied.function.variadic
    program = programs("c", "O0")
    copy = program.info.line("shapes.c", line_of("c", "inlined"))
    assert {p.inlined for p in copy} == {True}
    inside = [program.info.scope(p.offset) for p in copy]
    assert [(s.function.name, s.entry, s.inlined_into) for s in inside if s is not None] == [
        ("scale", False, ("area",)),
        ("scale", False, ("main",)),
    ]
    assert program.info.scope(0) is None


@needs.gcc
def test_a_threads_own_variable_is_below_the_thread_pointer(programs: Any) -> None:
    """In a program; gdb's value of one at a stop is compared in tests/system/test_expressions.py."""
    program: Program = programs("c", "O2")
    found = program.info.variable("per_thread")
    assert found is not None
    assert found.location.kind == "memory"
    (_, within), *rest = found.location.ops
    assert rest[:2] == [("reg", 58), ("add", 0)]
    segment = re.search(
        r" TLS +0x\w+ 0x\w+ 0x\w+ 0x\w+ (0x\w+) R +(0x\w+)", run(["readelf", "-lW", program.path]).stdout
    )
    assert segment is not None
    size, align = int(segment[1], 16), int(segment[2], 16)
    assert rest[2:] == [("plus", -((size + align - 1) // align * align))]
    assert 0 <= within < size


@needs.gcc
def test_a_librarys_own_variables_of_threads_are_the_loaders_to_know(tmp_path: Path, files: DebugFiles) -> None:
    source, library = tmp_path / "own.c", tmp_path / "libown.so"
    source.write_text("_Thread_local int per_thread = 3; int get(void) { return per_thread; }\n")
    assert run(["gcc", "-g", "-shared", "-fPIC", source, "-o", library]).returncode == 0
    assert elf_of(library).thread_block() is None
    assert elf_of(Path("/proc/self/exe").resolve()).thread_block() is None  # it has none
    info = files.need(on_disk(str(library)))
    found = info.variable("per_thread")
    assert found is not None
    assert found.location.kind == "unsupported"
    assert "a thread's own variable of a library" in found.location.reason


@needs.rustc
@pytest.mark.parametrize("level", ["O0", "O2"])
def test_rusts_enums(level: str, programs: Any) -> None:
    program: Program = programs("rust", level)
    scope = program.info.scope(program.function("_ZN6shapes8describe17h.*|_R.*6shapes8describe"))
    assert scope is not None
    types = {p.name: program.info.type(p.type or 0) for p in scope.function.parameters}
    assert list(types) == ["message", "name", "maybe", "small"]
    message = program.info.type(types["message"].target or 0)
    assert (message.kind, message.name) == ("variant", "shapes::Message")
    assert [m.name for m in message.members][-4:] == ["Quit", "Move", "Write", "Numbers"]
    assert len(message.enumerators) >= 3
    assert types["name"].name == "&str"
    assert [m.name for m in types["name"].members] == ["data_ptr", "length"]
    assert types["maybe"].kind == "variant"
    assert (types["small"].kind, types["small"].enumerators) == ("enum", (("One", 1), ("Two", 20)))
    assert scope.function.name == "shapes::describe"
    assert scope.function.language == "rust"


@needs.rustc_dwarf5
@needs.gdb
def test_strings_and_addresses_by_index(files: DebugFiles, tmp_path: Path) -> None:
    """DWARF 5 as LLVM writes it (DW_FORM_strx, DW_OP_addrx, DW_LLE_startx_length)."""
    path = build(tmp_path, "rust", "O2", "-Cdwarf-version=5")
    info = files.need(on_disk(str(path)))
    found = info.variable("shapes::COUNTER")
    assert found is not None
    address = ask_gdb(path, globals=["shapes::COUNTER"])["globals"]["shapes::COUNTER"]
    assert found.location.ops == (("load", address),)
    places = info.line("shapes.rs", line_of("rust", "method"))
    rows = ask_gdb(path, places=[place_for_gdb(info, elf_of(path), p.offset) for p in places])["values"]
    compared = [n for row in rows for n, (kind, data) in row["gdb"].items() if row["ours"][n] == [kind, data]]
    assert {"self", "scale"} <= set(compared)


@needs.rustc
def test_generic_functions_by_their_plain_name(programs: Any) -> None:
    program: Program = programs("rust", "O2")
    copies = program.info.inlined("map_or")
    assert copies
    assert all("::map_or<" in p.function for p in copies)


@needs.go
def test_gos_parameters_and_results(programs: Any) -> None:
    program: Program = programs("go", "O2")
    scope = program.info.scope(program.function(r"main\.\(\*shape\)\.area"))
    assert scope is not None
    assert scope.entry
    assert [p.name for p in scope.function.parameters] == ["s", "times", "label"]
    assert {"sum", "err"} <= {v.name for v in scope.variables if not v.parameter}
    assert scope.function.language == "go"
    label = program.info.type(scope.function.parameters[2].type or 0)
    assert (label.name, [m.name for m in label.members]) == ("string", ["str", "len"])


@needs.gcc
def test_what_is_not_there_names_what_is_near(programs: Any) -> None:
    program: Program = programs("c", "O2")
    with pytest.raises(NotFound) as e:
        program.info.line("shape.c", 5)
    assert "shapes.c" in e.value.suggestions
    with pytest.raises(NotFound) as e:
        program.info.line("shapes.c", 5000)
    assert e.value.reason == "NoSuchLine"
