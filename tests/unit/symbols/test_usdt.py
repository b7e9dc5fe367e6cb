"""USDT probes: as readelf reads their notes; arguments as the compiler meant them."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support import needs
from tests.unit.symbols.programs import build
from tests.unit.symbols.test_elf import executable_loads, out
from trapline.errors import ResolveError
from trapline_agent.debuginfo.model import Location
from trapline_agent.symbols.elf import ElfFile
from trapline_agent.symbols.usdt import Argument, parse_arguments, probes

USDT = r"""
#include <stdio.h>
/* What SystemTap's sys/sdt.h makes of STAP_PROBE2(shop, NAME, a, b). */
#define NOTE(NAME, SEMAPHORE, A, B) __asm__ volatile( \
    "990: nop\n.pushsection .note.stapsdt,\"?\",\"note\"\n.balign 4\n.4byte 992f-991f, 994f-993f, 3\n" \
    "991: .asciz \"stapsdt\"\n992: .balign 4\n993: .8byte 990b\n.8byte _.stapsdt.base\n.8byte " SEMAPHORE "\n" \
    ".asciz \"shop\"\n.asciz \"" NAME "\"\n.asciz \"-4@%0 8@%1\"\n994: .balign 4\n.popsection\n" \
    ".ifndef _.stapsdt.base\n.pushsection .stapsdt.base,\"aG\",\"progbits\",.stapsdt.base,comdat\n.weak _.stapsdt.base\n" \
    ".hidden _.stapsdt.base\n_.stapsdt.base: .space 1\n.size _.stapsdt.base, 1\n.popsection\n.endif\n" \
    : : "nor"(A), "nor"((long)(B)))
unsigned short counter __attribute__((section(".probes"), used));
__attribute__((noinline)) int sell(int item, long price) {
    NOTE("sold", "0", item, price);
    NOTE("guarded", "counter", item, price);
    return item + (int)price;
}
__attribute__((noinline)) int sell_again(int item) { NOTE("sold", "0", item + 1, 77); return item; }
int main(void) {
    printf("ready\n"); fflush(stdout);
    while (getchar() != EOF) sell_again(sell(3, 5));
    return 0;
}
"""


def notes(path: Path) -> list[tuple[str, str, int, int, str]]:
    """(provider, name, file offset, semaphore, arguments) as readelf has them, by offset."""
    text = out("readelf", "--wide", "-n", path)
    rows = re.findall(
        r"Provider: (\S+)\s+Name: (\S+)\s+Location: (0x\w+), Base: \w+, Semaphore: (0x\w+)\s+Arguments: ?(.*)", text
    )
    loads = executable_loads(path)
    found = []
    for provider, name, location, semaphore, arguments in rows:
        at = int(location, 16)
        offset = next(at - v + o for o, v, n in loads if v <= at < v + n)
        found.append((provider, name, offset, int(semaphore, 16), arguments.strip()))
    return sorted(found, key=lambda row: row[2])


def read(path: Path) -> list[tuple[str, str, int, int, str]]:
    with path.open("rb") as file:
        return [(p.provider, p.name, p.offset, p.semaphore, p.arguments) for p in probes(ElfFile(file.fileno(), "x"))]


@needs.gcc
@needs.binutils
@pytest.mark.parametrize("flags", [(), ("-no-pie",), ("-O2",)])
def test_notes_as_readelf_reads_them(tmp_path: Path, flags: tuple[str, ...]) -> None:
    path = build(tmp_path, *flags, source=USDT)
    mine = read(path)
    assert mine == notes(path)
    assert [row[1] for row in mine] == ["sold", "guarded", "sold"]
    assert [bool(row[3]) for row in mine] == [False, True, False]
    code = path.read_bytes()
    assert all(code[row[2]] == 0x90 for row in mine)
    assert read(build(tmp_path, name="none")) == []


@needs.gxx
@needs.binutils
def test_notes_of_a_real_library() -> None:
    path = Path(out("g++", "-print-file-name=libstdc++.so.6").strip())
    assert read(path) == notes(path)
    assert {row[1] for row in read(path)} == {"catch", "throw", "rethrow"}


def test_prelinked_files_are_shifted_by_the_base(tmp_path: Path) -> None:
    class Moved:
        path = "x"

        def section(self, name: str, limit: int) -> tuple[bytes, int]:
            return note(0x1000, 0x5000, 0x6000), 0

        def section_address(self, name: str) -> int:
            return 0x7000

        def file_offset(self, vaddr: int) -> int:
            return vaddr - 0x1000

    (probe,) = probes(Moved())  # type: ignore[arg-type]
    assert (probe.offset, probe.semaphore) == (0x2000, 0x8000)


def note(location: int, base: int, semaphore: int, texts: bytes = b"shop\0sold\0008@%rdi\0") -> bytes:
    desc = struct.pack("<QQQ", location, base, semaphore) + texts
    return struct.pack("<III", 8, len(desc), 3) + b"stapsdt\0" + desc + bytes(-len(desc) % 4)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8@%rdi", Argument(Location("register", (("reg", 5),)))),
        ("-4@%esi", Argument(Location("register", (("reg", 4),)), 4, True)),
        ("1@%al", Argument(Location("register", (("reg", 0),)), 1)),
        ("1@%ah", Argument(Location("value", (("reg", 0), ("const", 8), ("shr", 0))), 1)),
        ("-2@%r10w", Argument(Location("register", (("reg", 10),)), 2, True)),
        ("1@%sil", Argument(Location("register", (("reg", 4),)), 1)),
        ("-4@-20(%rbp)", Argument(Location("memory", (("reg", 6), ("plus", -20))), 4, True)),
        ("8@(%rsp)", Argument(Location("memory", (("reg", 7),)))),
        ("8@8+16(%rsp)", Argument(Location("memory", (("reg", 7), ("plus", 24))))),
        (
            "8@8(%rax,%rbx,4)",
            Argument(Location("memory", (("reg", 0), ("reg", 3), ("const", 4), ("mul", 0), ("add", 0), ("plus", 8)))),
        ),
        ("8@(%rax,%rax)", Argument(Location("memory", (("reg", 0), ("reg", 0), ("add", 0))))),
        ("4@$-5", Argument(Location("value", (("const", -5),)), 4)),
        ("8@$0x10", Argument(Location("value", (("const", 16),)))),
        ("%rdi", Argument(Location("register", (("reg", 5),)))),
        ("8f@%rdx", Argument(Location("register", (("reg", 1),)), 8, False, True)),
    ],
)
def test_arguments(text: str, expected: Argument) -> None:
    assert parse_arguments(text) == (expected,)


@pytest.mark.parametrize(
    "text",
    [
        "8@%xmm0",
        "8@foo(%rip)",
        "8@nm",
        "16@%rdi",
        "8@%r16",
        "8@%r99d",
        "8@(%eax)",
        "8@4(%rip)",
        "8@()",
        "@",
        "8@",
        "8@08(%rbp)",
        "8@$09",
        "8@$" + "9" * 30,
        "8@-" + "9" * 5000 + "(%rbp)",
        "8@18446744073709551615(%rbp)",
        "8@%r" + "1" * 5000,
    ],
)
def test_arguments_that_cannot_be_read_say_so(text: str) -> None:
    (argument,) = parse_arguments(text)
    assert argument.location.kind == "unsupported"
    assert text[:3] in argument.location.reason


def test_a_leading_zero_is_the_assemblers_octal() -> None:
    (argument,) = parse_arguments("8@-010(%rbp)")
    assert argument.location == Location("memory", (("reg", 6), ("plus", -8)))


@given(st.text(alphabet="-+0123456789@%$()rabcdeipsxlw, f", max_size=60))
def test_any_text_is_answered(text: str) -> None:
    for argument in parse_arguments(text):
        assert argument.size in (1, 2, 4, 8)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=5000)
@given(data=st.data())
def test_mutated_notes(data: st.DataObject) -> None:
    image = bytearray(
        note(0x1000, 0, 0) + note(0x1010, 0x20, 0, b"a\0b\0\0") + note(1, 2, 3, b"") + note(0, 0, 0, bytes(40))
    )
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(image) - 4))
        image[at : at + 4] = struct.pack(
            "<I", data.draw(st.sampled_from([0, 1, 2**32 - 1]) | st.integers(0, 2**32 - 1))
        )
    cut = bytes(image[: data.draw(st.integers(0, len(image)))])
    with Path("/proc/self/exe").open("rb") as file:
        elf = ElfFile(file.fileno(), "x")
        elf.section = lambda name, limit=0: (cut, 0)  # type: ignore[method-assign]
        try:
            for probe in probes(elf):
                assert elf.segment_at(probe.offset)
        except ResolveError:
            pass
