"""ELF files: the same answers as readelf, nm and objdump give, and an error, soon, for what is malformed."""

from __future__ import annotations

import os
import re
import struct
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support import needs
from tests.support.children import run
from tests.unit.symbols.programs import BUILDS, VERSIONED, build, strip
from trapline.errors import ResolveError, Unsupported
from trapline_agent.symbols.elf import ElfFile
from trapline_agent.symbols.index import SymbolIndex

PYTHON = Path(os.path.realpath("/usr/bin/python3" if os.path.exists("/usr/bin/python3") else sys.executable))
"""The system's, which has the interpreter in itself; others may have it in a library."""


def libc() -> Path:
    """The libc of this process, as it is mapped."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        if re.search(r"/libc[.-][^/]*$", line) and " r-xp " in line:
            return Path(line[line.index("/") :])
    pytest.fail("this process maps no libc")


def index_of(path: Path) -> SymbolIndex:
    fd = os.open(path, os.O_RDONLY)
    try:
        return SymbolIndex(ElfFile(fd, str(path)))
    finally:
        os.close(fd)


def out(*argv: str | Path) -> str:
    result = run([*argv], env={"LC_ALL": "C"})
    assert result.returncode == 0, result.stderr
    return result.stdout


def executable_loads(path: Path) -> list[tuple[int, int, int]]:
    """(offset, vaddr, filesz) as readelf prints them."""
    rows = re.findall(r"^ +LOAD +(0x\w+) (0x\w+) 0x\w+ (0x\w+) 0x\w+ ([R ][W ][E ])", out("readelf", "-lW", path), re.M)
    return [(int(o, 16), int(v, 16), int(f, 16)) for o, v, f, flags in rows if "E" in flags]


def nm_code(path: Path, *flags: str) -> dict[tuple[str, int], str]:
    """(name, file offset) of the symbols in code -> nm's letter."""
    found = {}
    loads = executable_loads(path)
    for line in out("nm", "--defined-only", *flags, path).splitlines():
        value, letter, name = line.split(None, 2)
        for offset, vaddr, filesz in loads:
            if letter in "tTwWi" and vaddr <= int(value, 16) < vaddr + filesz:
                found[name.partition("@")[0], int(value, 16) - vaddr + offset] = letter
    return found


@needs.binutils
@pytest.mark.parametrize("which", ["libc", "python"])
def test_real_libraries_as_nm_reads_them(which: str) -> None:
    path = libc() if which == "libc" else PYTHON
    index = index_of(path)
    mine = {(s.name, s.offset) for s in index}
    assert set(nm_code(path, "-D")) <= mine
    assert len(mine) > 1000
    notes = out("readelf", "-n", path)
    assert index.build_id == re.search(r"Build ID: (\w+)", notes)[1]  # type: ignore[index]
    soname = re.search(r"Library soname: \[(.*)\]", out("readelf", "-dW", path))
    assert index.soname == (soname[1] if soname else "")
    assert [(s.offset, s.vaddr, s.filesz) for s in index.segments] == executable_loads(path)


@needs.gcc
@needs.binutils
@pytest.mark.parametrize("how", BUILDS)
def test_every_build(how: str, tmp_path: Path) -> None:
    path = build(tmp_path, *BUILDS[how])
    index = index_of(path)
    mine = {(s.name, s.offset) for s in index}
    theirs = nm_code(path)
    assert set(theirs) <= mine
    assert [(s.offset, s.vaddr, s.filesz) for s in index.segments] == executable_loads(path)
    assert not index.stripped
    for name in ("main", "visible", "hidden", "chosen", "asm_label"):
        assert len(index.find(name)) == 1, name
    assert index.find("chosen")[0].ifunc
    assert not index.find("visible")[0].ifunc
    assert index.find("hidden")[0].bind == "local"
    assert index.find("visible")[0].bind == "global"
    assert index.find("data_symbol") == []
    code = path.read_bytes()
    label = index.find("asm_label")[0]
    assert code[label.offset : label.offset + 11] == b"\x48\xb8" + struct.pack("<Q", 0x1122334455667788) + b"\xc3"
    assert label.size == 0
    assert (index.build_id == "") == (how == "no-build-id")


@needs.gcc
@pytest.mark.parametrize("how", BUILDS)
def test_slack_is_zero_unused_and_in_the_segments_last_page(how: str, tmp_path: Path) -> None:
    path = build(tmp_path, *BUILDS[how])
    code = path.read_bytes()
    for segment in index_of(path).segments:
        if segment.slack_len:
            assert segment.slack_offset == segment.end
            assert segment.slack_len < 4096
            assert (segment.slack_offset + segment.slack_len - 1) // 4096 == (segment.end - 1) // 4096
            assert not any(code[segment.slack_offset : segment.slack_offset + segment.slack_len])
    if how == "pie":
        assert any(s.slack_len > 1000 for s in index_of(path).segments)


@needs.gcc
@needs.binutils
def test_stripped_files_keep_dynamic_symbols(tmp_path: Path) -> None:
    exported = index_of(strip(build(tmp_path, "-rdynamic")))
    assert exported.stripped
    assert len(exported.find("visible")) == 1
    assert exported.find("hidden") == []
    missing = exported.not_found("hidden", "program")
    assert "stripped" in missing.detail
    assert f"{exported.dynamic_count} dynamic symbols" in missing.detail
    assert "0xOFFSET" in missing.hint
    plain = index_of(strip(build(tmp_path, name="plain")))
    assert plain.dynamic_count == len(plain) == 0
    assert "no symbols" in plain.not_found("main", "plain").detail


@needs.gcc
@needs.binutils
def test_section_headers_gone(tmp_path: Path) -> None:
    path = build(tmp_path)
    data = bytearray(path.read_bytes())
    data[40:48] = bytes(8)  # e_shoff
    data[60:64] = bytes(4)  # e_shnum, e_shstrndx
    path.write_bytes(data)
    index = index_of(path)
    assert len(index) == 0
    assert index.segments
    assert index.build_id


@needs.gcc
@needs.binutils
def test_versions_choose_between_functions_of_one_name(tmp_path: Path) -> None:
    (tmp_path / "versions").write_text("V1 { global: f; };\nV2 { global: f; } V1;\n")
    flags = ("-shared", "-fPIC", f"-Wl,--version-script={tmp_path / 'versions'}", "-Wl,-soname,libv.so.2")
    path = build(tmp_path, *flags, name="libv.so", source=VERSIONED)
    for index in (index_of(path), index_of(strip(path))):
        assert index.soname == "libv.so.2"
        (old,), (new,), (plain,) = index.find("f@V1"), index.find("f@@V2"), index.find("f")
        assert plain.offset == new.offset != old.offset
        assert index.find("f@V2") == [new]
        assert index.find("f@V3") == []
        assert [s.offset for s in index.glob("f")] == [new.offset]


@needs.gcc
def test_ends_and_names_of_offsets(tmp_path: Path) -> None:
    index = index_of(build(tmp_path))
    (visible,), (label,) = index.find("visible"), index.find("asm_label")
    assert index.end_of(visible) == visible.offset + visible.size
    assert index.end_of(label) >= label.offset + 11
    at = index.at(visible.offset + visible.size - 1)
    assert at is not None
    assert at.name == "visible"
    assert index.at(0) is None


@needs.gcc
def test_what_it_is_not(tmp_path: Path) -> None:
    source = tmp_path / "x.c"
    source.write_text("int f(void) { return 1; }")
    assert run(["gcc", "-c", source, "-o", tmp_path / "x.o"]).returncode == 0
    with pytest.raises(ResolveError, match="object file"):
        index_of(tmp_path / "x.o")
    with pytest.raises(ResolveError, match="not an ELF file"):
        index_of(source)
    program = bytearray(build(tmp_path).read_bytes())
    for name, at, value in (("AArch64", 18, 183), ("i386", 18, 3)):
        other = bytearray(program)
        other[at] = value
        (tmp_path / "other").write_bytes(other)
        with pytest.raises(Unsupported, match=name) as e:
            index_of(tmp_path / "other")
        assert e.value.reason == "Architecture"
    program[4] = 1  # ELFCLASS32, still EM_X86_64
    (tmp_path / "other").write_bytes(program)
    with pytest.raises(Unsupported, match="x32"):
        index_of(tmp_path / "other")


# --- malformed


@contextmanager
def as_file(data: bytes) -> Iterator[int]:
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.flush()
        yield file.fileno()


def _reads_or_refuses(data: bytes) -> None:
    with as_file(data) as fd:
        try:
            index = SymbolIndex(ElfFile(fd, "x"))
        except (ResolveError, Unsupported):
            return
    for segment in index.segments:
        assert segment.end <= len(data)
    for symbol in list(index)[:50]:
        assert index.segment_at(symbol.offset)
        assert index.find(symbol.name)
        index.end_of(symbol)


@given(st.binary(max_size=300))
def test_random_bytes(data: bytes) -> None:
    _reads_or_refuses(data)
    _reads_or_refuses(b"\x7fELF\x02\x01\x01" + data)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    directory = tmp_path_factory.mktemp("small")
    (directory / "versions").write_text("V1 { global: f; };\nV2 { global: f; } V1;\n")
    flags = ("-shared", "-fPIC", "-nostdlib", f"-Wl,--version-script={directory / 'versions'}", "-Wl,-soname,libv.so.2")
    return build(directory, *flags, name="libv.so", source=VERSIONED).read_bytes()


_VALUES = st.one_of(
    st.sampled_from([0, 1, 2, 0x7FFF, 0xFFFF, 0x7FFF_FFFF, 0xFFFF_FFFF, 2**63 - 1, 2**63, 2**64 - 1, 2**64 - 8, 4096]),
    st.integers(0, 2**64 - 1),
    st.integers(0, 20000),
)


@needs.gcc
@settings(max_examples=600, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=5000)
@given(data=st.data())
def test_mutated_headers(small: bytes, data: st.DataObject) -> None:
    image = bytearray(small)
    shoff = struct.unpack_from("<Q", small, 40)[0]
    sections = struct.unpack_from("<H", small, 60)[0]
    for _ in range(data.draw(st.integers(1, 4))):
        where = data.draw(st.sampled_from(["ehdr", "phdr", "shdr", "anywhere", "table"]))
        size = data.draw(st.sampled_from([1, 2, 4, 8]))
        if where == "ehdr":
            at = data.draw(st.integers(16, 63))
        elif where == "phdr":
            at = 64 + 4 * data.draw(st.integers(0, 14 * 8))
        elif where == "shdr":
            at = shoff + 4 * data.draw(st.integers(0, sections * 16 - 1))
        elif where == "table":  # inside a symbol table, notes, versions, ...
            row = struct.unpack_from("<IIQQQQ", small, shoff + 64 * data.draw(st.integers(1, sections - 1)))
            at = min(row[4] + data.draw(st.integers(0, max(row[5] - 1, 0))), len(small) - 9)
        else:
            at = data.draw(st.integers(0, len(small) - 9))
        at = min(at, len(small) - size)
        image[at : at + size] = (data.draw(_VALUES) & (1 << 8 * size) - 1).to_bytes(size, "little")
    _reads_or_refuses(bytes(image))


@needs.gcc
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_cut_files(small: bytes, data: st.DataObject) -> None:
    _reads_or_refuses(small[: data.draw(st.integers(0, len(small)))])


@needs.gcc
def test_huge_counts_are_refused_without_memory(small: bytes) -> None:
    image = bytearray(small)
    shoff = struct.unpack_from("<Q", small, 40)[0]
    for i in range(struct.unpack_from("<H", small, 60)[0]):
        struct.pack_into("<Q", image, shoff + 64 * i + 32, 1 << 42)  # sh_size
    with as_file(image) as fd:
        os.ftruncate(fd, 1 << 43)  # sparse: the sizes fit the file
        with pytest.raises(ResolveError):
            SymbolIndex(ElfFile(fd, "x"))


@needs.gcc
def test_large_empty_tables_are_refused_soon(small: bytes) -> None:
    image = bytearray(small)
    shoff = struct.unpack_from("<Q", small, 40)[0]
    for i in range(struct.unpack_from("<H", small, 60)[0]):
        if struct.unpack_from("<I", small, shoff + 64 * i + 4)[0] == 3:  # SHT_STRTAB
            struct.pack_into("<Q", image, shoff + 64 * i + 32, 200 << 20)
    with as_file(image) as fd:
        os.ftruncate(fd, 1 << 30)
        with pytest.raises(ResolveError, match="names are empty"):
            SymbolIndex(ElfFile(fd, "x"))
