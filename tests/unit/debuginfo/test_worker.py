"""The process that reads debug information: what it may do, what becomes of it, what the agent hears then."""

from __future__ import annotations

import os
import random
import select
import signal
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support import needs
from tests.support.children import Child, run
from tests.unit.debuginfo.programs import build, line_of
from trapline.errors import NoDebugInfo, NotFound, ResolveError, TraplineError
from trapline_agent.debuginfo import worker
from trapline_agent.debuginfo.files import DebugFiles, FileDebugInfo
from trapline_agent.debuginfo.finder import Sections
from trapline_agent.objects import on_disk

pytestmark = [needs.gcc, needs.libdw]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("program"), "c")


@pytest.fixture
def files(tmp_path: Path) -> DebugFiles:
    return DebugFiles(tmp_path / "state")


def status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def asked(info: FileDebugInfo) -> None:
    assert info.line("shapes.c", line_of("c", "return"))


def test_it_may_do_nothing(program: Path, files: DebugFiles) -> None:
    info = files.need(on_disk(str(program)))
    asked(info)
    found = status(info.pid)
    assert found["NoNewPrivs"] == "1"
    if os.geteuid() == 0:
        assert found["Uid"].split() == ["65534"] * 4
        assert found["CapEff"] == "0000000000000000"
        assert found["Groups"] == ""
    limits = Path(f"/proc/{info.pid}/limits").read_text()
    assert [line.split()[3] for line in limits.splitlines() if line.startswith("Max open files")] == ["0"]
    assert [line.split()[3] for line in limits.splitlines() if line.startswith("Max data size")] == [
        str(worker.MEMORY_BYTES)
    ]
    files.close()


def test_one_that_was_killed_is_replaced(program: Path, files: DebugFiles) -> None:
    info = files.need(on_disk(str(program)))
    asked(info)
    first = info.pid
    os.kill(first, signal.SIGKILL)
    os.waitid(os.P_PID, first, os.WEXITED | os.WNOWAIT)
    assert info.variable("first") is not None
    assert info.pid != first
    files.close()


def test_it_ends_with_the_agent(program: Path) -> None:
    """However that ends, and whatever it is doing: here it is stopped, and cannot see that its socket is closed."""
    code = (
        "import os, signal, sys\nfrom trapline_agent.debuginfo.files import DebugFiles\n"
        "from trapline_agent.objects import on_disk\nfiles = DebugFiles()\ninfo = files.need(on_disk(sys.argv[1]))\n"
        "assert info.variable('first')\nsignal.signal(signal.SIGTERM, lambda *a: os._exit(0))\n"
        "print('ready', info.pid, flush=True)\nsys.stdin.read()\n"
    )
    with Child([sys.executable, "-c", code, program]) as agent:
        pid = int(agent.ready_line.split()[1])
        pidfd = os.pidfd_open(pid)
        os.kill(pid, signal.SIGSTOP)
        agent.popen.terminate()
        agent.wait()
        assert select.select([pidfd], [], [], 20)[0]
        os.close(pidfd)


def test_one_that_hangs_is_ended_at_the_deadline(program: Path, tmp_path: Path) -> None:
    files = DebugFiles(tmp_path / "state", deadline_s=20.0)
    info = files.need(on_disk(str(program)))
    asked(info)
    files.deadline_s = 0.2
    first = info.pid
    os.kill(first, signal.SIGSTOP)
    started = time.monotonic()
    with pytest.raises(ResolveError) as e:
        info.variable("first")
    assert time.monotonic() - started < 10
    assert e.value.reason == "DebugInfoUnreadable"
    assert "longer than 0.2 s" in e.value.detail
    assert str(program) in e.value.detail
    assert not Path(f"/proc/{first}").exists()
    files.deadline_s = 20.0
    assert info.variable("first") is not None
    files.close()


def test_answers_and_indexes_are_kept(program: Path, tmp_path: Path) -> None:
    files = DebugFiles(tmp_path)
    info = files.need(on_disk(str(program)))
    asked(info)
    (kept,) = (tmp_path / "debuginfo").iterdir()
    written = kept.stat().st_mtime_ns, kept.read_bytes()
    os.kill(info.pid, signal.SIGSTOP)
    asked(info)  # without the process
    files.close()
    again = DebugFiles(tmp_path)
    asked(again.need(on_disk(str(program))))
    assert (kept.stat().st_mtime_ns, kept.read_bytes()) == written
    again.close()
    for damaged in (b"", b"\xc1", written[1].replace(b"format\x01", b"format\x7f")):
        kept.write_bytes(damaged)
        after = DebugFiles(tmp_path)
        asked(after.need(on_disk(str(program))))
        assert kept.read_bytes() == written[1]
        after.close()


def test_few_processes_and_all_end(tmp_path: Path, program: Path) -> None:
    files = DebugFiles()
    infos = []
    for i in range(6):
        copy = tmp_path / f"copy{i}"
        copy.write_bytes(program.read_bytes())
        copy.chmod(0o755)
        infos.append(files.need(on_disk(str(copy))))
        asked(infos[-1])
    running = [i.pid for i in infos if i.running]
    assert len(running) == 4
    assert infos[0].variable("first") is not None
    files.close()
    assert not any(i.running for i in infos)
    assert not any(Path(f"/proc/{pid}").exists() for pid in running)


def test_what_is_wrong_with_a_question_is_told(program: Path, files: DebugFiles) -> None:
    info = files.need(on_disk(str(program)))
    with pytest.raises(NotFound) as e:
        info.line("no_such_file.c", 1)
    assert str(program) in e.value.detail
    with pytest.raises(TraplineError):
        info.type(1 << 40)
    with pytest.raises(TraplineError):
        info.type(-5)
    assert info.scope(1 << 60) is None
    assert info.variable("") is None
    files.close()


def test_what_is_unusable_says_so_each_time(program: Path, tmp_path: Path) -> None:
    """And no process is left of it, nor is another one started for the next question."""
    data = bytearray(program.read_bytes())
    low, high = _debug_range(program)
    data[low:high] = b"\xff" * (high - low)
    damaged = tmp_path / "damaged"
    damaged.write_bytes(data)
    files = DebugFiles()
    info = files.need(on_disk(str(damaged)))
    said = []
    for _ in range(2):
        with pytest.raises(NoDebugInfo) as e:
            info.scope(0x1270)
        said.append(str(e.value))
        assert not info.running
    assert said[0] == said[1]
    assert str(damaged) in said[0]
    files.close()


# --- damaged files ----------------------------------------------------------------------------------------------------


def _debug_range(path: Path) -> tuple[int, int]:
    fd = os.open(path, os.O_RDONLY)
    try:
        spans = [span for name, span in Sections(fd).by_name.items() if name.startswith(".debug_")]
    finally:
        os.close(fd)
    return min(at for at, _ in spans), max(at + size for at, size in spans)


def _questions(info: FileDebugInfo, offset: int) -> None:
    """All questions; each is answered, or raises a TraplineError."""
    for ask in (
        lambda: info.scope(offset),
        lambda: info.scope(offset + 7),
        lambda: info.source(offset),
        lambda: info.line("shapes.c", 60),
        lambda: info.inlined("scale"),
        lambda: info.variable("first"),
        lambda: info.variable("tight"),
    ):
        try:
            answer = ask()
        except TraplineError:
            continue
        for type_ref in _types_of(answer):
            try:
                made = info.type(type_ref)
                for member in made.members:
                    info.type(member.type)
            except TraplineError:
                continue


def _types_of(answer: object) -> list[int]:
    variables = getattr(answer, "variables", ()) or ([answer] if hasattr(answer, "location") else [])
    return [v.type for v in variables if v.type is not None]


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 1 << 32), count=st.integers(1, 60))
def test_damaged_debug_information_has_an_answer(
    program: Path, tmp_path_factory: pytest.TempPathFactory, seed: int, count: int
) -> None:
    """Bytes changed anywhere in the sections: each question is answered or raises a TraplineError, within its time."""
    directory = tmp_path_factory.mktemp("damaged")
    data = bytearray(program.read_bytes())
    low, high = _debug_range(program)
    chance = random.Random(seed)
    for _ in range(count):
        data[chance.randrange(low, high)] = chance.choice((0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)))
    damaged = directory / "damaged"
    damaged.write_bytes(data)
    files = DebugFiles(deadline_s=15.0)
    started = time.monotonic()
    try:
        info = files.need(on_disk(str(damaged)))
        _questions(info, 0x1270)
    except TraplineError:
        pass
    finally:
        files.close()
    assert time.monotonic() - started < 120
    damaged.unlink()


@pytest.mark.parametrize("part", [0.2, 0.5, 0.9, 0.99])
def test_a_file_cut_short_has_an_answer(part: float, program: Path, tmp_path: Path) -> None:
    data = program.read_bytes()
    cut = tmp_path / "cut"
    cut.write_bytes(data[: int(len(data) * part)])
    files = DebugFiles()
    with pytest.raises(TraplineError):
        _questions(files.need(on_disk(str(cut))), 0x1270)
    files.close()


def test_a_file_that_shrinks_under_its_reader(program: Path, tmp_path: Path) -> None:
    """It is mapped: the reader gets SIGBUS, the agent an error."""
    copy = tmp_path / "copy"
    copy.write_bytes(program.read_bytes())
    files = DebugFiles()
    info = files.need(on_disk(str(copy)))
    asked(info)
    os.truncate(copy, 100)
    with pytest.raises(ResolveError) as e:
        info.variable("nobody")
    assert e.value.reason == "DebugInfoUnreadable"
    assert "SIGBUS" in e.value.detail
    files.close()


@needs.binutils
def test_sections_that_unpack_to_more_than_the_memory(tmp_path: Path) -> None:
    """A few kilobytes that unpack to a gigabyte: refused, and the machine's memory stays free."""
    source = tmp_path / "bomb.s"
    source.write_text(
        '.section .debug_info,"",@progbits\n.zero 1000000000\n.section .debug_abbrev,"",@progbits\n.zero 16\n'
    )
    main = tmp_path / "main.c"
    main.write_text("int main(void) { return 0; }\n")
    for command in (
        ["gcc", main, source, "-o", tmp_path / "bomb"],
        ["objcopy", "--compress-debug-sections", tmp_path / "bomb"],
    ):
        assert run(command, timeout=100).returncode == 0
    assert (tmp_path / "bomb").stat().st_size < 10_000_000
    files = DebugFiles()
    with pytest.raises(TraplineError):
        files.need(on_disk(str(tmp_path / "bomb"))).scope(0x1040)
    files.close()
