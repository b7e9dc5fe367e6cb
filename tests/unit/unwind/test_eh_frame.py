"""Tables against pyelftools' reading of the same section, and against files that somebody damaged."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from elftools.dwarf.callframe import FDE
from elftools.elf.elffile import ELFFile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support import needs
from tests.support.targets import Targets
from trapline.errors import ResolveError, TraplineError
from trapline_agent.plans import FileKey
from trapline_agent.symbols.elf import ElfFile
from trapline_agent.targets.files import file_key
from trapline_agent.unwind import eh_frame
from trapline_agent.unwind.eh_frame import read_table
from trapline_agent.unwind.table import EMPTY, RBP, At, Cfa, Place, Rule, UnwindTable, decode
from trapline_agent.unwind.tables import VDSO, Tables
from trapline_agent.unwind.walk import NewFile

LIBC = Path("/lib/x86_64-linux-gnu/libc.so.6")


@contextlib.contextmanager
def opened(path: Path) -> Iterator[ElfFile]:
    fd = os.open(path, os.O_RDONLY)
    try:
        yield ElfFile(fd, str(path))
    finally:
        os.close(fd)


def table_of(path: Path) -> UnwindTable:
    with opened(path) as elf:
        return read_table(elf)


def places(rule: Rule) -> dict[int, Place]:
    return {p.register: p for p in rule.places}


def against_pyelftools(path: Path, every: int = 1) -> int:
    """Compares each row of each function; returns how many."""
    table = table_of(path)
    compared = 0
    with path.open("rb") as file, opened(path) as ours:
        for fde in ELFFile(file).get_dwarf_info().EH_CFI_entries()[::every]:
            if not isinstance(fde, FDE):
                continue
            start, size = fde["initial_location"], fde["address_range"]
            try:
                rows = fde.get_decoded().table
            except ValueError:
                continue  # pyelftools 0.33 stumbles over expressions of the CFA
            ends = [row["pc"] for row in rows[1:]] + [start + size]
            for row, end in zip(rows, ends, strict=True):
                if row["pc"] >= start + size or end <= row["pc"] or row["cfa"].expr is not None:
                    continue
                for vaddr in (row["pc"], min(end, start + size) - 1):
                    rule = table.at(ours.file_offset(vaddr) or 0)
                    assert (rule.cfa, rule.register, rule.offset) == (Cfa.REGISTER, row["cfa"].reg, row["cfa"].offset)
                    known = places(rule)
                    for register in (3, RBP, 12, 13, 14, 15, 16):
                        theirs = row.get(register)
                        mine = known.get(register)
                        if theirs is None or theirs.type == "SAME_VALUE":
                            assert mine is None
                        elif theirs.type == "OFFSET":
                            assert mine == Place(register, At.CFA, 0, theirs.arg)
                        elif theirs.type == "UNDEFINED":
                            assert mine is not None
                            assert mine.at is At.UNDEFINED
                compared += 1
    return compared


@needs.gcc
@needs.x86_64
@pytest.mark.parametrize("flags", [("-O0",), ("-O2",), ("-O3", "-fomit-frame-pointer", "-static")], ids=" ".join)
def test_every_row_of_a_program(targets: Targets, flags: tuple[str, ...]) -> None:
    assert against_pyelftools(targets.build("stacks", *flags), every=1 if "-static" not in flags else 7) > 50


@needs.x86_64
def test_rows_of_libc() -> None:
    assert against_pyelftools(LIBC, every=11) > 1000


@needs.x86_64
def test_libcs_table_is_made_in_less_than_half_a_second() -> None:
    """About 45 ms on the machine of benchmarks/README.md."""
    began = time.process_time()
    table = table_of(LIBC)
    assert time.process_time() - began < 0.5
    assert len(table) > 10_000
    assert len(table.encode()) < 16 * len(table)


@needs.gcc
@needs.x86_64
def test_functions_do_not_reach_beyond_their_end(targets: Targets) -> None:
    path = targets.build("stacks")
    table = table_of(path)
    with path.open("rb") as file, opened(path) as ours:
        fdes = [e for e in ELFFile(file).get_dwarf_info().EH_CFI_entries() if isinstance(e, FDE)]
        starts = {e["initial_location"] for e in fdes}
        for fde in fdes:
            end = fde["initial_location"] + fde["address_range"]
            if end not in starts:
                assert table.at(ours.file_offset(end) or 0).cfa is Cfa.NONE


@needs.gcc
@needs.x86_64
def test_a_file_without_any(targets: Targets, tmp_path: Path) -> None:
    path = targets.build("dlfn", "-shared", "-fPIC", "-fno-asynchronous-unwind-tables", "-nostdlib")
    assert len(table_of(path)) == 0


class TestTables:
    def test_are_kept_by_build_id_and_content(self, tmp_path: Path) -> None:
        wanted = NewFile(self.key(LIBC), str(LIBC), os.getpid(), 0, 0)
        made = Tables(tmp_path).make(wanted)
        (kept,) = tmp_path.iterdir()
        assert made is not None
        assert kept.name.startswith(made.build_id)
        assert kept.read_bytes() == made.data
        kept.write_bytes(EMPTY.encode())
        again = Tables(tmp_path).make(wanted)
        assert again is not None
        assert again.data == EMPTY.encode()  # it was read, not made
        kept.write_bytes(made.data[:-1])
        assert Tables(tmp_path).make(wanted) == made  # made anew
        assert kept.read_bytes() == made.data

    def test_another_file_of_the_same_build_id_has_its_own(self, tmp_path: Path, targets: Targets) -> None:
        cache = tmp_path / "cache"
        path = targets.copy(targets.build("stacks"))
        first = Tables(cache).make(NewFile(self.key(path), str(path), os.getpid(), 0, 0))
        with opened(path) as elf:
            found = elf.eh_frame(1 << 20)
            assert found is not None
            content = path.read_bytes()
            at = content.index(found[1][:64])
        forged = bytearray(content)
        forged[at + 0x60] ^= 0x04
        path.write_bytes(forged)
        second = Tables(cache).make(NewFile(self.key(path), str(path), os.getpid(), 0, 0))
        assert first is not None
        assert second is not None
        assert first.build_id == second.build_id
        assert len(list(cache.iterdir())) == 2

    def test_the_vdso_has_one(self) -> None:
        made = Tables().make(NewFile(FileKey("", 0), VDSO, 0, 0, 0))
        assert made is not None
        assert len(decode(made.data)) > 10

    def test_what_cannot_be_opened_has_none_yet(self, tmp_path: Path) -> None:
        assert Tables().make(NewFile(FileKey("00:00", 1), str(tmp_path / "gone"), os.getpid(), 0, 0)) is None

    def test_what_is_no_elf_file_has_none(self, tmp_path: Path) -> None:
        path = tmp_path / "script"
        path.write_text("#!/bin/sh\n")
        made = Tables().make(NewFile(self.key(path), str(path), os.getpid(), 0, 0))
        assert made is not None
        assert made.data == b""

    @staticmethod
    def key(path: Path) -> FileKey:
        return file_key(str(path))


# --- damaged files ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return Targets(tmp_path_factory.mktemp("eh_frame")).build("stacks").read_bytes()


@needs.gcc
@needs.x86_64
@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_sections(program: bytes, data: st.DataObject) -> None:
    """Whatever is in .eh_frame: a table that can be used, or a typed error."""
    section = _section(program)
    damaged = bytearray(program)
    for _ in range(data.draw(st.integers(1, 20))):
        at = data.draw(st.integers(section.start, section.stop - 1))
        damaged[at] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        at = data.draw(st.integers(section.start, section.stop - 16))
        damaged[at : at + 16] = data.draw(st.binary(min_size=16, max_size=16))
    fd = os.memfd_create("damaged")
    try:
        os.write(fd, damaged)
        with contextlib.suppress(TraplineError):
            table = read_table(ElfFile(fd, "damaged"))
            assert decode(table.encode()).rules == table.rules
    finally:
        os.close(fd)


def test_too_many_rows_are_refused(monkeypatch: pytest.MonkeyPatch, program: bytes) -> None:
    monkeypatch.setattr(eh_frame, "MAX_ROWS", 10)
    fd = os.memfd_create("large")
    try:
        os.write(fd, program)
        with pytest.raises(ResolveError, match="more than 10 rows"):
            read_table(ElfFile(fd, "large"))
    finally:
        os.close(fd)


def test_endless_remembering_costs_the_function_alone(program: bytes) -> None:
    """A function of nothing but DW_CFA_remember_state: what is remembered is bounded."""
    section = _section(program)
    damaged = bytearray(program)
    at, first = section.start, True
    while (length := int.from_bytes(damaged[at : at + 4], "little")) > 0 and at < section.stop:
        if int.from_bytes(damaged[at + 4 : at + 8], "little") and not first:
            damaged[at + 17 : at + 4 + length] = b"\x0a" * (length - 13)
        first = False
        at += 4 + length
    fd = os.memfd_create("remember")
    try:
        os.write(fd, damaged)
        read_table(ElfFile(fd, "remember"))
    finally:
        os.close(fd)


def _section(program: bytes) -> range:
    fd = os.memfd_create("whole")
    try:
        os.write(fd, program)
        found = ElfFile(fd, "whole").eh_frame(1 << 20)
        assert found is not None
        at = program.index(found[1])
        return range(at, at + len(found[1]))
    finally:
        os.close(fd)
