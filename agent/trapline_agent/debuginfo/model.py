"""What debug information says, in terms that do not depend on its format: who asks for it needs no DWARF.

Places are file offsets, as everywhere (``SitePlan.offset``). Types are named by ``TypeRef``, since they lead to one another
in circles, and are read when they are asked for.
"""

from __future__ import annotations

from typing import Literal, Protocol

import msgspec

TypeRef = int
"""Names a type of one file; means nothing in another, nor after the file's index was made anew."""

Encoding = Literal["signed", "unsigned", "float", "bool", "char", "complex"]
Language = Literal["c", "c++", "rust", "go", ""]


class Member(msgspec.Struct, frozen=True):
    """A field of a struct, class or union."""

    name: str
    """Empty for an anonymous struct or union, whose members count as the outer one's."""
    type: TypeRef
    offset: int
    """Bytes from the struct's beginning."""
    bit_offset: int = 0
    """Of a bit-field: bits from the lowest of the little-endian word at ``offset``."""
    bit_size: int = 0
    """0: no bit-field."""
    base: bool = False
    """A base class, whose members are inherited."""


class Type(msgspec.Struct, frozen=True):
    """A type; typedefs and qualifiers lead to what they stand for, ``alias`` says how it was called there.

    ``variant`` is a Rust enum with content: ``members`` has ``(discriminant)``, where there is one, and then the content of
    each variant by its name, all in the same bytes; ``enumerators`` has (variant, value of the discriminant), but not the
    variant that all other values mean."""

    kind: Literal[
        "base",
        "pointer",
        "reference",
        "struct",
        "class",
        "union",
        "enum",
        "array",
        "function",
        "void",
        "variant",
        "unknown",
    ]
    name: str = ""
    size: int = 0
    """Bytes; 0 where it is not known (an incomplete type)."""
    alias: str = ""
    """The name of a typedef on the way."""
    encoding: Encoding = "unsigned"
    """Of ``base``; of ``enum`` whether it is signed."""
    target: TypeRef | None = None
    """What a pointer, a reference or an array is of; None: void."""
    counts: tuple[int, ...] = ()
    """Of an array, outermost first; 0 where it is not known."""
    members: tuple[Member, ...] = ()
    enumerators: tuple[tuple[str, int], ...] = ()


Op = tuple[str, int]
"""One step of a postfix program over words: ``reg`` N (DWARF's number: System V ABI, figure 3.36), ``const`` V,
``plus`` V, ``deref`` SIZE (1 to 8 bytes, zero-extended), ``add sub mul and or xor shl shr shra neg not swap dup drop``
0, ``load`` VADDR (the address where a vaddr of this file is mapped)."""


class Location(msgspec.Struct, frozen=True):
    """Where a variable is at one place in the code."""

    kind: Literal["memory", "register", "value", "optimised-out", "unsupported", "pieces"]
    """``memory``: ``ops`` compute its address; ``register``: it is in the register of the only op; ``value``: ``ops``
    compute it, it is nowhere; ``pieces``: it is split."""
    ops: tuple[Op, ...] = ()
    pieces: tuple[tuple[Location, int], ...] = ()
    """(where, bytes), in the order of the value's bytes."""
    reason: str = ""
    """Of ``unsupported``: what is asked that cannot be done. Of ``optimised-out``: why, where that is known."""


class Variable(msgspec.Struct, frozen=True):
    name: str
    type: TypeRef | None
    location: Location
    parameter: bool = False
    artificial: bool = False
    """C++'s ``this``, and what compilers add."""
    line: int = 0


class Function(msgspec.Struct, frozen=True):
    name: str
    """As the source has it, with its namespaces and classes."""
    linkage_name: str = ""
    """As the symbol table has it; empty where that is the same."""
    language: Language = ""
    file: str = ""
    line: int = 0
    parameters: tuple[Variable, ...] = ()
    """As declared; where they are at its first instruction."""
    returns: TypeRef | None = None
    """None: nothing."""
    variadic: bool = False


class Scope(msgspec.Struct, frozen=True):
    """What can be named at one place in the code."""

    function: Function
    """The innermost one, which may be inlined there."""
    variables: tuple[Variable, ...] = ()
    """Parameters and locals, innermost block first; a name that occurs twice means the first."""
    inlined_into: tuple[str, ...] = ()
    """Functions that it is inlined into, the innermost first; the last is the one that the symbol table knows."""
    file: str = ""
    line: int = 0
    """Of the place itself."""
    entry: bool = False
    """It is the first instruction of a function, where arguments are as the ABI passes them, whatever the debug information
    says (compilers describe them behind the prologue). Only a place in memory is wrong there, at -O0: a register, a value
    and what is optimised out come from lists that hold for this very address; nothing else is right in the copies that GCC
    makes for some callers (``.constprop``, ``.isra``, ``.part``), whose arguments the ABI does not know."""


class LinePlace(msgspec.Struct, frozen=True):
    """One place of a source line."""

    offset: int
    function: str
    file: str
    line: int
    """It may be a later one than was asked for: the next that has code."""
    inlined: bool = False


class DebugInfo(Protocol):
    """The debug information of one file. Any thread may ask; raises TraplineError with what is wrong in the file."""

    def scope(self, offset: int) -> Scope | None:
        """What can be named at a place; None where nothing is known of it."""

    def type(self, ref: TypeRef) -> Type: ...

    def variable(self, name: str) -> Variable | None:
        """A global or static variable, by its name in the source."""

    def line(self, file: str, line: int) -> list[LinePlace]:
        """The places of a source line, one for each function or copy. ``file`` is a path's end. Raises NotFound, with
        the files or lines that are near."""

    def inlined(self, function: str) -> list[LinePlace]:
        """Where a function's inlined copies begin."""

    def source(self, offset: int) -> tuple[str, int] | None:
        """File and line of a place."""
