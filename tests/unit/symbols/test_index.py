"""Search, did-you-mean, the cache, and where instructions begin."""

from __future__ import annotations

import os
import random
import re
import string
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support import needs
from tests.unit.symbols.programs import build
from tests.unit.symbols.test_elf import index_of, libc, out
from trapline_agent.symbols.boundaries import instruction_over
from trapline_agent.symbols.index import IndexCache, near_names


def test_search_ranks_names_then_beginnings_then_parts() -> None:
    _, matches = index_of(libc()).search("malloc")
    names = [m.name for m in matches]
    assert names[0] == "malloc"
    assert [m.rank for m in matches] == sorted(m.rank for m in matches)
    assert "malloc_usable_size" in names[1:6]
    assert all("malloc" in n.lower() for n in names if matches[names.index(n)].rank < 3)


def test_search_takes_letters_in_order_and_ignores_case() -> None:
    index = index_of(libc())
    assert "malloc_usable_size" in [m.name for m in index.search("mausiz")[1]]
    assert index.search("GETPID")[1][0].name == "getpid"
    total, some = index.search("", 50)
    assert total == len(index)
    assert len(some) == 50
    assert index.search("no such thing at all") == (0, [])


@pytest.mark.parametrize(
    ("wrong", "right"), [("mallok", "malloc"), ("getpidd", "getpid"), ("pritnf", "printf"), ("STRTOL", "strtol")]
)
def test_did_you_mean(wrong: str, right: str) -> None:
    assert index_of(libc()).near(wrong)[0] == right


def test_did_you_mean_in_many_names() -> None:
    rng = random.Random(1)
    names = ["".join(rng.choices(string.ascii_lowercase + "_", k=rng.randint(8, 40))) for _ in range(250_000)]
    for i in (0, 99_999, 100_000, 249_999):
        assert near_names(names[i][:-1], names)[0] == names[i]


@given(st.text(max_size=20), st.lists(st.text(max_size=20), max_size=30))
def test_did_you_mean_takes_any_text(name: str, names: list[str]) -> None:
    assert set(near_names(name, names)) <= set(names)
    if name and name.isascii() and name in names:
        assert near_names(name, names)[0].lower() == name.lower()


@needs.gcc
def test_cache_reads_a_file_once_and_again_when_it_changed(tmp_path: Path) -> None:
    cache = IndexCache()
    path = build(tmp_path)

    def get() -> object:
        fd = os.open(path, os.O_RDONLY)
        try:
            assert cache.identity(fd, str(path)) == cache.identity(fd, str(path))
            return cache.get(fd, str(path))
        finally:
            os.close(fd)

    first = get()
    assert get() is first
    os.utime(path, ns=(1, 1))
    assert get() is not first


@needs.gcc
def test_cache_is_bounded(tmp_path: Path) -> None:
    cache = IndexCache(max_symbols=1)
    for name in ("a", "b"):
        fd = os.open(build(tmp_path, name=name), os.O_RDONLY)
        try:
            cache.get(fd, name)
        finally:
            os.close(fd)
    assert len(cache._indices) == 1


@needs.gcc
@needs.binutils
def test_boundaries_are_objdumps(tmp_path: Path) -> None:
    path = build(tmp_path, "-no-pie")
    index = index_of(path)
    (main,) = index.find("main")
    segment = index.segment_at(main.offset)
    assert segment is not None
    vaddr = main.offset - segment.offset + segment.vaddr
    listing = out(
        "objdump", "-d", "--no-show-raw-insn", f"--start-address={vaddr}", f"--stop-address={vaddr + main.size}", path
    )
    starts = [int(a, 16) for a in re.findall(r"^ +([0-9a-f]+):\t", listing, re.M)]
    assert len(starts) > 10
    code = path.read_bytes()[main.offset : main.offset + main.size + 15]
    for addr in range(vaddr, vaddr + main.size):
        over = instruction_over(code, vaddr, addr)
        assert over is not None
        assert over.addr == max(s for s in starts if s <= addr)


def test_boundaries_end_with_the_code() -> None:
    assert instruction_over(b"\x90\x90", 0, 5) is None
    assert instruction_over(b"", 0, 0) is None
