"""Indices on disk: the same answers as without, never those of another file, and nothing that is broken is believed."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support import needs
from tests.unit.symbols.programs import build, strip
from tests.unit.symbols.test_elf import index_of, libc, out
from trapline_agent.symbols import index as index_module
from trapline_agent.symbols import separate, store
from trapline_agent.symbols.index import IndexCache, SymbolIndex


def get(path: Path, directory: Path) -> SymbolIndex:
    """As a new process gets it."""
    fd = os.open(path, os.O_RDONLY)
    try:
        return IndexCache(directory=directory).get(fd, str(path))
    finally:
        os.close(fd)


def everything(index: SymbolIndex) -> tuple[object, ...]:
    symbols = sorted(index)
    return symbols, index.build_id, index.soname, index.segments, index.entry, index.imports.blob


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that were read as a whole."""
    found: list[str] = []
    made = SymbolIndex.__init__

    def init(self: SymbolIndex, elf: object, debug: object = None) -> None:
        found.append("read")
        made(self, elf, debug)  # type: ignore[arg-type]

    monkeypatch.setattr(index_module.SymbolIndex, "__init__", init)
    return found


@needs.gcc
@pytest.mark.parametrize("flags", [(), ("-Wl,--build-id=none",)])
def test_a_second_process_reads_what_the_first_kept(tmp_path: Path, read: list[str], flags: tuple[str, ...]) -> None:
    path, directory = build(tmp_path, *flags), tmp_path / "kept"
    first = get(path, directory)
    second = get(path, directory)
    assert read == ["read"]
    assert everything(first) == everything(second) == everything(index_of(path))
    (kept,) = directory.iterdir()
    assert kept.stat().st_mode & 0o777 == 0o600
    assert directory.stat().st_mode & 0o777 == 0o700


def test_libc(tmp_path: Path, read: list[str]) -> None:
    assert everything(get(libc(), tmp_path / "kept")) == everything(get(libc(), tmp_path / "kept"))
    assert read == ["read"]


@needs.gcc
def test_another_file_with_the_same_build_id_has_its_own_symbols(tmp_path: Path, read: list[str]) -> None:
    """A container's file may claim to be the host's libc, of the same size."""
    directory = tmp_path / "kept"
    path = build(tmp_path, "-Wl,--build-id=0x0123456789")
    honest = get(path, directory)
    (visible,) = honest.find("visible")
    image = bytearray(path.read_bytes())
    at = image.index(
        struct.pack("<Q", visible.offset), visible.offset
    )  # st_value in .symtab: the offset is the address
    struct.pack_into("<Q", image, at, visible.offset + 1)
    liar = tmp_path / "liar"
    liar.write_bytes(image)
    assert get(liar, directory).find("visible")[0].offset == visible.offset + 1
    assert get(path, directory).find("visible")[0].offset == visible.offset
    assert len(read) == 3  # neither was taken for the other


@needs.gcc
def test_a_file_that_changes_is_read_anew(tmp_path: Path, read: list[str]) -> None:
    directory = tmp_path / "kept"
    path = build(tmp_path, "-Wl,--build-id=0x0123456789")
    get(path, directory)
    build(tmp_path, "-Wl,--build-id=0x0123456789", source="int main(void) { return 0; } int other(void) { return 1; }")
    assert len(get(path, directory).find("other")) == 1
    assert read == ["read", "read"]


@needs.gcc
@needs.binutils
def test_a_debug_file_that_comes_later_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(separate, "DEBUG_DIRECTORY", tmp_path / "build-id")
    path = build(tmp_path)
    stripped = strip(path)
    assert get(stripped, tmp_path / "kept").source == ""
    build_id = index_of(path).build_id
    debug = tmp_path / "build-id" / build_id[:2] / f"{build_id[2:]}.debug"
    debug.parent.mkdir(parents=True)
    out("objcopy", "--only-keep-debug", path, debug)
    for _ in range(2):
        assert get(stripped, tmp_path / "kept").source == "debug file"
    debug.unlink()
    assert get(stripped, tmp_path / "kept").source == ""


@needs.gcc
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=5000)
@given(data=st.data())
def test_what_is_broken_is_read_anew(small: tuple[Path, Path, bytes], data: st.DataObject) -> None:
    path, directory, whole = small
    image = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        image[data.draw(st.integers(0, len(image) - 1))] ^= data.draw(st.integers(1, 255))
    (kept,) = directory.iterdir()
    kept.write_bytes(image[: data.draw(st.integers(0, len(image)) | st.just(len(image)))])
    assert everything(get(path, directory)) == everything(index_of(path))
    assert kept.read_bytes() == whole


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, bytes]:
    directory = tmp_path_factory.mktemp("small")
    path = build(directory)
    get(path, directory / "kept")
    (kept,) = (directory / "kept").iterdir()
    return path, directory / "kept", kept.read_bytes()


@needs.gcc
def test_a_later_format_is_read_anew(tmp_path: Path, read: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    path = build(tmp_path)
    get(path, tmp_path / "kept")
    monkeypatch.setattr(store, "FORMAT", store.FORMAT + 1)
    get(path, tmp_path / "kept")
    get(path, tmp_path / "kept")
    assert read == ["read", "read"]


@needs.gcc
def test_the_directory_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "MAX_FILES", 3)
    directory = tmp_path / "kept"
    paths = [build(tmp_path, f"-Wl,--build-id=0x00112233{i:02x}", name=f"p{i}") for i in range(5)]
    for i, path in enumerate(paths):
        get(path, directory)
        for kept in directory.iterdir():  # the clock is too coarse to tell them apart
            number = int(kept.name[8:10], 16)
            os.utime(kept, (number, number))
        assert len(list(directory.iterdir())) == min(i + 1, 3)
    assert sorted(k.name[8:10] for k in directory.iterdir()) == ["02", "03", "04"]
    monkeypatch.setattr(store, "MAX_BYTES", 1)
    get(build(tmp_path, name="last"), directory)
    assert len(list(directory.iterdir())) == 3  # what is larger than half of it is not kept


@needs.gcc
def test_a_directory_that_others_may_write_to_is_not_used(tmp_path: Path, read: list[str]) -> None:
    path, directory = build(tmp_path), tmp_path / "kept"
    get(path, directory)
    directory.chmod(0o777)
    assert len(get(path, directory).find("visible")) == 1
    assert read == ["read", "read"]
    for nowhere in (Path(os.devnull) / "x", tmp_path / "program" / "x"):
        assert len(get(path, nowhere).find("visible")) == 1
