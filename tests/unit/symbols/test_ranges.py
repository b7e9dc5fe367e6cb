"""Where functions are by the unwind table: as readelf has it, and nothing of what is malformed."""

from __future__ import annotations

import os
import re
import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support import needs
from tests.support.children import run
from tests.unit.symbols.programs import build, strip
from tests.unit.symbols.test_elf import PYTHON, as_file, index_of, libc
from trapline_agent.symbols.elf import ElfFile
from trapline_agent.symbols.ranges import FunctionRanges, Range

COLD = """
#include <stdlib.h>
__attribute__((cold, noinline)) void bad(int a) { exit(a); }
__attribute__((noinline)) int step(int a) { __asm__ volatile(""); return a + 1; }
__attribute__((noinline)) int work(int *p, int n) {
    int sum = 0;
    for (int i = 0; i < n; i++) { if (__builtin_expect(p[i] < 0, 0)) { bad(p[i]); abort(); } sum += step(p[i]) * i; }
    return sum;
}
int main(int argc, char **argv) { int a[] = {1, 2, argc}; return work(a, 3); }
"""


def descriptions(path: Path) -> list[tuple[int, int]]:
    """(begin, end) of the frame descriptions in .eh_frame, virtual addresses, as readelf has them."""
    # A debug file beside it has sections of the same names without bytes, of which readelf complains.
    text = run(["readelf", "--wide", "--debug-dump=frames", path], env={"LC_ALL": "C"}).stdout
    text = text.partition("Contents of the .debug_frame")[0]
    return sorted((int(a, 16), int(b, 16)) for a, b in re.findall(r" FDE .*pc=([0-9a-f]+)\.\.([0-9a-f]+)", text))


@needs.binutils
@pytest.mark.parametrize("which", ["libc", "python"])
def test_real_libraries_as_readelf_reads_them(which: str) -> None:
    path = libc() if which == "libc" else PYTHON
    index = index_of(path)
    theirs = descriptions(path)
    assert len(theirs) > 1000
    fd = os.open(path, os.O_RDONLY)
    try:
        elf = ElfFile(fd, str(path))
        ranges = FunctionRanges(elf)
        assert len(ranges) == len(theirs)
        for begin, end in [*theirs[::37], *theirs[:50]]:
            start, last = elf.file_offset(begin), elf.file_offset(end - 1)
            assert start is not None
            assert last is not None
            for place in (start, (start + last) // 2, last):
                found = ranges.at(elf, place)
                assert found is not None
                assert (found.start, found.end) == (start, last + 1)
            if not any(b <= end < e for b, e in theirs):
                assert ranges.at(elf, last + 1) is None
        functions = [s for s in list(index)[::31] if s.type == 2 and s.size > 16]
        known = [r for s in functions if (r := ranges.at(elf, s.offset)) is not None and r.start == s.offset]
        assert len(known) > 0.8 * len(functions)
        assert sum(r.function for r in known) > 0.97 * len(known)
    finally:
        os.close(fd)


@needs.gcc
@needs.binutils
def test_what_the_compiler_put_elsewhere_is_no_function(tmp_path: Path) -> None:
    path = build(tmp_path, "-O2", source=COLD)
    (cold,) = index_of(path).find("work.cold")
    (work,) = index_of(path).find("work")
    with strip(path).open("rb") as file:
        elf = ElfFile(file.fileno(), "x")
        ranges = FunctionRanges(elf)
        assert ranges.at(elf, work.offset) == Range(work.offset, work.offset + work.size, True)
        part = ranges.at(elf, cold.offset)
        assert part is not None
        assert part.start == cold.offset
        assert not part.function


@needs.gcc
def test_without_a_table_nothing_is_known(tmp_path: Path) -> None:
    flags = ("-nostdlib", "-shared", "-fPIC", "-fno-asynchronous-unwind-tables", "-Wl,--no-eh-frame-hdr")
    path = build(tmp_path, *flags, source="int f(void) { return 1; }")
    with path.open("rb") as file:
        elf = ElfFile(file.fileno(), "x")
        assert len(FunctionRanges(elf)) == 0
        assert FunctionRanges(elf).at(elf, elf.segments[0].offset) is None


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    flags = ("-shared", "-fPIC", "-nostdlib", "-O1")
    return build(
        tmp_path_factory.mktemp("small"), *flags, source="int f(int a) { return a; } int g(void) { return 2; }"
    ).read_bytes()


@needs.gcc
@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=5000)
@given(data=st.data())
def test_mutated_tables(small: bytes, data: st.DataObject) -> None:
    image = bytearray(small)
    with as_file(small) as fd:
        elf = ElfFile(fd, "x")
        header, _ = elf.eh_frame_hdr() or (b"", 0)
    at = small.index(header)
    for _ in range(data.draw(st.integers(1, 4))):
        size = data.draw(st.sampled_from([1, 4]))
        place = at + data.draw(st.integers(0, len(header) + 60))
        value = data.draw(st.sampled_from([0, 1, 0xFF, 2**31 - 1, 2**31, 2**32 - 1]) | st.integers(0, 2**32 - 1))
        image[place : place + size] = struct.pack("<I", value)[:size]
    with as_file(bytes(image)) as fd:
        elf = ElfFile(fd, "x")
        ranges = FunctionRanges(elf)
        for segment in elf.segments:
            for offset in range(segment.offset, segment.end, 3):
                found = ranges.at(elf, offset)
                if found is not None:
                    assert segment.offset <= found.start <= offset < found.end <= segment.end
