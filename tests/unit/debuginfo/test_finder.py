"""Where debug information is found, and that a file of another build is not taken for it."""

from __future__ import annotations

import contextlib
import http.server
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import needs
from tests.support.children import Child, run
from tests.unit.debuginfo.programs import build
from trapline.errors import NoDebugInfo, ResolveError
from trapline_agent.debuginfo.files import DebugFiles
from trapline_agent.debuginfo.finder import DEBUG_DIRECTORY, DebugFinder, Sections
from trapline_agent.objects import FoundFile, on_disk, scan
from trapline_agent.symbols.elf import ElfFile
from trapline_agent.symbols.index import SymbolIndex

pytestmark = [needs.gcc, needs.binutils, needs.libdw]


def build_id_of(path: Path) -> str:
    fd = os.open(path, os.O_RDONLY)
    try:
        return ElfFile(fd, str(path)).build_id()
    finally:
        os.close(fd)


def split(program: Path) -> Path:
    """Moves a program's debug information to NAME.debug beside it; returns that."""
    debug = program.with_suffix(".debug")
    for command in (
        ["objcopy", "--only-keep-debug", "--compress-debug-sections", program, debug],
        ["strip", "-g", program],
        ["objcopy", f"--add-gnu-debuglink={debug}", program],
    ):
        result = run(command)
        assert result.returncode == 0, result.stderr
    return debug


def by_build_id(root: Path, build_id: str) -> Path:
    path = Path(f"{root}{debug_path(build_id)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def debug_path(build_id: str) -> str:
    return f"{DEBUG_DIRECTORY}/.build-id/{build_id[:2]}/{build_id[2:]}.debug"


@contextlib.contextmanager
def files(state: Path, *servers: str, root: str | None = None) -> Iterator[DebugFiles]:
    made = DebugFiles(state / "state", servers, str(state) if root is None else root)
    try:
        yield made
    finally:
        made.close()


def knows_area(files: DebugFiles, file: FoundFile) -> str:
    """Returns where the debug information was found that knows the function ``area``."""
    info = files.need(file)
    with file.open() as fd:
        offset = SymbolIndex(ElfFile(fd, file.path)).find("area")[0].offset
    scope = info.scope(offset)
    assert scope is not None
    assert [p.name for p in scope.function.parameters] == ["s", "times"]
    return info.where


def test_in_the_file_itself(tmp_path: Path) -> None:
    program = build(tmp_path, "c")
    with files(tmp_path) as found:
        assert knows_area(found, on_disk(str(program))) == str(program)


@pytest.mark.parametrize("place", ["beside", ".debug", "global"])
def test_by_debug_link(place: str, tmp_path: Path) -> None:
    program = build(tmp_path, "c", "O2", "-Wl,--build-id=none")
    debug = split(program)
    target = {
        "beside": debug,
        ".debug": tmp_path / ".debug" / debug.name,
        "global": Path(f"{tmp_path}{DEBUG_DIRECTORY}{tmp_path}/{debug.name}"),
    }[place]
    target.parent.mkdir(parents=True, exist_ok=True)
    debug.rename(target)
    with files(tmp_path, root=str(tmp_path) if place == "global" else "") as found:
        assert knows_area(found, on_disk(str(program))) == str(target)


def test_a_debug_link_of_another_build_is_not_taken(tmp_path: Path) -> None:
    program = build(tmp_path, "c", "O2", "-Wl,--build-id=none")
    debug = split(program)
    with debug.open("ab") as file:
        file.write(b"\0")
    with files(tmp_path) as found:
        assert found.of(on_disk(str(program))) is None
        with pytest.raises(NoDebugInfo) as e:
            found.need(on_disk(str(program)))
        assert f"{debug} (of another build)" in e.value.detail
        assert "DEBUGINFOD_URLS" in e.value.hint


def test_by_build_id(tmp_path: Path) -> None:
    program = build(tmp_path, "c")
    target = by_build_id(tmp_path, build_id_of(program))
    shutil.move(split(program), target)
    with files(tmp_path) as found:
        assert knows_area(found, on_disk(str(program))) == str(target)
        (index,) = (tmp_path / "state" / "debuginfo").iterdir()
        assert index.name.startswith(build_id_of(program))
        assert index.stat().st_mode & 0o777 == 0o600


def test_a_build_id_of_another_build_is_not_taken(tmp_path: Path) -> None:
    program, other = build(tmp_path, "c"), build(tmp_path, "c", "O0")
    target = by_build_id(tmp_path, build_id_of(program))
    split(program).unlink()
    shutil.move(split(other), target)
    with files(tmp_path) as found:
        assert found.of(on_disk(str(program))) is None


@needs.root
@needs.mounts
def test_in_the_mount_namespace_of_who_maps_it_first(tmp_path: Path) -> None:
    """A container's /usr/lib/debug is its own. The program's process sees another directory there than we do."""
    program = build(tmp_path, "c", "O0")
    inside = tmp_path / "inside"
    shutil.move(split(program), by_build_id(inside, build_id_of(program)))
    there = inside / DEBUG_DIRECTORY.lstrip("/")
    flags = "mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_EXEC"
    maps = f"import mmap; f = open('{program}'); m = mmap.mmap(f.fileno(), 0, {flags})"
    code = f"{maps}; print('ready', flush=True); input()"
    script = f'mount --bind {there} {DEBUG_DIRECTORY} && exec {sys.executable} -c "{code}"'
    with Child(["unshare", "-m", "--propagation", "private", "sh", "-c", script]) as child:
        found_file = next(f for f in scan([child.pid]).values() if f.path == str(program))
        with files(tmp_path) as found:
            where = knows_area(found, found_file)
    assert where == f"/proc/{child.pid}/root{debug_path(build_id_of(program))}"


class _Server(http.server.BaseHTTPRequestHandler):
    files: dict[str, bytes]
    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        data = self.files.get(self.path)
        self.send_response(200 if data is not None else 404)
        self.send_header("Content-Length", str(len(data or b"")))
        self.end_headers()
        self.wfile.write(data or b"")

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextlib.contextmanager
def debuginfod(**files: bytes) -> Iterator[tuple[str, list[str]]]:
    asked: list[str] = []
    contents = {f"/buildid/{key}/debuginfo": data for key, data in files.items()}
    handler = type("Handler", (_Server,), {"files": contents, "asked": asked})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", asked
        finally:
            server.shutdown()
            thread.join()


def test_from_a_server(tmp_path: Path) -> None:
    """Asked once: what it sent is kept, and so is for a while that it has nothing."""
    program = build(tmp_path, "c")
    build_id = build_id_of(program)
    debug = split(program)
    data = debug.read_bytes()
    debug.unlink()
    with debuginfod(**{build_id: data}) as (url, asked):
        with files(tmp_path, "not a URL", url) as found:
            assert knows_area(found, on_disk(str(program))) == str(
                tmp_path / "state" / "debuginfod" / f"{build_id}.debug"
            )
        with files(tmp_path, url) as found:
            knows_area(found, on_disk(str(program)))
        assert asked == [f"/buildid/{build_id}/debuginfo"]
    with debuginfod() as (url, asked), files(tmp_path / "other", url) as found:
        for _ in range(2):
            assert found.of(on_disk(str(program))) is None
        assert len(asked) == 1
        with pytest.raises(NoDebugInfo, match="buildid"):
            found.need(on_disk(str(program)))


def test_a_server_that_sends_something_else(tmp_path: Path) -> None:
    program = build(tmp_path, "c")
    build_id = build_id_of(program)
    split(program).unlink()
    with debuginfod(**{build_id: b"no such thing"}) as (url, _), files(tmp_path, url) as found:
        assert found.of(on_disk(str(program))) is None


@needs.dwz
@pytest.mark.parametrize("there", [True, False])
def test_what_dwz_shares_between_files(there: bool, tmp_path: Path) -> None:
    programs = [build(tmp_path, "c", level) for level in ("O0", "O2")]
    shared = tmp_path / "shared.debug"
    result = run(["dwz", "-m", shared, *programs])
    assert result.returncode == 0, result.stderr
    if not there:
        shared.unlink()
    with files(tmp_path) as found:
        for program in programs:
            file = on_disk(str(program))
            if not there:
                assert found.of(file) is None
                continue
            knows_area(found, file)
            variable = found.need(file).variable("first")
            assert variable is not None
            assert variable.type is not None
            made = found.need(file).type(variable.type)
            assert (made.name, made.size) == ("shape", 96)
            assert {m.name for m in made.members} >= {"colour", "corners", "next"}
            assert len(found.need(file).inlined("scale")) == 2


def test_no_elf_and_cut_elf(tmp_path: Path) -> None:
    program = build(tmp_path, "c")
    data = program.read_bytes()
    finder = DebugFinder()
    for size in (0, 3, 63, 64, 1000, len(data) - 1):
        path = tmp_path / "cut"
        path.write_bytes(data[:size])
        fd = os.open(path, os.O_RDONLY)
        try:
            with contextlib.suppress(ResolveError):
                Sections(fd)
            with pytest.raises(ResolveError):
                finder.find(fd, str(path))
        finally:
            os.close(fd)
