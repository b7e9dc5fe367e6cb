"""Symbols from elsewhere: a debug file by build-id, .gnu_debugdata, Go's own table; real ones, and broken ones."""

from __future__ import annotations

import lzma
import os
import struct
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support import needs
from tests.support.children import run
from tests.unit.symbols.programs import build, strip
from tests.unit.symbols.test_elf import index_of, nm_code, out
from trapline.errors import ResolveError
from trapline_agent.symbols import gopclntab, separate
from trapline_agent.symbols.elf import ElfFile
from trapline_agent.symbols.index import IndexCache, SymbolIndex

_QUICK = settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=5000)


def cached(path: Path) -> SymbolIndex:
    fd = os.open(path, os.O_RDONLY)
    try:
        return IndexCache().get(fd, str(path))
    finally:
        os.close(fd)


def functions(index: SymbolIndex) -> set[tuple[str, int]]:
    return {(s.name, s.offset) for s in index}


# --- debug files


@needs.gcc
@needs.binutils
@pytest.mark.parametrize("flags", [(), ("-no-pie",), ("-Wl,-z,noseparate-code",)])
def test_a_stripped_program_has_the_names_of_its_debug_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...]
) -> None:
    monkeypatch.setattr(separate, "DEBUG_DIRECTORY", tmp_path / "build-id")
    path = build(tmp_path, *flags)
    stripped = strip(path)
    assert len(cached(stripped).find("hidden")) == 0
    build_id = cached(path).build_id
    debug = tmp_path / "build-id" / build_id[:2] / f"{build_id[2:]}.debug"
    debug.parent.mkdir(parents=True)
    out("objcopy", "--only-keep-debug", path, debug)
    index = cached(stripped)
    assert index.source == "debug file"
    assert index.stripped
    assert set(nm_code(path)) <= functions(index)
    assert index.find("hidden")[0].offset == cached(path).find("hidden")[0].offset
    assert "stripped" not in index.not_found("hiden", "program").detail
    # One of another build is not believed, and a broken one does no harm.
    out("objcopy", "--only-keep-debug", build(tmp_path, *flags, "-O2", name="other"), debug)
    assert cached(stripped).source == ""
    debug.write_bytes(b"\x7fELF" + bytes(100))
    assert cached(stripped).source == ""
    debug.unlink()
    os.mkfifo(debug)
    assert cached(stripped).source == ""


@needs.binutils
def test_build_ids_that_are_no_paths() -> None:
    assert separate.debug_path("") is None
    assert separate.debug_path("../../etc/passwd") is None
    assert separate.debug_path("ab/../cdef") is None


# --- .gnu_debugdata


def with_debugdata(path: Path, data: bytes) -> Path:
    section, output = path.with_name("section"), path.with_name(f"{path.name}-mini")
    section.write_bytes(data)
    out("objcopy", "--add-section", f".gnu_debugdata={section}", path, output)
    return output


@needs.gcc
@needs.binutils
def test_minidebuginfo_as_fedora_makes_it(tmp_path: Path) -> None:
    path = build(tmp_path, "-rdynamic")
    mini = tmp_path / "mini"
    out("objcopy", "-S", "--remove-section", ".comment", "--keep-symbol=hidden", "--keep-symbol=chosen_one", path, mini)
    index = index_of(with_debugdata(strip(path), lzma.compress(mini.read_bytes())))
    assert index.source == "minidebuginfo"
    for name in ("hidden", "chosen_one", "visible"):
        assert index.find(name)[0].offset == index_of(path).find(name)[0].offset


def test_what_unpacks_to_too_much_or_is_broken_is_refused_soon() -> None:
    bomb = lzma.compress(bytes(separate.MAX_DEBUGDATA + 1))
    assert len(bomb) < 100_000
    began = time.process_time()
    for data in (bomb, bomb[:-20], b"", b"\xfd7zXZ", lzma.compress(b"x" * 1000)[:-5]):
        with pytest.raises(ResolveError):
            separate.unpack(data)
    assert time.process_time() - began < 5
    assert separate.unpack(lzma.compress(b"x" * 1000)) == b"x" * 1000


@_QUICK
@given(st.data())
def test_mutated_xz(data: st.DataObject) -> None:
    packed = bytearray(lzma.compress(b"some names" * 50))
    for _ in range(data.draw(st.integers(1, 3))):
        packed[data.draw(st.integers(0, len(packed) - 1))] = data.draw(st.integers(0, 255))
    try:
        separate.unpack(bytes(packed[: data.draw(st.integers(0, len(packed)))]))
    except ResolveError:
        pass


@needs.gcc
@needs.binutils
def test_broken_debugdata_leaves_the_other_symbols(tmp_path: Path) -> None:
    stripped = strip(build(tmp_path, "-rdynamic"))
    for data in (b"no xz", lzma.compress(b"no ELF"), lzma.compress(b"\x7fELF" + bytes(80))):
        index = index_of(with_debugdata(stripped, data))
        assert index.source == ""
        assert len(index.find("visible")) == 1


# --- Go


GO = """package main
import "fmt"
type Counter struct{ n int }
//go:noinline
func (c *Counter) Add(by int) int { c.n += by; return c.n }
//go:noinline
func plain(a int) int { return a * 3 }
func main() { c := &Counter{}; fmt.Println(c.Add(2), plain(4)) }
"""


@needs.go
@needs.binutils
@pytest.mark.parametrize("mode", ["exe", "pie"])
def test_a_stripped_go_program_has_its_functions(tmp_path: Path, mode: str) -> None:
    (tmp_path / "main.go").write_text(GO)
    env = {"GOCACHE": str(tmp_path / "cache"), "GO111MODULE": "off", "GOFLAGS": "", "HOME": str(tmp_path)}
    paths = []
    for name, flags in (("full", ""), ("stripped", "-s -w")):
        paths.append(tmp_path / name)
        done = run(
            ["go", "build", f"-buildmode={mode}", "-ldflags", flags, "-o", paths[-1], tmp_path / "main.go"],
            env=env,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
    full, stripped = index_of(paths[0]), index_of(paths[1])
    assert (full.source, stripped.source) == ("symtab", "gopclntab")
    assert full.is_go
    assert stripped.is_go
    for name in ("main.main", "main.(*Counter).Add", "main.plain", "runtime.gopanic", "fmt.Fprintln"):
        assert address(full, name) == address(stripped, name), name
    named = {
        s.name.removesuffix(".abi0") for s in full if s.type == 2 and s.name.startswith(("runtime.", "main.", "fmt."))
    }
    # Stubs between the two conventions of calls have names in the symbol table alone.
    assert len(named & {s.name for s in stripped}) > 0.9 * len(named)


def address(index: SymbolIndex, name: str) -> int:
    """The virtual address of a function."""
    (symbol,) = index.find(name)
    segment = index.segment_at(symbol.offset)
    assert segment is not None
    return symbol.offset - segment.offset + segment.vaddr


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("go"))


def table(layout: str, text: int, names: list[str]) -> bytes:
    """A .gopclntab with functions of 16 bytes from ``text`` on: runtime/symtab.go."""
    strings = b"".join(n.encode() + b"\0" for n in names)
    wide = layout in ("1.2", "1.16")
    word, size = ("Q", 8) if wide else ("I", 4)
    head = {"1.2": 16, "1.16": 64, "1.18": 72, "1.20": 72}[layout]
    names_at = {"1.2": 0}.get(layout, head)
    first = head if layout == "1.2" else head + len(strings) + (-len(strings) % 8)
    records = size * (2 * len(names) + 1)
    base = 0 if layout == "1.2" else first
    strings_at = first + records + len(names) * 16 if layout == "1.2" else names_at
    rows, bodies, at = b"", b"", 0
    for i, name in enumerate(names):
        pc = text + 16 * i if wide else 16 * i
        rows += struct.pack(f"<2{word}", pc, first - base + records + 16 * i)
        bodies += struct.pack(f"<{word}i", pc, at + (strings_at if layout == "1.2" else 0)).ljust(16, b"\0")
        at += len(name.encode()) + 1
    rows += struct.pack(f"<{word}", text + 16 * len(names) if wide else 16 * len(names))
    magic = {"1.2": 0xFFFFFFFB, "1.16": 0xFFFFFFFA, "1.18": 0xFFFFFFF0, "1.20": 0xFFFFFFF1}[layout]
    start = struct.pack("<IHBB", magic, 0, 1, 8)
    if layout == "1.2":
        return start + struct.pack("<Q", len(names)) + rows + bodies + strings
    if layout == "1.16":
        start += struct.pack("<7Q", len(names), 0, names_at, 0, 0, 0, first)
    else:
        start += struct.pack("<8Q", len(names), 0, text, names_at, 0, 0, 0, first)
    return start.ljust(head, b"\0") + strings.ljust(first - head, b"\0") + rows + bodies


@needs.gcc
@pytest.mark.parametrize("layout", ["1.2", "1.16", "1.18", "1.20"])
def test_every_layout_of_gopclntab(program: Path, layout: str) -> None:
    with program.open("rb") as file:
        elf = ElfFile(file.fileno(), str(program))
        text = elf.section_address(".text") or 0
        names = ["runtime.gopanic", "main.main", "main.(*T).Näme"]
        found = gopclntab._functions(elf, table(layout, text, names), 0)
        assert found is not None
        assert found.names[:] == names
        first = elf.file_offset(text) or 0
        assert found.offsets.tolist() == [first, first + 16, first + 32]
        assert found.sizes.tolist() == [16, 16, 16]


@needs.gcc
@_QUICK
@given(data=st.data(), layout=st.sampled_from(["1.2", "1.16", "1.18", "1.20"]))
def test_mutated_gopclntab(program: Path, data: st.DataObject, layout: str) -> None:
    with program.open("rb") as file:
        elf = ElfFile(file.fileno(), str(program))
        image = bytearray(table(layout, elf.section_address(".text") or 0, ["runtime.gopanic", "main.main", "x"]))
        for _ in range(data.draw(st.integers(1, 4))):
            size = data.draw(st.sampled_from([1, 4, 8]))
            at = data.draw(st.integers(0, len(image) - size))
            value = data.draw(
                st.sampled_from([0, 1, 2**31 - 1, 2**32 - 1, 2**63, 2**64 - 1]) | st.integers(0, 2**64 - 1)
            )
            image[at : at + size] = (value & (1 << 8 * size) - 1).to_bytes(size, "little")
        cut = bytes(image[: data.draw(st.integers(0, len(image)))])
        elf.section = lambda name, limit=0: (cut, 0) if name == ".gopclntab" else None  # type: ignore[method-assign]
        found = gopclntab.functions(elf)
        if found is not None:
            assert all(elf.segment_at(o) for o in found.offsets.tolist())
