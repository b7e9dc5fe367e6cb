"""Probes that a program's author put into it (USDT): .note.stapsdt.

Layout: SystemTap's sys/sdt.h and https://sourceware.org/systemtap/wiki/UserSpaceProbeImplementation.
"""

from __future__ import annotations

import re
import struct
from fnmatch import fnmatchcase

import msgspec

from trapline.errors import ResolveError
from trapline_agent.debuginfo.model import Location, Op
from trapline_agent.symbols.elf import ElfFile

_TYPE = 3
_OWNER = b"stapsdt\0"
_MAX_PROBES = 100_000
_MAX_BYTES = 16 << 20
_MAX_TEXT = 4096
_MAX_ARGUMENTS = 12
"""sys/sdt.h has STAP_PROBE12 at most."""
_WORD = 1 << 64

_FAMILIES = ("ax", "dx", "cx", "bx", "si", "di", "bp", "sp")
"""By DWARF's numbers, System V ABI, figure 3.36."""
_NUMBERED = re.compile(r"r(\d{1,2})([dwb]?)", re.ASCII)
_ARGUMENT = re.compile(r"(?:(?P<size>-?[1248])f?@)?(?P<where>\S+)")
_MEMORY = re.compile(
    r"(?P<offset>[-+]?(?:0x[0-9a-fA-F]+|\d+)(?:[-+]\d+)*)?"
    r"\((?P<base>%\w+)?(?:,(?P<index>%\w+)(?:,(?P<scale>[1248]))?)?\)",
    re.ASCII,
)
_NUMBER = re.compile(r"[-+]?(?:0[xX][0-9a-fA-F]+|\d+)", re.ASCII)


class Argument(msgspec.Struct, frozen=True):
    """One argument of a USDT probe."""

    location: Location
    size: int = 8
    """Bytes: 1, 2, 4 or 8."""
    signed: bool = False
    floating: bool = False


class UsdtProbe(msgspec.Struct, frozen=True):
    """One place of a USDT probe."""

    provider: str
    name: str
    offset: int
    """File offset of its instruction, a nop."""
    semaphore: int = 0
    """Virtual address of the counter that says whether anybody probes it; 0: it has none."""
    arguments: str = ""
    """As the file has them, such as ``8@%rdi -4@-20(%rbp)``."""

    def is_meant(self, text: str, glob: bool = False) -> bool:
        """Whether ``provider:name``, or the name alone, means it."""
        names = (f"{self.provider}:{self.name}", self.name)
        return any(fnmatchcase(n, text) for n in names) if glob else text in names


def probes(elf: ElfFile) -> list[UsdtProbe]:
    """Returns the USDT probes of a file, by offset. Raises ResolveError where what says so is malformed."""
    found = elf.section(".note.stapsdt", _MAX_BYTES)
    if found is None:
        return []
    data, _ = found
    base = elf.section_address(".stapsdt.base") or 0
    out: list[UsdtProbe] = []
    at = 0
    while at + 12 <= len(data) and len(out) < _MAX_PROBES:
        namesz, descsz, kind = struct.unpack_from("<III", data, at)
        desc = at + 12 + namesz + (-namesz % 4)
        end = desc + descsz
        if end > len(data):
            raise ResolveError(f"{elf.path} is malformed: its USDT probes are cut off", reason="MalformedElf")
        if kind == _TYPE and data[at + 12 : at + 12 + namesz] == _OWNER and descsz >= 27:
            location, was, semaphore = struct.unpack_from("<QQQ", data, desc)
            # prelink moves sections and does not know of this one: the difference of the base tells by how much.
            shift = base - was if base and was else 0
            offset = elf.file_offset((location + shift) % _WORD)
            texts = data[desc + 24 : end].split(b"\0")[:3]
            if offset is not None and len(texts) == 3 and all(len(t) <= _MAX_TEXT for t in texts):
                provider, name, arguments = (t.decode("utf-8", "backslashreplace") for t in texts)
                counter = (semaphore + shift) % _WORD if semaphore else 0
                out.append(UsdtProbe(provider, name, offset, counter, arguments))
        at = end + (-descsz % 4)
    return sorted(out, key=lambda p: p.offset)


def parse_arguments(text: str) -> tuple[Argument, ...]:
    """Returns where a USDT probe's arguments are; one that cannot be read is ``unsupported``, with the reason."""
    return tuple(_argument(part) for part in text.split()[:_MAX_ARGUMENTS])


def _argument(text: str) -> Argument:
    found = _ARGUMENT.fullmatch(text)
    if found is None:
        return Argument(_unsupported(text))
    size = int(found["size"] or "8")
    floating = found["size"] is not None and text.startswith(f"{found['size']}f@")
    return Argument(_location(found["where"]) or _unsupported(text), abs(size), size < 0, floating)


def _unsupported(text: str) -> Location:
    return Location("unsupported", reason=f"the argument `{text[:100]}` of a USDT probe cannot be read")


def _location(text: str) -> Location | None:
    if text.startswith("$"):
        value = _number(text[1:]) if _NUMBER.fullmatch(text[1:]) else None
        return Location("value", (("const", value),)) if value is not None else None
    if text.startswith("%"):
        register = _register(text)
        if register is None:
            return None
        number, shift = register
        if shift:  # %ah: the second byte of a word
            return Location("value", (("reg", number), ("const", shift), ("shr", 0)))
        return Location("register", (("reg", number),))
    memory = _MEMORY.fullmatch(text)
    if memory is None or not (memory["base"] or memory["index"]):
        return None
    terms = [_number(n) for n in _NUMBER.findall(memory["offset"] or "0")]
    offset = sum(n or 0 for n in terms)
    if None in terms or abs(offset) >= _WORD // 2:
        return None
    ops: list[Op] = []
    if memory["base"] == "%rip" and not memory["index"]:
        return None  # relative to the instruction behind the probe; no compiler writes that
    for name, scale in ((memory["base"], "1"), (memory["index"], memory["scale"] or "1")):
        if not name:
            continue
        register = _register(name)
        if register is None or register[1] or not _is_whole(name):
            return None
        ops += [("reg", register[0])]
        if scale != "1":
            ops += [("const", int(scale)), ("mul", 0)]
        if len(ops) > 1 and name == memory["index"] and memory["base"]:
            ops += [("add", 0)]
    if offset:
        ops += [("plus", offset)]
    return Location("memory", tuple(ops))


def _number(text: str) -> int | None:
    """Returns a number as the assembler writes it, with a leading 0 in octal; None where it is none, or not of 64 bits."""
    digits = text.lstrip("+-")
    try:
        value = int(digits, 8 if len(digits) > 1 and digits[0] == "0" and digits[1] not in "xX" else 0)
    except ValueError:
        return None
    value = -value if text.startswith("-") else value
    return value if -_WORD // 2 <= value < _WORD else None


def _is_whole(name: str) -> bool:
    return name.startswith("%r") and name[-1] not in "dwb"


def _register(text: str) -> tuple[int, int] | None:
    """Returns DWARF's number of a general register and by how many bits its part is shifted, or None."""
    name = text.removeprefix("%")
    if found := _NUMBERED.fullmatch(name):
        return (int(found[1]), 0) if 8 <= int(found[1]) <= 15 else None
    if len(name) == 2 and name[1] in "lh" and f"{name[0]}x" in _FAMILIES:
        return _FAMILIES.index(f"{name[0]}x"), 8 if name[1] == "h" else 0
    for prefix in ("r", "e", ""):
        family = name.removeprefix(prefix)
        if name.startswith(prefix) and family in _FAMILIES:
            return _FAMILIES.index(family), 0
    if name.endswith("l") and name[:-1] in _FAMILIES[4:]:
        return _FAMILIES.index(name[:-1]), 0
    return None
