"""Types, from DWARF's entries: DWARF 5, chapter 5."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Literal

from trapline.errors import NoDebugInfo
from trapline_agent.debuginfo import dwarf as dw
from trapline_agent.debuginfo.libdw import Attribute, Die
from trapline_agent.debuginfo.model import Encoding, Member, Type, TypeRef

_ALIASES: Final = frozenset((dw.TAG_typedef, dw.TAG_template_alias))
_QUALIFIERS: Final = frozenset(
    (dw.TAG_const_type, dw.TAG_volatile_type, dw.TAG_restrict_type, dw.TAG_atomic_type, dw.TAG_immutable_type,
     dw.TAG_packed_type, dw.TAG_shared_type)
)  # fmt: skip
_Kind = Literal["struct", "class", "union"]
_RECORDS: Final[dict[int, _Kind]] = {
    dw.TAG_structure_type: "struct",
    dw.TAG_interface_type: "struct",
    dw.TAG_class_type: "class",
    dw.TAG_union_type: "union",
}
_ENCODINGS: Final[dict[int, Encoding]] = {
    0x01: "unsigned",  # address
    0x02: "bool",
    0x03: "complex",
    0x04: "float",
    0x05: "signed",
    0x06: "signed",  # signed char
    0x07: "unsigned",
    0x08: "unsigned",  # unsigned char
    0x10: "char",  # UTF
    0x11: "char",  # UCS
    0x12: "char",  # ASCII
}
_CHARACTERS: Final = frozenset(("char", "wchar_t", "char8_t", "char16_t", "char32_t"))
_MAX_CHAIN: Final = 64
_MAX_MEMBERS: Final = 20_000
_MAX_COUNT: Final = (1 << 32) - 1
_ARTIFICIAL: Final = "(discriminant)"


class TypeReader:
    """Reads types of one file."""

    def __init__(
        self,
        reference: Callable[[Die], TypeRef],
        qualified: Callable[[Die], str],
        definition: Callable[[Die], Die | None],
    ) -> None:
        """
        Args:
            reference: names an entry.
            qualified: an entry's name with its namespaces and classes.
            definition: finds the definition of what an entry only declares.
        """
        self._reference = reference
        self._qualified = qualified
        self._definition = definition

    def read(self, die: Die) -> Type:
        """Returns a type. Raises NoDebugInfo where its entries lead in a circle."""
        alias = ""
        for _ in range(_MAX_CHAIN):
            tag = die.tag
            if tag in _ALIASES:
                alias = alias or self._qualified(die)
            elif tag not in _QUALIFIERS and not (tag == dw.TAG_subrange_type and die.has(dw.AT_type, own=True)):
                return self._plain(die, tag, alias)
            following = die.reference(dw.AT_type)
            if following is None:
                return Type("void", "void", alias=alias)
            die = following
        raise NoDebugInfo("a type's entries lead in a circle")

    def _plain(self, die: Die, tag: int, alias: str) -> Type:
        size = die.number(dw.AT_byte_size) or 0
        if tag == dw.TAG_base_type:
            name = die.name()
            code = die.number(dw.AT_encoding) or 0
            encoding = "char" if name in _CHARACTERS else _ENCODINGS.get(code, "unsigned")
            return Type("base", name, size, alias, encoding)
        if tag in (dw.TAG_pointer_type, dw.TAG_reference_type, dw.TAG_rvalue_reference_type):
            kind: Literal["pointer", "reference"] = "pointer" if tag == dw.TAG_pointer_type else "reference"
            return Type(kind, die.name(), size or 8, alias, target=self._target(die))
        if tag in _RECORDS:
            return self._record(die, alias)
        if tag == dw.TAG_enumeration_type:
            return self._enumeration(die, size, alias)
        if tag == dw.TAG_array_type:
            return self._array(die, size, alias)
        if tag == dw.TAG_subroutine_type:
            return Type("function", die.name(), 0, alias, target=self._target(die))
        return Type("unknown", die.name(), size, alias)

    def _target(self, die: Die) -> TypeRef | None:
        target = die.reference(dw.AT_type)
        return None if target is None else self._reference(target)

    # --- structs, classes, unions

    def _record(self, die: Die, alias: str) -> Type:
        if die.flag(dw.AT_declaration) or die.has(dw.AT_signature, own=True):
            die = die.reference(dw.AT_signature, own=True) or self._definition(die) or die
        kind = _RECORDS.get(die.tag, "struct")
        name = self._qualified(die)
        size = die.number(dw.AT_byte_size) or 0
        members: list[Member] = []
        for child in die.children():
            tag = child.tag
            if tag == dw.TAG_variant_part:
                return self._variant(child, members, name, size, alias)
            if tag in (dw.TAG_member, dw.TAG_inheritance) and (member := self._member(child, tag)) is not None:
                members.append(member)
                if len(members) > _MAX_MEMBERS:
                    raise NoDebugInfo(f"the type {name} has more than {_MAX_MEMBERS} members")
        return Type(kind, name, size, alias, members=tuple(members))

    def _member(self, die: Die, tag: int) -> Member | None:
        """Returns a member; None for one that is not in each object, or at no fixed place (virtual bases)."""
        target = die.reference(dw.AT_type)
        if target is None or (tag == dw.TAG_member and (die.flag(dw.AT_external) or die.flag(dw.AT_declaration))):
            return None
        offset = self._member_offset(die)
        if offset is None:
            return None
        reference = self._reference(target)
        if tag == dw.TAG_inheritance:
            return Member(self.read(target).name, reference, offset, base=True)
        bits = die.number(dw.AT_bit_size) or 0
        if not bits:
            return Member(die.name(), reference, offset)
        storage = die.number(dw.AT_byte_size) or self.read(target).size or 1
        first = die.number(dw.AT_data_bit_offset)
        if first is None:  # DWARF 2 and 3 count from the highest bit of the storage
            first = offset * 8 + storage * 8 - (die.number(dw.AT_bit_offset) or 0) - bits
        word = first // 8 // storage * storage
        if first + bits > (word + storage) * 8:  # a packed struct
            word = first // 8
        return Member(die.name(), reference, word, first - word * 8, bits)

    def _member_offset(self, die: Die) -> int | None:
        attribute = die.attribute(dw.AT_data_member_location)
        if attribute is None:
            return 0
        constant = attribute.unsigned()
        if constant is not None:
            return constant
        steps = attribute.expression() or ()  # DWARF 2: the struct's address is on the stack
        return steps[0].number if len(steps) == 1 and steps[0].atom == dw.OP_plus_uconst else None

    def _variant(self, part: Die, members: list[Member], name: str, size: int, alias: str) -> Type:
        """Rust's enums: the first member is the discriminant where there is one, then each variant's content."""
        discriminant = part.reference(dw.AT_discr)
        if discriminant is not None and (member := self._member(discriminant, dw.TAG_member)) is not None:
            members.append(Member(_ARTIFICIAL, member.type, member.offset))
        values: list[tuple[str, int]] = []
        for variant in part.children():
            if variant.tag != dw.TAG_variant:
                continue
            for child in variant.children():
                if child.tag == dw.TAG_member and (member := self._member(child, dw.TAG_member)) is not None:
                    members.append(member)
                    value = variant.attribute(dw.AT_discr_value)
                    if value is not None:
                        values.append((member.name, _constant(value, 8, False)))
            if len(members) > _MAX_MEMBERS:
                raise NoDebugInfo(f"the type {name} has more than {_MAX_MEMBERS} variants")
        return Type("variant", name, size, alias, members=tuple(members), enumerators=tuple(values))

    # --- enums and arrays

    def _enumeration(self, die: Die, size: int, alias: str) -> Type:
        if die.flag(dw.AT_declaration) or die.has(dw.AT_signature, own=True):
            die = die.reference(dw.AT_signature, own=True) or self._definition(die) or die
            size = die.number(dw.AT_byte_size) or 0
        underlying = die.reference(dw.AT_type)
        base = self.read(underlying) if underlying is not None else None
        signed = base.encoding == "signed" if base else False
        values: list[tuple[str, int]] = []
        for child in die.children():
            attribute = child.attribute(dw.AT_const_value) if child.tag == dw.TAG_enumerator else None
            if attribute is None:
                continue
            value = _constant(attribute, size or (base.size if base else 8), signed)
            values.append((child.name(), value))
            if len(values) > _MAX_MEMBERS:
                raise NoDebugInfo(f"the enum {die.name()} has more than {_MAX_MEMBERS} values")
        negative = signed or any(value < 0 for _, value in values)
        return Type(
            "enum",
            self._qualified(die),
            size or (base.size if base else 0),
            alias,
            "signed" if negative else "unsigned",
            enumerators=tuple(values),
        )

    def _array(self, die: Die, size: int, alias: str) -> Type:
        counts = tuple(_count(child) for child in die.children() if child.tag in _DIMENSIONS)[:_MAX_CHAIN]
        target = die.reference(dw.AT_type)
        if not size and target is not None and counts:
            size = self.read(target).size
            for count in counts:
                size *= count
        return Type("array", die.name(), size, alias, target=self._target(die), counts=counts or (0,))


_DIMENSIONS: Final = frozenset((dw.TAG_subrange_type, dw.TAG_enumeration_type))


def _count(die: Die) -> int:
    """Returns how many a dimension has; 0 where that is not known when the program is made."""
    count = die.attribute(dw.AT_count)
    if count is not None:
        found = count.unsigned() or 0
    else:
        upper = die.attribute(dw.AT_upper_bound)
        last = upper.unsigned() if upper is not None and upper.form != dw.FORM_sdata else None
        found = 0 if last is None else max(last - (die.number(dw.AT_lower_bound) or 0) + 1, 0)
    return found if found < _MAX_COUNT else 0  # -1 in four or eight bytes: an array of no known length


def _constant(attribute: Attribute, size: int, signed: bool) -> int:
    """Returns a constant. What is negative has a signed form (GCC), or all bits of the type (others)."""
    if attribute.form in (dw.FORM_sdata, dw.FORM_implicit_const):
        return attribute.signed() or 0
    value = attribute.unsigned() or 0
    return value - (1 << 8 * size) if signed and size and value >> (8 * size - 1) else value
