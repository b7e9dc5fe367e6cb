"""A file's debug information made by hand, and memory that values are read from."""

from __future__ import annotations

import os
import struct
from pathlib import Path

from trapline_agent.arch.x86_64 import REGISTERS
from trapline_agent.debuginfo.model import (
    Function,
    LinePlace,
    Location,
    Member,
    Scope,
    Type,
    TypeRef,
    Variable,
)

INT, UINT, CHAR, CHARS, REQUEST, REQUESTS, STATE, DOUBLE, BOOL, TEN, PAIR, POINT, NODE, NODES, NAMES, LONG = range(16)
PARTS, VOIDS, STRING, STRING_REF, STR, GO_STRING, LONG_DOUBLE, INNER, BASE = range(16, 25)
MEMORY = Location("memory", (("reg", 6), ("plus", -24)))
NOWHERE = Location("optimised-out")


class Facts:
    """A ``DebugInfo``."""

    def __init__(self) -> None:
        self.types: dict[TypeRef, Type] = {
            INT: Type("base", "int", 4, encoding="signed"),
            UINT: Type("base", "unsigned int", 4),
            LONG: Type("base", "long", 8, encoding="signed"),
            CHAR: Type("base", "char", 1, encoding="char"),
            CHARS: Type("pointer", "char *", 8, target=CHAR),
            DOUBLE: Type("base", "double", 8, encoding="float"),
            BOOL: Type("base", "_Bool", 1, encoding="bool"),
            LONG_DOUBLE: Type("base", "long double", 16, encoding="float"),
            TEN: Type("array", "int [10]", 40, target=INT, counts=(10,)),
            NAMES: Type("array", "char [8]", 8, target=CHAR, counts=(8,)),
            STATE: Type("enum", "state", 4, enumerators=(("IDLE", 0), ("BUSY", 1), ("GONE", 7))),
            PAIR: Type("struct", "pair", 8, members=(Member("low", INT, 0), Member("high", INT, 4))),
            POINT: Type("struct", "point", 16, members=(Member("x", DOUBLE, 0), Member("n", LONG, 8))),
            BASE: Type("class", "Base", 4, members=(Member("id", INT, 0),)),
            INNER: Type("union", "", 8, members=(Member("number", LONG, 0), Member("text", CHARS, 0))),
            REQUEST: Type(
                "struct",
                "request",
                96,
                alias="request_t",
                members=(
                    Member("Base", BASE, 0, base=True),
                    Member("method", CHARS, 8),
                    Member("state", STATE, 16),
                    Member("keys", TEN, 20),
                    Member("", INNER, 64),
                    Member("name", NAMES, 72),
                    Member("flags", UINT, 80, bit_offset=3, bit_size=5),
                    Member("delta", INT, 80, bit_offset=8, bit_size=4),
                    Member("done", BOOL, 84),
                    Member("next", REQUESTS, 88),
                ),
            ),
            REQUESTS: Type("pointer", "request *", 8, target=REQUEST),
            NODE: Type("struct", "node", 16, members=(Member("next", NODES, 0), Member("value", INT, 8))),
            NODES: Type("pointer", "node *", 8, target=NODE),
            VOIDS: Type("pointer", "void *", 8),
            PARTS: Type("struct", "_Alloc_hider", 8, members=(Member("_M_p", CHARS, 0),)),
            STRING: Type(
                "class",
                "basic_string<char, std::char_traits<char>, std::allocator<char> >",
                32,
                alias="string",
                members=(Member("_M_dataplus", PARTS, 0), Member("_M_string_length", LONG, 8)),
            ),
            STRING_REF: Type("reference", "string &", 8, target=STRING),
            STR: Type("struct", "&str", 16, members=(Member("data_ptr", CHARS, 0), Member("length", LONG, 8))),
            GO_STRING: Type("struct", "string", 16, members=(Member("str", CHARS, 0), Member("len", LONG, 8))),
        }
        self.globals: dict[str, Variable] = {}

    def type(self, ref: TypeRef) -> Type:
        return self.types[ref]

    def variable(self, name: str) -> Variable | None:
        return self.globals.get(name)

    def scope(self, offset: int) -> Scope | None:
        return None

    def line(self, file: str, line: int) -> list[LinePlace]:
        return []

    def inlined(self, function: str) -> list[LinePlace]:
        return []

    def source(self, offset: int) -> tuple[str, int] | None:
        return None


def parameter(name: str, ref: TypeRef | None, location: Location = MEMORY) -> Variable:
    return Variable(name, ref, location, parameter=True)


def entry_of(*parameters: Variable, returns: TypeRef | None = None, language: str = "c") -> Scope:
    """A function's first instruction, as gcc -O0 describes it: where its parameters will be."""
    function = Function("serve", language=language, file="a.c", line=7, parameters=parameters, returns=returns)  # type: ignore[arg-type]
    return Scope(function, parameters, file="a.c", line=7, entry=True)


class Bench:
    """Registers and a memory: a file whose offsets are its addresses."""

    def __init__(self, path: Path) -> None:
        self.fd = os.open(path / "memory", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        self.words = [0] * len(REGISTERS)
        self.floats = bytearray(256)

    def set(self, **registers: int) -> None:
        for name, value in registers.items():
            self.words[REGISTERS.index(name)] = value

    def put(self, address: int, *values: int | bytes | float) -> int:
        """Writes words, bytes and doubles one after the other; returns the address."""
        data = b"".join(
            v if isinstance(v, bytes) else struct.pack("<d", v) if isinstance(v, float) else struct.pack("<q", v)
            for v in values
        )
        os.pwrite(self.fd, data, address)
        return address

    def close(self) -> None:
        os.close(self.fd)
