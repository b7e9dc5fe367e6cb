"""Typed values: what C, C++, Rust and Go call fields, elements, strings, in terms of places and fetches."""

from __future__ import annotations

import difflib
import re
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from trapline.errors import NoDebugInfo, NotFound, SpecError, Unsupported
from trapline.protocol.hits import ValueStatus
from trapline_agent.capture.places import WORD_BYTES, Memory, Pieces, Place, add, entry, in_word, missing
from trapline_agent.debuginfo.model import DebugInfo, Member, Type, TypeRef
from trapline_agent.plans import Bytes, Const, Missing, Names, Op, Text, Value

MAX_STRING_BYTES = 4096
DEFAULT_STRING_BYTES = 64
_MAX_MEMBERS = 4096
_MAX_FOLLOWED = 32
_MAX_NESTED = 8
_MAX_REACHED = 4096
VOID = Type("void", "void")

_BASES: dict[str, Type] = {
    "char": Type("base", "char", 1, encoding="char"),
    "signed char": Type("base", "signed char", 1, encoding="signed"),
    "bool": Type("base", "bool", 1, encoding="bool"),
    "float": Type("base", "float", 4, encoding="float"),
    "double": Type("base", "double", 8, encoding="float"),
    "void": VOID,
}
for _bits in (8, 16, 32, 64):
    for _name in (f"u{_bits}", f"uint{_bits}_t"):
        _BASES[_name] = Type("base", _name, _bits // 8)
    for _name in (f"i{_bits}", f"int{_bits}_t"):
        _BASES[_name] = Type("base", _name, _bits // 8, encoding="signed")
for _name, _size in (("short", 2), ("int", 4), ("long", 8), ("long long", 8)):
    _BASES[_name] = Type("base", _name, _size, encoding="signed")
    _BASES[f"unsigned {_name}"] = Type("base", f"unsigned {_name}", _size)
_BASES |= {
    "f32": _BASES["float"],
    "f64": _BASES["double"],
    "unsigned char": Type("base", "unsigned char", 1),
    "unsigned": _BASES["unsigned int"],
    "size_t": _BASES["unsigned long"],
    "ssize_t": _BASES["long"],
    "uintptr_t": _BASES["unsigned long"],
}
"""What ``cast`` knows without debug information."""


class Types:
    """The types of one file, and those that are made of them here."""

    def __init__(self, debug: DebugInfo | None, known: Iterable[TypeRef | None] = ()) -> None:
        """
        Args:
            debug: the file's.
            known: types of what can be named at the site: ``named`` looks at what they lead to.
        """
        self._debug = debug
        self._known = [ref for ref in known if ref is not None]
        self._made: dict[TypeRef, Type] = {}
        """By numbers below zero."""

    def of(self, ref: TypeRef | None) -> Type:
        """Returns a type."""
        if ref is None:
            return VOID
        if ref < 0:
            return self._made[ref]
        if self._debug is None:
            raise NoDebugInfo("a type of a file without debug information")
        return self._debug.type(ref)

    def pointer_to(self, target: Type) -> Type:
        ref = -1 - len(self._made)
        self._made[ref] = target
        return Type("pointer", f"{target.name} *", WORD_BYTES, target=ref)

    def named(self, text: str) -> Type:
        """Returns the type that is written so in C: ``struct foo *``.

        Raises:
            NotFound: there is none.
        """
        name = text.strip()
        stars = 0
        while name.endswith("*"):
            stars, name = stars + 1, name[:-1].rstrip()
        for prefix in ("const ", "volatile "):
            name = name.removeprefix(prefix)
        plain = name
        for prefix in ("struct ", "class ", "union ", "enum "):
            plain = plain.removeprefix(prefix).strip()
        found = _BASES.get(name)
        if found is None:
            found = self._reachable(plain)
        if found is None:
            why = "no parameter or variable leads to it" if self._known else "there is no debug information"
            raise NotFound(
                f"no type `{name}`: {why}", hint="known everywhere are u8 to u64, i8 to i64, f32, f64, char, void"
            )
        for _ in range(stars):
            found = self.pointer_to(found)
        return found

    def _reachable(self, name: str) -> Type | None:
        """Looks for a type among those that the site's variables lead to, the nearest first."""
        queue: deque[TypeRef] = deque(self._known)
        seen = set(queue)
        incomplete: Type | None = None
        while queue and len(seen) <= _MAX_REACHED:
            found = self.of(queue.popleft())
            if name in (found.name, found.alias) and found.kind != "pointer":
                if found.size:
                    return found
                incomplete = found
            for ref in (found.target, *(m.type for m in found.members)):
                if ref is not None and ref not in seen:
                    seen.add(ref)
                    queue.append(ref)
        return incomplete


@dataclass(frozen=True)
class Thing:
    """A value of the program: its type, and where it is."""

    type: Type
    place: Place
    bits: tuple[int, int] = (0, 0)
    """Of a bit-field: shift and width."""
    before: Thing | None = None
    """At a return, of what was asked of the entry: this as it was then; what it points to is read now."""


def is_character(type_: Type) -> bool:
    """Whether an array of these, or a pointer to one, is a C string."""
    return type_.kind == "base" and type_.size == 1 and type_.encoding == "char"


def _letter(type_: Type) -> str:
    if type_.kind in ("base", "enum"):
        return {"signed": "i", "char": "i", "float": "f", "bool": "b"}.get(type_.encoding, "u")
    return "u"


def is_scalar(type_: Type) -> bool:
    """Whether a value of a type is one number."""
    if type_.kind == "base":
        return 0 < type_.size <= WORD_BYTES and type_.encoding != "complex"
    return type_.kind in ("pointer", "reference", "enum")


def number(thing: Thing) -> Value:
    """Returns the fetch of a scalar.

    Raises:
        Unsupported: a number that is wider than 64 bits.
    """
    letter = _letter(thing.type)
    if thing.type.kind == "base" and thing.type.encoding == "char" and thing.type.name.startswith("unsigned"):
        letter = "u"
    if thing.bits[1]:
        return thing.place.bits(*thing.bits, letter)
    if not is_scalar(thing.type):
        raise Unsupported(
            f"{described(thing.type)} of {thing.type.size} bytes is no number of 64 bits", reason="NotInThisRelease"
        )
    return thing.place.fetch(thing.type.size or WORD_BYTES, letter)


def kind_of_number(type_: Type) -> str:
    """Returns the column type of a scalar."""
    return {"i": "i64", "f": "f64", "b": "bool"}.get(_letter(type_), "u64")


def described(type_: Type) -> str:
    """Returns a type in words, for messages."""
    name = type_.alias or type_.name
    return {"pointer": "a pointer", "array": "an array", "void": "nothing"}.get(
        type_.kind, f"`{name}`" if name else f"an unnamed {type_.kind}"
    )


def followed(thing: Thing, types: Types) -> Thing:
    """Returns what a pointer or reference points to, as often as it takes; other things as they are."""
    for _ in range(_MAX_FOLLOWED):
        if thing.type.kind not in ("pointer", "reference"):
            return thing
        thing = Thing(types.of(thing.type.target), Memory(number(thing)))
    return thing


_SMART = re.compile(r"(?:std::(?:__\w+::)?)?(?:unique_ptr|shared_ptr)<")
_HELD = ("_M_ptr", "_M_head_impl", "__ptr_")
"""What a smart pointer holds: libstdc++'s shared_ptr (bits/shared_ptr_base.h) and unique_ptr (bits/unique_ptr.h, in a
tuple), libc++'s both."""


def smart(thing: Thing, types: Types) -> Thing | None:
    """Returns the plain pointer in a ``std::unique_ptr`` or ``std::shared_ptr``; None of other things."""
    if thing.type.kind == "reference":
        thing = Thing(types.of(thing.type.target), Memory(number(thing)))
    if thing.type.kind not in ("class", "struct") or not _SMART.match(thing.type.name):
        return None
    level = [(thing.type, 0)]
    for _ in range(_MAX_NESTED):
        inner: list[tuple[Type, int]] = []
        for one, at in level:
            for member in one.members:
                type_ = types.of(member.type)
                if member.name in _HELD and type_.kind == "pointer":
                    return Thing(type_, thing.place.part(at + member.offset))
                if type_.kind in ("class", "struct"):
                    inner.append((type_, at + member.offset))
        level = inner[:_MAX_FOLLOWED]
    return None


def _generic(type_: Type) -> str:
    """Returns a generic type's name without its namespaces: ``Vec`` of ``alloc::vec::Vec<u8, ...>``."""
    return type_.name.partition("<")[0].rpartition("::")[2]


def variant(thing: Thing, name: str, types: Types) -> Thing | None:
    """Returns the content of one variant of a Rust enum; None where it has none of that name. What is asked of a variant
    that a value is not is ``null``."""
    content = next((m for m in thing.type.members if m.name == name), None)
    if content is None:
        return None
    tag = _discriminant(thing, types)
    inner = Thing(types.of(content.type), thing.place.part(content.offset))
    if tag is None:
        return inner
    known = dict(thing.type.enumerators)
    if name in known:
        holds: Value = Op("eq", (tag, Const(known[name])))
    else:
        others = tuple(Op("ne", (tag, Const(value))) for value in known.values())
        holds = Op("all", others)
    return replace(inner, place=_only_if(holds, inner, types))


def _only_if(holds: Value, thing: Thing, types: Types) -> Place:
    if isinstance(thing.place, Memory):
        there = Op("if", (holds, thing.place.address(), Missing(ValueStatus.NULL)))
        return Memory(there)
    words = tuple(
        (at, size, Op("if", (holds, word, Missing(ValueStatus.NULL)))) for at, size, word in thing.place.words
    )
    return Pieces(words, thing.place.offset)


_DISCRIMINANT = "(discriminant)"


def _discriminant(thing: Thing, types: Types) -> Value | None:
    """Returns what tells the variants apart; None where there is one alone."""
    tag = next((m for m in thing.type.members if m.name == _DISCRIMINANT), None)
    return None if tag is None else number(Thing(types.of(tag.type), thing.place.part(tag.offset)))


def _optional(thing: Thing, types: Types) -> Thing | None:
    """Returns what a Rust ``Option`` holds; None of other things."""
    if thing.type.kind == "variant" and _generic(thing.type) == "Option":
        some = variant(thing, "Some", types)
        return None if some is None else _member(some, "__0", types)
    return None


def _member(thing: Thing, name: str, types: Types) -> Thing | None:
    for member, at in members(thing.type, types):
        if member.name == name:
            return Thing(types.of(member.type), thing.place.part(at), (member.bit_offset, member.bit_size))
    return None


def members(type_: Type, types: Types) -> Iterator[tuple[Member, int]]:
    """Yields members and their offsets, outer ones first: those of anonymous members and of base classes are the outer
    one's too."""
    level: list[tuple[Type, int]] = [(type_, 0)]
    count = 0
    while level:
        inner: list[tuple[Type, int]] = []
        for one, at in level:
            for member in one.members:
                count += 1
                if count > _MAX_MEMBERS:
                    return
                yield member, at + member.offset
                if member.base or not member.name:
                    inner.append((types.of(member.type), at + member.offset))
        level = inner


def field(thing: Thing, name: str, types: Types) -> Thing:
    """Returns a field, through pointers.

    Raises:
        NotFound: there is none of that name; with those that there are.
        SpecError: it is nothing that has fields.
    """
    outer = followed(thing, types)
    if outer.type.kind == "variant":
        if (content := variant(outer, name, types)) is not None:
            return content
        if (held := _optional(outer, types)) is not None:
            return field(held, name, types)
        there = [m.name for m in outer.type.members if m.name != _DISCRIMINANT]
        near = difflib.get_close_matches(name, there, cutoff=0.5)
        raise NotFound(
            f"{described(outer.type)} has no variant `{name}`", suggestions=near, hint=f"it has {', '.join(there[:12])}"
        )
    if outer.type.kind not in ("struct", "class", "union"):
        raise SpecError(f"{described(outer.type)} has no fields: `.{name}`")
    if (found := _member(outer, name, types)) is not None:
        return found
    if (pointer := smart(outer, types)) is not None:
        return field(pointer, name, types)
    there = [m.name for m, _ in members(outer.type, types) if m.name and not m.base]
    if not there and not outer.type.size:
        raise NotFound(f"{described(outer.type)} is only declared in this file: its fields are not known")
    near = difflib.get_close_matches(name, there, cutoff=0.5)
    raise NotFound(
        f"{described(outer.type)} has no field `{name}`", suggestions=near, hint=f"it has {', '.join(there[:12])}"
    )


def element(thing: Thing, index: Value, types: Types) -> Thing:
    """Returns an element of an array, or the one so far from where a pointer points.

    Raises:
        SpecError: there are no elements, or not so many.
    """
    reference = thing.type.kind == "reference"
    if reference or (thing.type.kind == "pointer" and _generic(types.of(thing.type.target)) == "Vec"):  # Rust's &Vec
        thing = Thing(types.of(thing.type.target), Memory(number(thing)))
    fixed = index.value if isinstance(index, Const) and isinstance(index.value, int) else None
    if thing.type.kind == "array":
        of = types.of(thing.type.target)
        count, rest = thing.type.counts[0] if thing.type.counts else 0, thing.type.counts[1:]
        inner = of
        if rest:
            size = of.size
            for n in rest:
                size *= n
            inner = replace_type(thing.type, counts=rest, size=size)
        if fixed is not None and count and not 0 <= fixed < count:
            raise SpecError(f"the array has {count} elements, from 0 to {count - 1}")
        if fixed is not None:
            return Thing(inner, thing.place.part(fixed * inner.size))
        if not isinstance(thing.place, Memory):
            raise Unsupported("an array in registers has no computed index", reason="NotInThisRelease")
        base = thing.place.address()
    elif thing.type.kind == "pointer":
        inner, base = types.of(thing.type.target), number(thing)
        if fixed is not None and inner.size:
            return Thing(inner, Memory(base, fixed * inner.size))
    elif (parts := _slice(thing, types)) is not None:
        pointer, size_ = parts
        within = Op("all", (Op("ge", (index, Const(0))), Op("lt", (index, size_))))
        there = of_word(Op("if", (within, number(pointer), Missing(ValueStatus.FAULT))), pointer.type)
        return element(there, index, types)
    else:
        raise SpecError(f"{described(thing.type)} has no elements")
    if not inner.size:
        raise SpecError(
            "what it points to has no size" if inner.kind == "void" else f"{described(inner)} is only declared",
            hint="say what it is: `cast(p, 'u32 *')[0]`",
        )
    return Thing(inner, Memory(Op("address", (Op("add", (base, Op("mul", (index, Const(inner.size))))),))))


def replace_type(type_: Type, *, counts: tuple[int, ...], size: int) -> Type:
    return Type("array", type_.name, size, target=type_.target, counts=counts)


# --- strings ---------------------------------------------------------------------------------------------------------


def text(thing: Thing, types: Types, limit: int) -> Value | None:
    """Returns the fetch of a string; None where it is none.

    C's ``char *`` and ``char[n]``; libstdc++'s and libc++'s ``std::string`` and ``std::string_view``; Rust's ``&str`` and
    ``String``; Go's ``string``.
    """
    type_ = thing.type
    if type_.kind == "reference":
        return text(Thing(types.of(type_.target), Memory(number(thing))), types, limit)
    if type_.kind == "pointer":
        target = types.of(type_.target)
        if is_character(target):
            return Text(number(thing), limit)
        return text(Thing(target, Memory(number(thing))), types, limit) if _sized(target, types) else None
    if type_.kind == "array" and is_character(types.of(type_.target)):
        if not isinstance(thing.place, Memory):
            return Missing(ValueStatus.UNSUPPORTED)
        count = type_.counts[0] if len(type_.counts) == 1 else 0
        return Text(thing.place.address(), min(limit, count) if count else limit)
    if (names := _sized(type_, types)) is not None:
        pointer, length = (_path(thing, path, types) for path in names)
        return Bytes(number(pointer), number(length), limit)
    if isinstance(thing.place, Memory) and _is_libcxx_string(type_):
        return _libcxx_string(thing.place, limit)
    return None


_SIZED = (
    (("_M_dataplus", "_M_p"), ("_M_string_length",)),  # std::string of libstdc++ (bits/basic_string.h)
    (("_M_str",), ("_M_len",)),  # std::string_view of libstdc++ (string_view)
    (("__data_",), ("__size_",)),  # std::string_view of libc++ (string_view)
    (("__data",), ("__size",)),
    (("str",), ("len",)),  # Go (runtime/string.go, stringStruct)
    (("data_ptr",), ("length",)),  # Rust's &str, as rustc describes it
)


def _sized(type_: Type, types: Types) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
    """Returns the paths to a string's pointer and its length."""
    if type_.kind not in ("struct", "class"):
        return None
    there = {m.name for m, _ in members(type_, types)}
    for pointer, length in _SIZED:
        if pointer[0] not in there or length[0] not in there:
            continue
        if pointer == ("str",) and type_.name != "string":
            continue
        if pointer == ("data_ptr",) and "str" not in type_.name:
            continue
        return pointer, length
    if type_.name.endswith("String") and "vec" in there:  # Rust: String { vec: Vec<u8> { buf, len } }
        for member, _ in members(type_, types):
            if member.name == "vec":
                vector = types.of(member.type)
                for inner, _ in members(vector, types):
                    if inner.name == "buf" and (path := _first_pointer(types.of(inner.type), types)) is not None:
                        return ("vec", "buf", *path), ("vec", "len")
    return None


def _first_pointer(type_: Type, types: Types) -> tuple[str, ...] | None:
    """Returns the path to the nearest pointer inside of a struct: where a Rust ``Vec`` has its elements."""
    queue: deque[tuple[Type, tuple[str, ...]]] = deque([(type_, ())])
    for _ in range(_MAX_FOLLOWED):
        if not queue:
            break
        struct, path = queue.popleft()
        for member in struct.members:
            inner = types.of(member.type)
            if inner.kind == "pointer":
                return (*path, member.name)
            if inner.kind == "struct":
                queue.append((inner, (*path, member.name)))
    return None


def _path(thing: Thing, path: tuple[str, ...], types: Types) -> Thing:
    for name in path:
        thing = field(thing, name, types)
    return thing


def _is_libcxx_string(type_: Type) -> bool:
    return (
        type_.kind == "class"
        and "basic_string<char" in type_.name
        and any(m.name in ("__r_", "__rep_") for m in type_.members)
    )


def _libcxx_string(place: Memory, limit: int) -> Value:
    """libc++ keeps short strings in place: bit 0 of the first byte says which (libc++'s string, _LIBCPP_ABI default)."""
    first = place.fetch(1, "u")
    is_long = Op("and", (first, Const(1)))
    pointer = Op("if", (is_long, place.part(16).fetch(8, "u"), add(place.address(), 1)))
    length = Op("if", (is_long, place.part(8).fetch(8, "u"), Op("shr", (first, Const(1)))))
    return Bytes(pointer, length, limit)


def _slice(thing: Thing, types: Types) -> tuple[Thing, Value] | None:
    """Returns pointer and length of a Go or Rust slice, a Rust ``Vec``, a ``std::vector``."""
    if thing.type.kind not in ("struct", "class"):
        return None
    there = {m.name for m, _ in members(thing.type, types)}
    for pointer, length in (("array", "len"), ("data_ptr", "length")):
        if pointer in there and length in there:
            return field(thing, pointer, types), number(field(thing, length, types))
    if {"buf", "len"} <= there and _generic(thing.type) == "Vec":
        return _vec(thing, types)
    for first, last in ((("_M_impl", "_M_start"), ("_M_impl", "_M_finish")), (("__begin_",), ("__end_",))):
        if first[0] in there and "vector<" in thing.type.name:
            begin, end = _path(thing, first, types), _path(thing, last, types)
            if begin.type.kind == "pointer" and end.type.kind == "pointer":  # vector<bool> has bits
                size = types.of(begin.type.target).size
                return begin, Op("floordiv", (Op("sub", (number(end), number(begin))), Const(max(1, size))))
    return None


def _vec(thing: Thing, types: Types) -> tuple[Thing, Value] | None:
    """Of a Rust ``Vec``, whose pointer is one to bytes: the type is in the name alone."""
    buffer = field(thing, "buf", types)
    path = _first_pointer(buffer.type, types)
    if path is None:
        return None
    pointer, count = _path(buffer, path, types), number(field(thing, "len", types))
    inside = thing.type.name.partition("<")[2]
    try:
        of = types.named(_first_argument(inside))
    except NotFound:
        of = VOID
    return of_word(number(pointer), types.pointer_to(of)), count


def _first_argument(text: str) -> str:
    depth = 0
    for i, letter in enumerate(text):
        if depth == 0 and letter in ",>":
            return text[:i]
        depth += (letter in "<([") - (letter in ">)]")
    return text


def length(thing: Thing, types: Types) -> Value | None:
    """Returns the length of a string with a length, of a slice, of an array; None where there is none."""
    outer = followed(thing, types)
    if (names := _sized(outer.type, types)) is not None:
        return number(_path(outer, names[1], types))
    if (parts := _slice(outer, types)) is not None:
        return parts[1]
    if (count := _map_count(outer, types)) is not None:
        return count
    if (
        outer.type.kind == "array"
        and outer.type.counts
        and outer.type.counts[0]
        and not is_character(types.of(outer.type.target))
    ):
        return Const(outer.type.counts[0])
    return None


_MAPS = {"count": "hash<", "used": "map<"}
"""Go's: runtime/map.go, hmap; internal/runtime/maps, Map."""


def _map_count(thing: Thing, types: Types) -> Value | None:
    if thing.type.kind == "struct":
        for name, begins in _MAPS.items():
            if thing.type.name.startswith(begins) and (found := _member(thing, name, types)) is not None:
                return number(found)
    return None


# --- what is shown ---------------------------------------------------------------------------------------------------


def shown(thing: Thing, types: Types) -> tuple[str, Value]:
    """Returns what is captured of a value that is asked for as it is: (column type, value).

    Raises:
        SpecError: it is a struct or an array: a field or an element of it has to be chosen.
    """
    if thing.before is not None:
        kind, value = shown(thing.before, types)
        return kind, entry(value)
    if isinstance(thing.place, Pieces) and len(thing.place.words) == 1 and isinstance(thing.place.words[0][2], Missing):
        kind = kind_of_number(thing.type) if is_scalar(thing.type) else "u64"
        return kind, thing.place.words[0][2]
    if (string := text(thing, types, DEFAULT_STRING_BYTES)) is not None:
        return "str", string
    if thing.type.kind == "reference":
        return shown(Thing(types.of(thing.type.target), Memory(number(thing))), types)
    if (pointer := smart(thing, types)) is not None:
        return shown(pointer, types)
    if (held := _optional(thing, types)) is not None:
        return shown(held, types)
    if thing.type.kind == "variant" and (tag := _discriminant(thing, types)) is not None:
        return "str", _variant_name(thing, tag)
    if thing.type.kind == "enum":
        names = tuple((value, name.encode()) for name, value in thing.type.enumerators)
        return ("str", Names(number(thing), names)) if names else (kind_of_number(thing.type), number(thing))
    if is_scalar(thing.type):
        return kind_of_number(thing.type), number(thing)
    if thing.type.kind in ("struct", "class", "union"):
        there = [m.name for m, _ in members(thing.type, types) if m.name and not m.base]
        raise SpecError(
            f"{described(thing.type)} is a {thing.type.kind}: choose a field", hint=f"it has {', '.join(there[:12])}"
        )
    if thing.type.kind == "array":
        raise SpecError("it is an array: choose an element, `a[0]`, or take its bytes, `buf(a, n)`")
    raise Unsupported(f"{described(thing.type)} cannot be captured", reason="NotInThisRelease")


def _variant_name(thing: Thing, tag: Value) -> Value:
    """Returns the name of the variant that a value is."""
    known = {name for name, _ in thing.type.enumerators}
    names = tuple((value, name.encode()) for name, value in thing.type.enumerators)
    other = next((m.name for m in thing.type.members if m.name not in known and m.name != _DISCRIMINANT), None)
    if other is None:
        return Names(tag, names)
    any_known = Op("any", tuple(Op("eq", (tag, Const(value))) for value, _ in names))
    return Op("if", (any_known, Names(tag, names), Const(other.encode())))


def redacted(thing: Thing) -> Thing:
    """Returns a value that is not to be looked at."""
    return Thing(thing.type, missing(ValueStatus.REDACTED))


def of_word(word: Value, type_: Type) -> Thing:
    """Returns a scalar that a word holds."""
    return Thing(type_, in_word(word))
