"""Points beyond a plain symbol: regular expressions, names of the source language, USDT, source lines, imports, aliases."""

from __future__ import annotations

import contextlib
import os
import re
import time
from pathlib import Path

import pytest

from tests.support import needs
from tests.support.children import Child
from tests.unit.resolve.test_resolve import plan_of
from tests.unit.symbols.programs import build, build_with, strip
from tests.unit.symbols.test_demangle import CPP
from tests.unit.symbols.test_elf import out
from tests.unit.symbols.test_usdt import USDT, notes
from trapline.errors import NoDebugInfo, NotFound, ResolveError, SpecError, TraplineError, Unsupported
from trapline.spec import parse_probe
from trapline_agent.debuginfo.model import DebugInfo, LinePlace, Scope, Type, TypeRef, Variable
from trapline_agent.objects import FoundFile
from trapline_agent.resolve import Resolver
from trapline_agent.symbols import index


@pytest.fixture
def resolver() -> Resolver:
    return Resolver("hst_1", "box", {os.getpid()}, 0)


# --- regular expressions


@needs.gcc
@needs.binutils
def test_a_regular_expression_over_symbols(resolver: Resolver, tmp_path: Path) -> None:
    path = build(tmp_path)
    listed = out("nm", "--defined-only", path).split()
    for pattern in ("^vis|^hid", "^main$", "_start", "e$"):
        answer = resolver.resolve_dry(parse_probe(f"{path}:/{pattern}/"))
        assert answer.error is None
        found = {name for s in answer.sites for name in (s.symbol, *s.aliases)}
        in_code = {n for n in listed if re.search(pattern, n) and resolver_has(resolver, path, n)}
        assert in_code <= found, pattern
        assert all(re.search(pattern, s.symbol) for s in answer.sites)
    with pytest.raises(NotFound, match=r"no symbol in program matches `/\^zz/`"):
        plan_of(resolver, f"{path}:/^zz/")


def resolver_has(resolver: Resolver, path: Path, name: str) -> bool:
    return bool(resolver.search_symbols(str(path), name, 5).total)


@pytest.mark.parametrize("pattern", ["(", "a{2000}{2000}", r"(a)\1", "(?=x)", "[z-a]", "*"])
def test_what_is_no_regular_expression_is_told_with_its_place(resolver: Resolver, pattern: str) -> None:
    with pytest.raises(SpecError) as e:
        plan_of(resolver, f"libc.so.6:/{pattern}/")
    assert e.value.reason == "Regex"
    assert e.value.caret().splitlines()[1].index("^") == len("libc.so.6:")
    assert "RE2" in e.value.hint


@needs.gcc
def test_hostile_regular_expressions_end_soon(
    resolver: Resolver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = "int main(void) { return 0; }\n" + "".join(f"void {'a' * 2000}{i}(void) {{}}\n" for i in range(50))
    path = build(tmp_path, source=source)
    began = time.process_time()
    for pattern in ("(a+)+$", "(a|aa)+b", "(.*)*(.*)*(.*)*x", "(a?){900}a{900}z", "(a?){300}a{300}z"):
        with contextlib.suppress(ResolveError, SpecError):
            plan_of(resolver, f"{path}:/{pattern}/")
    assert time.process_time() - began < 10
    monkeypatch.setattr(index, "_MAX_REGEX_S", 0.0)
    with pytest.raises(ResolveError) as slow:
        plan_of(resolver, f"{path}:/(a?){{299}}a{{300}}z/")
    assert slow.value.reason == "TooSlow"
    with pytest.raises(NotFound):
        plan_of(resolver, f"{path}:" + "*a" * 30 + "z*b")
    assert time.process_time() - began < 15


@needs.gcc
def test_all_functions_of_a_file(resolver: Resolver, tmp_path: Path) -> None:
    answer = resolver.resolve_dry(parse_probe(f"{build(tmp_path)}:*"))
    named = {name for s in answer.sites for name in (s.symbol, *s.aliases)}
    assert {"main", "visible", "hidden", "chosen_one", "choose"} <= named
    assert len({s.offset for s in answer.sites}) == len(answer.sites)


# --- names of the source language


@needs.gxx
def test_names_as_the_source_has_them(resolver: Resolver, tmp_path: Path) -> None:
    path = build_with("g++", tmp_path, CPP, "program.cpp", "-O0")
    for text, symbols in {
        '"ns::Cls::operator->"': ["_ZN2ns3ClsptEv"],
        '"ns::over(int)"': ["_ZN2ns4overEi"],
        "ns::Cls::Nested::f": ["_ZN2ns3Cls6Nested1fEPNS_5InnerE"],
        "plain": ["_Z5plaini"],
        '"plain(int)"': ["_Z5plaini"],
        "_Z5plaini": ["_Z5plaini"],
        '"(anonymous namespace)::hidden"': ["_ZN12_GLOBAL__N_16hiddenEi"],
    }.items():
        plan = plan_of(resolver, f"{path}:{text}")
        assert plan.sites == [f"program:{s}" for s in symbols], text  # labels are canonical
        assert [s.symbol for s in plan.resolved] == symbols
        assert all(s.demangled for s in plan.resolved)
    plan = plan_of(resolver, f'{path}:"ns::over"')
    assert {s.demangled for s in plan.resolved} >= {"ns::over(int)", "ns::over(char const*)"}
    assert len(plan.resolved) == 3
    inside = plan_of(resolver, f'{path}:"ns::over(int)"+1').resolved[0]
    assert (inside.symbol, inside.symbol_offset) == ("_ZN2ns4overEi", 1)
    with pytest.raises(NotFound) as e:
        plan_of(resolver, f"{path}:ns::ovr")
    assert "ns::over" in e.value.suggestions
    page = resolver.search_symbols(str(path), "ns::over", 10)
    assert {s.demangled for s in page.symbols} >= {"ns::over(int)", "ns::over(char const*)"}
    assert page.total == 3


# --- imports and aliases


@needs.gcc
def test_an_imported_symbol_is_told_with_who_defines_it(resolver: Resolver, tmp_path: Path) -> None:
    path = build(tmp_path)
    with Child([path]) as child:
        for name in ("fflush", "fflush@plt"):
            with pytest.raises(NotFound) as e:
                plan_of(resolver, f"program:{name} @ pid={child.pid}")
            assert e.value.reason == "Imported"
            assert "imported" in e.value.detail
            assert "libc.so.6" in e.value.detail
            assert e.value.suggestions == ["libc.so.6:fflush"]
        assert plan_of(resolver, f"libc.so.6:fflush @ pid={child.pid}").plans


@needs.gxx
def test_an_imported_cpp_function_is_told_with_who_defines_it(resolver: Resolver, tmp_path: Path) -> None:
    source = """
    #include <cstdio>
    #include <iostream>
    int main() { std::string line; puts("ready"); fflush(stdout); std::cin.ignore(1); std::ios_base::sync_with_stdio(true); }
    """
    path = build_with("g++", tmp_path, source, "program.cpp", "-O1")
    with Child([path]) as child, pytest.raises(NotFound) as e:
        plan_of(resolver, f"program:std::ios_base::sync_with_stdio @ pid={child.pid}")
    assert e.value.reason == "Imported"
    (suggestion,) = e.value.suggestions
    assert re.fullmatch(r'libstdc\+\+\.so\.6[.0-9]*:"std::ios_base::sync_with_stdio"', suggestion)


@needs.gcc
def test_other_names_of_a_place_are_shown(resolver: Resolver, tmp_path: Path) -> None:
    source = """
    int one(int a) { return a + 1; }
    int two(int a) __attribute__((alias("one")));
    int _three(int a) __attribute__((weak, alias("one")));
    int main(void) { return one(1); }
    """
    path = build(tmp_path, source=source)
    (site,) = plan_of(resolver, f"{path}:two").resolved
    assert site.symbol == "two"
    assert site.aliases == ["one", "_three"]
    (every,) = resolver.resolve_dry(parse_probe(f"{path}:/^(one|two|_three)$/")).sites
    assert every.symbol == "one"


# --- USDT


def loads(path: Path, flags: str) -> list[tuple[int, int, int]]:
    """(file offset, virtual address, bytes in the file) of the segments with some flags, as readelf has them."""
    found = re.findall(r"LOAD\s+(0x\w+) (0x\w+) 0x\w+ (0x\w+) 0x\w+ (R?W?[ E]*) 0x", out("readelf", "-lW", path))
    return [(int(o, 16), int(v, 16), int(n, 16)) for o, v, n, f in found if f.replace(" ", "") == flags]


def executable_vaddr(path: Path, offset: int) -> int:
    return next(offset - o + v for o, v, n in loads(path, "RE") if o <= offset < o + n)


def data_offset(path: Path, vaddr: int) -> int:
    return next(vaddr - v + o for o, v, n in loads(path, "RW") if v <= vaddr < v + n)


@needs.gcc
@pytest.mark.parametrize(
    ("counter", "why"),
    [
        ("__attribute__((used)) unsigned short counter;", "not in data that the file has"),  # .bss
        ("__attribute__((used)) const unsigned short counter = 0;", "not in data that the file has"),
        (r'__asm__(".pushsection .probes,\"aw\"\n.byte 1\ncounter: .2byte 0\n.popsection");', "16 bits"),
    ],
)
def test_semaphores_that_cannot_be_raised(resolver: Resolver, tmp_path: Path, counter: str, why: str) -> None:
    declared = 'unsigned short counter __attribute__((section(".probes"), used));'
    assert declared in USDT
    source = USDT.replace(declared, counter)
    path = build(tmp_path, source=source)
    with pytest.raises(Unsupported, match=why) as e:
        plan_of(resolver, f"usdt:{path}:shop:guarded")
    assert e.value.reason == "Semaphore"
    assert plan_of(resolver, f"usdt:{path}:shop:sold").plans


@needs.gcc
@needs.binutils
@pytest.mark.parametrize("stripped", [False, True])
def test_usdt_probes(resolver: Resolver, tmp_path: Path, stripped: bool) -> None:
    path = build(tmp_path, source=USDT)
    sold = [row for row in notes(path) if row[1] == "sold"]
    path = strip(path) if stripped else path
    for text in ("shop:sold", "sold", "shop:s*"):
        plan = plan_of(resolver, f"usdt:{path}:{text}")
        assert [p.offset for p in plan.plans] == [row[2] for row in sold]
        assert plan.sites == [f"{path.name}:shop:sold"]
        assert [s.arguments for s in plan.resolved] == [row[4] for row in sold]
        assert plan.plans[0].code[0] == 0x90
    assert plan.plans[0].semaphore is None
    (guarded,) = plan_of(resolver, f"usdt:{path}:shop:guarded").plans
    (_, _, offset, semaphore, _), *_ = [row for row in notes(path) if row[1] == "guarded"]
    assert guarded.semaphore is not None
    assert guarded.offset == offset
    assert guarded.semaphore.distance == semaphore - executable_vaddr(path, offset)
    assert guarded.semaphore.offset == data_offset(path, semaphore)
    both = resolver.resolve_dry(parse_probe(f"usdt:{path}:*"))
    assert [s.refused is None for s in both.sites] == [True, True, True]
    with pytest.raises(NotFound) as missing:
        plan_of(resolver, f"usdt:{path}:shop:solld")
    assert missing.value.reason == "NoUsdt"
    assert missing.value.suggestions == ["shop:sold"]
    with pytest.raises(NotFound, match="none at all"):
        plan_of(resolver, f"usdt:{build(tmp_path, name='none')}:x")


# --- source lines and inlined copies


class FakeInfo:
    """What debug information says: two copies of a line, one of them a line further."""

    def __init__(self, places: list[LinePlace], copies: int = 0) -> None:
        self.places, self.copies = places, copies

    def line(self, file: str, line: int) -> list[LinePlace]:
        if not file.endswith("a.c"):
            raise NotFound(f"no source file {file}", suggestions=["a.c"])
        return self.places

    def inlined(self, function: str) -> list[LinePlace]:
        return [LinePlace(0, "main", "/src/a.c", 3, True)] * (self.copies if function in ("visible", "ns::gone") else 0)

    def scope(self, offset: int) -> Scope | None:
        raise AssertionError

    def type(self, ref: TypeRef) -> Type:
        raise AssertionError

    def variable(self, name: str) -> Variable | None:
        raise AssertionError

    def source(self, offset: int) -> tuple[str, int] | None:
        raise AssertionError


def resolver_with(info: FakeInfo | None) -> Resolver:
    def debug(file: FoundFile) -> DebugInfo | None:
        assert file.name == "program"
        return info

    return Resolver("hst_1", "box", {os.getpid()}, 0, debug=debug)


@needs.gcc
def test_source_lines(resolver: Resolver, tmp_path: Path) -> None:
    path = build(tmp_path)
    visible, hidden = (plan_of(resolver, f"{path}:{n}").plans[0].offset for n in ("visible", "hidden"))
    places = [LinePlace(visible, "visible", "/src/a.c", 7), LinePlace(hidden, "hidden", "/src/a.c", 7, True)]
    lines = resolver_with(FakeInfo(places))
    plan = plan_of(lines, f"{path}:a.c:7")
    assert plan.sites == ["program:a.c:7"]
    assert [p.offset for p in plan.plans] == [visible, hidden]
    assert [(s.symbol, s.file, s.line) for s in plan.resolved] == [
        ("visible", "/src/a.c", 7),
        ("hidden", "/src/a.c", 7),
    ]
    assert plan.notes == []
    plan = plan_of(lines, f"{path}:a.c:5")
    assert plan.sites == ["program:a.c:7"]
    assert plan.notes == ["line 5 has no code in program; line 7 is the next that has"]
    with pytest.raises(NotFound) as e:
        plan_of(lines, f"{path}:b.c:5")
    assert e.value.suggestions == ["a.c"]
    with pytest.raises(NoDebugInfo):
        plan_of(resolver_with(None), f"{path}:a.c:7")
    with pytest.raises(NotFound):
        plan_of(resolver_with(FakeInfo([])), f"{path}:a.c:7")
    middle = resolver_with(FakeInfo([LinePlace(visible + 1, "visible", "a.c", 7)]))
    with pytest.raises(TraplineError) as wrong:
        plan_of(middle, f"{path}:a.c:7")
    assert wrong.value.reason == "MidInstruction"


@needs.gcc
def test_inlined_copies_that_a_symbol_does_not_cover_are_told(tmp_path: Path) -> None:
    path = build(tmp_path)
    some = resolver_with(FakeInfo([], copies=3))
    (note,) = some.resolve_dry(parse_probe(f"{path}:visible")).notes
    assert note.startswith("3 inlined copies of `visible` in program are not covered")
    assert some.resolve_dry(parse_probe(f"{path}:hidden")).notes == []
    assert plan_of(some, f"{path}:visible").notes == []  # where nobody reads it, nobody looks
    with pytest.raises(NotFound, match="3 inlined copies in its callers") as e:
        plan_of(some, f'{path}:"ns::gone(int)"')
    assert e.value.reason == "Inlined"
    assert e.value.suggestions == [f"{path}:a.c:3"]
    with pytest.raises(NotFound) as e:
        plan_of(some, f"{path}:fflush")
    assert e.value.reason == "Imported"
    assert some.resolve_dry(parse_probe(f"{path}:vis*")).notes == []
