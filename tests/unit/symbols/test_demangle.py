"""Demangled names: as c++filt has them, found by what a person writes, and hostile ones in bounded time."""

from __future__ import annotations

import re
import subprocess
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support import needs
from tests.unit.symbols.programs import build_with
from tests.unit.symbols.test_elf import index_of
from trapline_agent.symbols.demangle import demangle, demangled, form, literals, meant

CPP = """
#include <string>
#include <vector>
#define KEEP __attribute__((noinline, used))
namespace ns {
struct Inner { int x; };
struct Cls {
    int v = 1;
    KEEP Cls *operator->() { return this; }
    KEEP int operator()(int a) const { return a + v; }
    KEEP bool operator<(const Cls &o) const { return v < o.v; }
    KEEP int operator<<(int n) { return v << n; }
    KEEP operator int() const { return v; }
    KEEP ~Cls() { v = 0; }
    struct Nested { KEEP int f(Inner *) { return 3; } };
};
template <class T> struct Box { T t; KEEP T get(int) { return t; } };
template <class T> KEEP T twice(T t) { return t + t; }
KEEP int over(int a) { return a; }
KEEP int over(const char *s) { return s[0]; }
KEEP int over(std::string s) { return s.size(); }
}
namespace { KEEP int hidden(int a) { return a * 3; } }
KEEP int plain(int a) { return a + 1; }
int main(int argc, char **argv) {
    ns::Cls c, d; ns::Box<std::vector<int>> b; ns::Cls::Nested n; ns::Inner i{1};
    auto lambda = [argc](int a) __attribute__((noinline, used)) { return a + argc; };
    return c->v + c(1) + (c < d) + (c << 2) + int(c) + b.get(1).size() + ns::twice(2) + int(ns::twice(2.5)) + ns::over(1)
        + ns::over("x") + ns::over(std::string("y")) + hidden(2) + plain(3) + n.f(&i) + lambda(1);
}
"""
TEXTS = {
    "ns::Cls::operator->": 1,
    "ns::Cls::operator->()": 1,
    "ns::Cls::operator()": 1,
    "ns::Cls::operator()(int) const": 1,
    "ns::Cls::operator( ) (int)   const": 1,
    "ns::Cls::operator<": 1,
    "ns::Cls::operator<<": 1,
    "ns::Cls::operator int": 1,
    "ns::Cls::~Cls": 1,
    "ns::Cls::Nested::f": 1,
    "ns::Cls::Nested::f(ns::Inner*)": 1,
    "ns::Box<std::vector<int, std::allocator<int> > >::get": 1,
    "ns::Box::get": 1,
    "ns::twice": 2,
    "ns::twice<int>": 1,
    "double ns::twice<double>(double)": 1,
    "ns::over": 3,
    "ns::over(int)": 1,
    "ns::over(char const*)": 1,
    "(anonymous namespace)::hidden": 1,
    "plain": 1,
    "plain(int)": 1,
    "main::{lambda(int)#1}::operator()": 1,
    "Cls::operator->": 0,
    "ns::Cls": 0,
    "ns::over(long)": 0,
    "ns::operator->": 0,
}
RUST = """
fn keep<T: Copy>(t: T) -> T { unsafe { std::ptr::read_volatile(&t) } }
mod shapes {
    pub trait Area { fn area(&self) -> u64; }
    pub struct Square(pub u64);
    impl Area for Square { #[inline(never)] fn area(&self) -> u64 { super::keep(self.0 * self.0) } }
    impl Square { #[inline(never)] pub fn grow(&mut self, by: u64) { self.0 += super::keep(by) } }
    #[inline(never)] pub fn twice<T: std::ops::Add<Output = T> + Copy>(t: T) -> T { super::keep(t) + t }
}
use shapes::Area;
fn main() {
    let mut s = shapes::Square(3);
    s.grow(2);
    println!("{} {} {}", s.area(), shapes::twice(4u64), shapes::twice(1.5f64));
}
"""


def filtered(names: list[str]) -> list[str]:
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return done.stdout.split("\n")[: len(names)]


@needs.gxx
@needs.binutils
@pytest.mark.parametrize("flags", [("-O0",), ("-O2", "-fno-inline")])
def test_cpp_names_as_cppfilt_has_them_and_as_people_write_them(tmp_path: Path, flags: tuple[str, ...]) -> None:
    index = index_of(build_with("g++", tmp_path, CPP, "program.cpp", *flags))
    mangled = sorted({s.name for s in index if s.name.startswith("_Z") and "." not in s.name})
    mine, theirs = demangle(mangled), filtered(mangled)
    assert len(mangled) > 30
    # cpp_demangle spells out fewer abbreviations, and has no words for a few kinds of symbol that are no functions.
    assert sum(a == b for a, b in zip(mine, theirs, strict=True)) > 0.9 * len(mangled)
    for text, count in TEXTS.items():
        found = index.find_text(text)
        assert len(found) == count, (text, [demangled(s.name) for s in found])
        assert all(form(text) in form(t) or meant(text, t, t) or "<" in t for t in filtered([s.name for s in found]))
    assert [demangled(s.name) for s in index.glob("ns::Cls::Nest*")] == ["ns::Cls::Nested::f(ns::Inner*)"]
    assert {demangled(s.name) for s in index.regex(r"^ns::over\((int|char)")} == {
        "ns::over(int)",
        "ns::over(char const*)",
    }
    for query in ("cls::nested::f", "Nested::f(ns", "nested"):
        assert "_ZN2ns3Cls6Nested1fEPNS_5InnerE" in [m.name for m in index.search(query)[1]], query
    near = index.not_found("ns::Cls::Nestd::f", "program").suggestions
    assert near[0] == "ns::Cls::Nested::f"
    assert index.not_found("over", "program").suggestions[0] == "ns::over"


@needs.gxx
def test_what_the_compiler_put_elsewhere_is_not_the_function(tmp_path: Path) -> None:
    source = """
    #include <stdexcept>
    namespace ns { __attribute__((noinline)) int work(int a) {
        if (__builtin_expect(a > 100, 0)) throw std::runtime_error("too much");
        return a * 3;
    } }
    int main(int argc, char **argv) { return ns::work(argc); }
    """
    index = index_of(build_with("g++", tmp_path, source, "program.cpp", "-O2"))
    assert len(index.find("_ZN2ns4workEi.cold")) == 1
    assert [s.name for s in index.find_text("ns::work")] == ["_ZN2ns4workEi"]
    assert [s.name for s in index.glob("ns::*")] == ["_ZN2ns4workEi"]


@needs.rustc
@needs.binutils
@pytest.mark.parametrize("mangling", ["legacy", "v0"])
def test_rust_names_as_cppfilt_has_them_and_as_people_write_them(
    tmp_path: Path, mangling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags: tuple[str, ...]
    flags = (f"-Csymbol-mangling-version={mangling}", "-Copt-level=1")
    if mangling == "legacy":  # once the default, later only with a flag
        monkeypatch.setenv("RUSTC_BOOTSTRAP", "1")
        flags += ("-Zunstable-options",)
    index = index_of(build_with("rustc", tmp_path, RUST, "program.rs", *flags))
    names = sorted({s.name for s in index if s.name.startswith(("_R", "_ZN")) and "." not in s.name})
    assert len(names) > 100
    # c++filt shows the hashes of crates and functions too.
    theirs = [re.sub(r"::h[0-9a-f]{16}|\[[0-9a-f]{15,16}\]", "", t) for t in filtered(names)]
    same = [a == b for a, b in zip(demangle(names), theirs, strict=True)]
    assert sum(same) > 0.95 * len(names)
    for text, count in {
        "program::main": 1,
        "program::shapes::twice": 2,
        "program::shapes::Square::grow": 1,
        "<program::shapes::Square as program::shapes::Area>::area": 1,
        "program::shapes::Square::area": 1,
        "shapes::twice": 0,
    }.items():
        assert len(index.find_text(text)) == count, text


def test_what_is_not_mangled_stays() -> None:
    names = ["main", "", "_Z", "_Zbad", "_R", "__libc_start_main", "_Real", "_ZN1"]
    assert demangle(names) == names
    assert demangled("main") == ""
    assert demangled("_ZN2ns1fEv") == "ns::f()"
    assert literals("ns::Cls::operator->") == [b"Cls", b"ns"]
    assert literals("std::string::append") == [b"append"]
    assert literals("f<int>(char)") == [b"f"]


def _doubling(depth: int) -> str:
    """A name that would be 2**depth long: each template's arguments are the last one, twice."""
    digits = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    name = "_Z1f1A1BIS_S_E"
    for i in range(1, 1 + depth):
        again = f"S{digits[i] if i < 36 else digits[i // 36] + digits[i % 36]}_"
        name += f"S0_I{again}{again}E"
    return name


@pytest.mark.parametrize(
    "name",
    [
        "_Z1f" + "P" * 16_000 + "i",
        "_Z1f" + "P" * 1_000_000 + "i",
        "_Z1f" + "1AI" * 4000 + "i" + "E" * 4000,
        "_ZN" + "1a" * 8000 + "E",
        "_Z1f" + "F" * 8000,
        "_R" + "Nv" * 3000 + "C1a" + "1b" * 3000,
        _doubling(20),
        _doubling(30),
        _doubling(60),
    ],
    ids=["pointers", "long", "templates", "nested", "functions", "rust", "doubling-20", "doubling-30", "doubling-60"],
)
def test_hostile_names_cost_little(name: str) -> None:
    began = time.process_time()
    for parameters in (True, False):
        (text,) = demangle([name], parameters=parameters)
        assert len(text) <= max(65_536, len(name))
        meant("ns::f", text, text)
    assert time.process_time() - began < 1.0


@given(st.text(max_size=60), st.sampled_from(["_Z", "_ZN", "_R", "_RNv", "__R", "_ZN3std17h"]))
def test_any_name_is_answered(rest: str, prefix: str) -> None:
    (full,), (bare,) = demangle([prefix + rest]), demangle([prefix + rest], parameters=False)
    meant(rest, full, bare)
    literals(rest)


@needs.gxx
def test_letters_of_mangled_names_in_any_order_are_answered(tmp_path: Path) -> None:
    """Real names with pieces swapped: the parser gets deep into them."""
    index = index_of(build_with("g++", tmp_path, CPP, "program.cpp", "-O0"))
    names = [s.name for s in index if s.name.startswith("_Z")]

    @given(st.sampled_from(names), st.sampled_from(names), st.integers(0, 80), st.integers(0, 80))
    def answered(a: str, b: str, i: int, j: int) -> None:
        (text,) = demangle([a[:i] + b[j:]])
        assert isinstance(text, str)

    answered()
