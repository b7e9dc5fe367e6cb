"""Names as the source language writes them: C++ (Itanium ABI) and Rust (legacy and v0).

multi-demangle (docs/adr/0015) bounds its recursion and what it writes, so a hostile name costs microseconds. What it
cannot read stays as it is.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from multi_demangle import DemangleOptions, demangle_symbols

PREFIXES = ("_Z", "_R", "__R", "___Z")
"""A mangled name begins so; others mean themselves."""
_MAX_NAME = 16_384
_MAX_TEXT = 65_536
_LEGACY_RUST = re.compile(r"17h[0-9a-f]{16}E")
_COLD = re.compile(r"\.(?:cold|part)(?:\.|\Z)")
_FULL, _BARE = DemangleOptions.complete(), DemangleOptions.name_only()
_IDENTIFIER = re.compile(r"[A-Za-z_]\w*")
_WORDS = (
    "std operator allocator basic_string string basic_istream basic_ostream basic_iostream istream ostream iostream "
    "anonymous namespace lambda unnamed closure as dyn impl const volatile new delete co_await vtable for shim "
    "void bool char short int long float double signed unsigned wchar_t char8_t char16_t char32_t __int128 auto "
    "u8 u16 u32 u64 u128 usize i8 i16 i32 i64 i128 isize f32 f64 str mut unsafe extern fn"
)
_ABBREVIATED = frozenset(_WORDS.split())
"""What may be in a demangled name without being spelled in the mangled one."""
_OPERATOR = re.compile(r"\boperator\s*(?:\(\)|\[\]|<=>|->\*?|<<=?|>>=?|[<>]=?|[-+*/%^&|~!=,]+)")
_QUALIFIERS = re.compile(r"(?: const| volatile| &&?)+\Z")
_CLONE = re.compile(r"(?: \[clone [^]]*\])+\Z")
_ABI_TAG = re.compile(r"\[abi:\w+\]")
_SPACE = re.compile(r"\s*(\W)\s*")


def demangle(names: Sequence[str], *, parameters: bool = True) -> list[str]:
    """Returns the names demangled, those that are not mangled as they are.

    Args:
        names: symbols, without a version.
        parameters: False: without parameter lists, return types and qualifiers.
    """
    out = list(names)
    options = _FULL if parameters else _BARE
    by_language: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        if name.startswith(PREFIXES) and len(name) <= _MAX_NAME:
            rust = name.lstrip("_")[:1] == "R" or _LEGACY_RUST.search(name) is not None
            by_language.setdefault("rust" if rust else "cpp", []).append(i)
    for language, which in by_language.items():
        demangled = demangle_symbols([names[i] for i in which], options, language=language)
        for i, text in zip(which, demangled, strict=True):
            out[i] = text if len(text) <= _MAX_TEXT else names[i]
    return out


def demangled(name: str) -> str:
    """Returns one name demangled, empty where it is not mangled."""
    (text,) = demangle([name])
    return "" if text == name else text


def is_part(name: str) -> bool:
    """Whether a symbol is a part of a function that the compiler put elsewhere: no call begins there."""
    return _COLD.search(name) is not None


def literals(text: str) -> list[bytes]:
    """Returns what must be in the mangled names that ``text`` may mean, longest first."""
    if not text.isascii():
        return []  # Rust writes such names in Punycode
    found = {w for w in _IDENTIFIER.findall(_plain(_OPERATOR.sub("", text))) if w not in _ABBREVIATED}
    return [w.encode() for w in sorted(found, key=len, reverse=True)]


def _plain(text: str) -> str:
    """Returns a name without its parameter lists and template arguments: types may be abbreviated by a letter."""
    out: list[str] = []
    depth = 0
    start = 0
    if text.startswith("<"):  # Rust: <Type as Trait>::function
        return text
    for i, c in enumerate(text):
        if c in "<(":
            if not depth:
                out.append(text[start:i])
            depth += 1
        elif c in ">)" and depth:
            depth -= 1
            start = i + 1
    return "".join(out) + ("" if depth else text[start:])


def meant(text: str, full: str, bare: str) -> bool:
    """Whether someone who writes ``text`` means a symbol.

    Args:
        text: as it was written: spaces do not matter. Without a parameter list it means all overloads, without
            template arguments all instances.
        full: the symbol demangled.
        bare: the same without parameters.
    """
    return form(text) in forms(full, bare)


def forms(full: str, bare: str) -> set[str]:
    """Returns the ways to write a symbol's name."""
    full, bare = _CLONE.sub("", full), _QUALIFIERS.sub("", bare)
    found = {full, bare}
    for each in (full, bare):
        if each.startswith("<"):  # Rust's <Type as Trait>::function is Type::function for short
            inner, rest = _closing(each)
            each = inner.partition(" as ")[0] + rest
        found |= {each, _without_arguments(each)}
    return {form(each) for each in found}


def form(text: str) -> str:
    """Returns a name in the spelling that is compared: without needless spaces and ABI tags."""
    return _SPACE.sub(r"\1", " ".join(_ABI_TAG.sub("", text).split()))


def _closing(text: str) -> tuple[str, str]:
    """Returns what is between the angle bracket that a text begins with and its partner, and what is behind."""
    depth = 0
    for i, c in enumerate(text):
        depth += (c == "<") - (c == ">" and text[i - 1] != "-")
        if not depth:
            return text[1:i], text[i + 1 :]
    return text[1:], ""


def _without_arguments(text: str) -> str:
    """Returns a name without its template arguments, ``ns::Cls<int>::f`` as ``ns::Cls::f``; operators keep their signs."""
    if "<" not in text:
        return text
    out: list[str] = []
    depth = at = 0
    while at < len(text):
        found = _OPERATOR.match(text, at) if text.startswith("operator", at) else None
        if found:
            if not depth:
                out.append(found[0])
            at = found.end()
            continue
        c = text[at]
        if c == "<":
            if not depth and out[-2:] == [":", ":"]:  # Rust: f::<u8>
                del out[-2:]
            depth += 1
        elif c == ">" and depth and text[at - 1] != "-":
            depth -= 1
        elif not depth:
            out.append(c)
        at += 1
    return "".join(out)
