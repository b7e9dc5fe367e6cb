"""Programs with debug information, and what gdb says of them."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from tests.support.children import run
from tests.support.targets import SOURCES
from trapline_agent.debuginfo.files import FileDebugInfo
from trapline_agent.debuginfo.model import Type, Variable
from trapline_agent.symbols.elf import ElfFile

ORACLE = Path(__file__).resolve().parent.parent.parent / "support" / "gdb_oracle.py"
COMPILERS = {
    "c": ("shapes.c", ["gcc", "-std=gnu11"]),
    "c++": ("shapes.cpp", ["g++", "-std=c++17"]),
    "rust": ("shapes.rs", ["rustc", "--crate-name=shapes", "-Cdebuginfo=2"]),
    "go": ("shapes.go", ["go", "build"]),
}


def build(directory: Path, language: str, level: str = "O2", *flags: str) -> Path:
    """Compiles the program of a language from tests/targets at ``O0`` or ``O2``. Raises AssertionError."""
    source, command = COMPILERS[language]
    code = Path(shutil.copy(SOURCES / source, directory / source))
    output = directory / f"shapes-{language}-{level}"
    if language == "rust":
        flags = (f"-Copt-level={level[1:]}", *flags)
    elif language == "go":
        flags = (*(("-gcflags=all=-N -l",) if level == "O0" else ()), *flags)
    else:
        flags = ("-g", f"-{level}", "-w", *flags)
    environment = {"GOCACHE": str(directory / "go-cache"), "GO111MODULE": "off"}
    result = run([*command, *flags, "-o", output, code], env=environment, timeout=280)
    assert result.returncode == 0, result.stderr
    return output


def line_of(language: str, mark: str) -> int:
    """Returns the number of the line that is marked ``HERE mark`` in a program's source."""
    lines = (SOURCES / COMPILERS[language][0]).read_text().splitlines()
    return next(i for i, line in enumerate(lines, 1) if re.search(rf"HERE {re.escape(mark)}(?![\w-])", line))


def marks(language: str) -> list[str]:
    return re.findall(r"HERE ([\w-]+)", (SOURCES / COMPILERS[language][0]).read_text().split("\n", 3)[3])


def ask_gdb(program: Path, directory: Path | None = None, **job: Any) -> dict[str, Any]:
    """Returns what gdb answers to a job (tests/support/gdb_oracle.py); written to ``directory``, or beside it."""
    file = (directory or program.parent) / f"{program.name}.job"
    file.write_text(json.dumps(job))
    result = run(
        ["gdb", "--nx", "--batch", "-x", ORACLE, program],
        env={"TRAPLINE_JOB": str(file), "DEBUGINFOD_URLS": "", "LC_ALL": "C.UTF-8"},
        timeout=200,
    )
    out = file.with_suffix(".job.out")
    assert out.exists(), result.stderr[-3000:] + result.stdout[-1000:]
    answer: dict[str, Any] = json.loads(out.read_text())
    out.unlink()
    return answer


def elf_of(program: Path) -> ElfFile:
    """Returns the headers; the descriptor stays open as long as the test's process."""
    return ElfFile(os.open(program, os.O_RDONLY), str(program))


def vaddr_of(elf: ElfFile, offset: int) -> int:
    return next(s.vaddr + offset - s.offset for s in elf.segments if s.offset <= offset < s.end)


def place_for_gdb(info: FileDebugInfo, elf: ElfFile, offset: int) -> dict[str, Any]:
    """Returns a place with its variables, as ``gdb_oracle.values`` takes it."""
    scope = info.scope(offset)
    assert scope is not None
    return {
        "vaddr": vaddr_of(elf, offset),
        "variables": [
            {"name": v.name, "size": size_of(info, v), "location": msgspec.to_builtins(v.location)}
            for v in scope.variables
        ],
    }


def size_of(info: FileDebugInfo, variable: Variable) -> int:
    return info.type(variable.type).size if variable.type is not None else 0


def described(info: FileDebugInfo, t: Type, depth: int = 0) -> list[Any]:
    """Returns a type in the terms of ``gdb_oracle.described``."""
    if depth > 4:
        return ["deep"]
    if t.kind in ("struct", "class", "union"):
        members = []
        for m in t.members:
            if m.name.startswith("_vptr"):
                continue
            inner = described(info, info.type(m.type), depth + 1)
            members.append([m.name, m.offset * 8 + m.bit_offset, m.bit_size, m.base, inner])
        return ["union" if t.kind == "union" else "struct", t.name, t.size, members]
    if t.kind == "enum":
        return ["enum", t.name, t.size, [list(e) for e in t.enumerators]]
    if t.kind == "array":
        counts = list(t.counts)
        assert t.target is not None
        target = info.type(t.target)
        while target.kind == "array" and target.target is not None:
            counts += target.counts
            target = info.type(target.target)
        return ["array", counts, described(info, target, depth + 1)]
    if t.kind in ("pointer", "reference"):
        target_type = info.type(t.target) if t.target is not None else None
        inner_name = "void" if target_type is None else target_type.name
        if target_type is not None and target_type.kind == "function":
            inner_name = "function"
        return [t.kind, t.size, inner_name]
    return ["base", t.name, t.size]


def names_of(places: Sequence[Any]) -> list[int]:
    return sorted(p.offset for p in places)
