"""DWARF's numbers, as far as they are used: DWARF 5, section 7.5; names as there, without ``DW_``."""

from __future__ import annotations

from typing import Final

TAG_array_type: Final = 0x01
TAG_class_type: Final = 0x02
TAG_enumeration_type: Final = 0x04
TAG_formal_parameter: Final = 0x05
TAG_lexical_block: Final = 0x0B
TAG_member: Final = 0x0D
TAG_pointer_type: Final = 0x0F
TAG_reference_type: Final = 0x10
TAG_compile_unit: Final = 0x11
TAG_structure_type: Final = 0x13
TAG_subroutine_type: Final = 0x15
TAG_typedef: Final = 0x16
TAG_union_type: Final = 0x17
TAG_unspecified_parameters: Final = 0x18
TAG_variant: Final = 0x19
TAG_inheritance: Final = 0x1C
TAG_inlined_subroutine: Final = 0x1D
TAG_module: Final = 0x1E
TAG_subrange_type: Final = 0x21
TAG_catch_block: Final = 0x25
TAG_base_type: Final = 0x24
TAG_const_type: Final = 0x26
TAG_enumerator: Final = 0x28
TAG_packed_type: Final = 0x2D
TAG_subprogram: Final = 0x2E
TAG_try_block: Final = 0x32
TAG_variant_part: Final = 0x33
TAG_variable: Final = 0x34
TAG_volatile_type: Final = 0x35
TAG_restrict_type: Final = 0x37
TAG_interface_type: Final = 0x38
TAG_namespace: Final = 0x39
TAG_shared_type: Final = 0x40
TAG_rvalue_reference_type: Final = 0x42
TAG_template_alias: Final = 0x43
TAG_atomic_type: Final = 0x47
TAG_immutable_type: Final = 0x4B
TAG_skeleton_unit: Final = 0x4A

AT_location: Final = 0x02
AT_byte_size: Final = 0x0B
AT_bit_offset: Final = 0x0C
AT_bit_size: Final = 0x0D
AT_stmt_list: Final = 0x10
AT_language: Final = 0x13
AT_discr: Final = 0x15
AT_discr_value: Final = 0x16
AT_comp_dir: Final = 0x1B
AT_const_value: Final = 0x1C
AT_inline: Final = 0x20
AT_lower_bound: Final = 0x22
AT_upper_bound: Final = 0x2F
AT_abstract_origin: Final = 0x31
AT_artificial: Final = 0x34
AT_calling_convention: Final = 0x36
AT_count: Final = 0x37
AT_data_member_location: Final = 0x38
AT_decl_file: Final = 0x3A
AT_decl_line: Final = 0x3B
AT_declaration: Final = 0x3C
AT_encoding: Final = 0x3E
AT_external: Final = 0x3F
AT_frame_base: Final = 0x40
AT_specification: Final = 0x47
AT_type: Final = 0x49
AT_variable_parameter: Final = 0x4B
AT_signature: Final = 0x69
AT_data_bit_offset: Final = 0x6B
AT_linkage_name: Final = 0x6E
AT_str_offsets_base: Final = 0x72
AT_dwo_name: Final = 0x76
AT_MIPS_linkage_name: Final = 0x2007
AT_GNU_dwo_name: Final = 0x2130

FORM_sdata: Final = 0x0D
FORM_implicit_const: Final = 0x21
OP_plus_uconst: Final = 0x23
LANG_assembler: Final = 0x8001
CC_nocall: Final = 0x03
LANGUAGES: Final = {
    **dict.fromkeys((0x01, 0x02, 0x0C, 0x1D, 0x2C, 0x3E), "c"),
    **dict.fromkeys((0x04, 0x1A, 0x21, 0x2B, 0x3A), "c++"),
    0x16: "go",
    0x1C: "rust",
}
"""DW_LANG_*, of all releases of the languages."""
