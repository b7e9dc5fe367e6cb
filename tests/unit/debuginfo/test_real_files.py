"""Debian's own debug files, as gdb reads them: libc's (packed, thousands of units), Python's (link time optimisation)."""

from __future__ import annotations

import os
import random
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import needs
from tests.support.children import run
from tests.unit.debuginfo.programs import ask_gdb, described, elf_of, vaddr_of
from tests.unit.debuginfo.test_against_gdb import without_base_names
from trapline_agent.debuginfo.files import DebugFiles, FileDebugInfo
from trapline_agent.debuginfo.model import Type
from trapline_agent.objects import on_disk
from trapline_agent.symbols.index import SymbolIndex

PYTHON = Path(os.path.realpath("/usr/bin/python3"))
LIBC = Path("/lib/x86_64-linux-gnu/libc.so.6")
pytestmark = [needs.libdw, needs.gdb]
WITH_LIBC = pytest.param(LIBC, marks=needs.libc6_dbg, id="libc")
WITH_PYTHON = pytest.param(PYTHON, marks=needs.python3_dbg, id="python")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DebugFiles]:
    made = DebugFiles(tmp_path_factory.mktemp("state"))
    yield made
    made.close()


def offset_of(path: Path, name: str) -> int:
    (symbol,) = SymbolIndex(elf_of(path)).find(name)
    return symbol.offset


def member(info: FileDebugInfo, of: Type, *names: str) -> Type:
    """Follows members, and pointers on the way."""
    for name in names:
        while of.kind == "pointer":
            of = info.type(of.target or 0)
        of = info.type(next(m for m in of.members if m.name == name).type)
    return of


@needs.libc6_dbg
def test_fopens_arguments(files: DebugFiles) -> None:
    info = files.need(on_disk(str(LIBC)))
    assert info.where.startswith("/usr/lib/debug/.build-id/")
    scope = info.scope(offset_of(LIBC, "fopen"))
    assert scope is not None
    assert scope.entry
    assert scope.function.name == "_IO_new_fopen"
    assert [p.name for p in scope.function.parameters] == ["filename", "mode"]
    (filename, _) = (info.type(p.type or 0) for p in scope.function.parameters)
    assert (filename.kind, info.type(filename.target or 0).name) == ("pointer", "char")
    returns = info.type(info.type(scope.function.returns or 0).target or 0)
    assert (returns.name, returns.alias) == ("_IO_FILE", "FILE")
    assert member(info, returns, "_fileno").encoding == "signed"


@needs.python3_dbg
def test_the_frames_of_python(files: DebugFiles, tmp_path: Path) -> None:
    """The chain from an argument of the interpreter's loop to the name of the function that it runs."""
    info = files.need(on_disk(str(PYTHON)))
    scope = info.scope(offset_of(PYTHON, "_PyEval_EvalFrameDefault"))
    assert scope is not None
    assert [p.name for p in scope.function.parameters] == ["tstate", "frame", "throwflag"]
    frame = info.type(scope.function.parameters[1].type or 0)
    name = member(info, frame, "f_code", "co_name")
    assert info.type(name.target or 0).name == "_object"
    # Through a circle: the type of an object is an object.
    assert member(info, name, "ob_type", "ob_base", "ob_base", "ob_type", "tp_name").kind == "pointer"


@pytest.mark.parametrize(
    ("path", "types"),
    [
        pytest.param(LIBC, ["struct _IO_FILE", "struct malloc_state"], marks=needs.libc6_dbg),
        pytest.param(PYTHON, ["struct _PyInterpreterFrame", "struct PyCodeObject"], marks=needs.python3_dbg),
    ],
)
def test_types_are_gdbs(path: Path, types: list[str], files: DebugFiles, tmp_path: Path) -> None:
    info = files.need(on_disk(str(path)))
    theirs = ask_gdb(path, directory=tmp_path, types=types)["types"]
    chains = {
        "struct _IO_FILE": ("fopen", None, ()),
        "struct _PyInterpreterFrame": ("_PyEval_EvalFrameDefault", 1, ()),
        "struct PyCodeObject": ("_PyEval_EvalFrameDefault", 1, ("f_code",)),
    }
    for name in types:
        if name == "struct malloc_state":
            arena = info.variable("main_arena")
            assert arena is not None
            made = info.type(arena.type or 0)
        else:
            function, parameter, chain = chains[name]
            scope = info.scope(offset_of(path, function))
            assert scope is not None
            ref = scope.function.returns if parameter is None else scope.function.parameters[parameter].type
            pointer = member(info, info.type(ref or 0), *chain)
            made = info.type(pointer.target or 0)
        ours, gdbs = without_base_names(described(info, made)), without_base_names(theirs[name])
        assert ours[:3] == gdbs[:3]
        for mine, theirs_ in zip(ours[3], gdbs[3], strict=True):
            assert mine[:4] == theirs_[:4]
            if mine[4][0] != "array":  # of flexible arrays gdb's Python says that they have one
                assert mine[4] == theirs_[4], mine[0]


@pytest.mark.parametrize(
    ("path", "name"),
    [
        pytest.param(LIBC, "main_arena", marks=needs.libc6_dbg),
        pytest.param(PYTHON, "_PyRuntime", marks=needs.python3_dbg),
    ],
)
def test_globals_are_gdbs(path: Path, name: str, files: DebugFiles, tmp_path: Path) -> None:
    found = files.need(on_disk(str(path))).variable(name)
    assert found is not None
    assert found.location.ops == (("load", ask_gdb(path, directory=tmp_path, globals=[name])["globals"][name]),)


def rows_at(debug: str, vaddr: int) -> set[tuple[str, int]]:
    """Returns (file, line) of the line table's rows, as readelf prints them, that are nearest before an address."""
    dump = run(["readelf", "--debug-dump=decodedline", "-W", debug], timeout=120).stdout
    rows = [(int(pc, 16), file, int(n)) for file, n, pc in re.findall(r"^(\S+) +(\d+) +0x(\w+)", dump, re.M)]
    nearest = max(pc for pc, _, _ in rows if pc <= vaddr)
    return {(file, n) for pc, file, n in rows if pc == nearest}


@pytest.mark.parametrize("path", [WITH_LIBC, WITH_PYTHON])
def test_the_source_of_any_address_is_gdbs(path: Path, files: DebugFiles, tmp_path: Path) -> None:
    info, elf = files.need(on_disk(str(path))), elf_of(path)
    chance = random.Random(5)
    symbols = [s for s in SymbolIndex(elf) if s.size > 16]
    offsets = sorted({s.offset + chance.randrange(s.size) for s in chance.sample(symbols, 250)})
    theirs = ask_gdb(path, directory=tmp_path, sources=[vaddr_of(elf, o) for o in offsets])["sources"]
    compared = differ = 0
    for offset in offsets:
        ours, gdb = info.source(offset), theirs[str(vaddr_of(elf, offset))]
        if gdb is None:
            assert ours is None, hex(offset)
            continue
        assert ours is not None, hex(offset)
        compared += 1
        if (Path(ours[0]).name, ours[1]) != (Path(gdb[0]).name, gdb[1]):
            # gdb joins rows of one line that have a discriminator (dwarf2/read.c, dwarf_record_line_p); we do not.
            differ += 1
            assert (Path(ours[0]).name, ours[1]) in rows_at(info.where, vaddr_of(elf, offset)), hex(offset)
    assert differ < 5
    assert compared > 150


@pytest.mark.parametrize(
    ("path", "lines"),
    [
        pytest.param(LIBC, ["iofopen.c:86", "iofopen.c:60", "malloc.c:3300", "printf.c:30"], marks=needs.libc6_dbg),
        pytest.param(PYTHON, ["ceval.c:1700", "ceval.c:1640", "dictobject.c:1500"], marks=needs.python3_dbg),
    ],
)
def test_lines_are_gdbs(path: Path, lines: list[str], files: DebugFiles, tmp_path: Path) -> None:
    info, elf = files.need(on_disk(str(path))), elf_of(path)
    theirs = ask_gdb(path, directory=tmp_path, lines=lines)["lines"]
    for text in lines:
        file, _, number = text.partition(":")
        ours = {vaddr_of(elf, p.offset) for p in info.line(file, int(number))}
        assert ours, text
        assert ours <= set(theirs[text]), (text, ours, theirs[text])
