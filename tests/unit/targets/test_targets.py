"""/proc/PID/maps, processes and file identity, against this machine's own /proc and real children."""

from __future__ import annotations

import ctypes
import os
import re
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support import needs
from tests.support.children import Child, python, run
from tests.unit.symbols.programs import build
from trapline.errors import NotFound, PermissionDenied, ResolveError
from trapline_agent.plans import FileKey
from trapline_agent.targets.files import file_key, open_mapped
from trapline_agent.targets.maps import executable_mappings, mappings_of, parse_maps
from trapline_agent.targets.process import (
    descends_from,
    facts,
    ineligible,
    list_processes,
    pids,
    ppids,
    require_process,
)
from trapline_agent.targets.selector import Selector, with_numbers

READY = "print('ready', flush=True); input()"


def test_parse() -> None:
    text = (
        b"55d0c0000000-55d0c0001000 r--p 00000000 fe:00 17 /bin/a\n"
        b"55d0c0001000-55d0c0003000 r-xp 00001000 fe:00 17                         /bin/a b (deleted)\n"
        b"7f0000000000-7f0000001000 rwxs 00002000 00:2e 18446744073709551615 /x\\012y\\z\n"
        b"7f0000002000-7f0000003000 r-xp 00000000 00:00 0 \n"
        b"7ffd00000000-7ffd00001000 r-xp 00000000 00:00 0                          [vdso]\n"
        b"7ffd00002000-7ffd00003000 --xp 00000000 fd:01 9 \xff\xfe\n"
    )
    first, second, third = parse_maps(text)
    assert first[:6] == (0x55D0C0001000, 0x55D0C0003000, "r-xp", 0x1000, "fe:00", 17)
    assert (first.path, first.deleted, first.writable, first.shared) == ("/bin/a b", True, False, False)
    assert first.file == FileKey("fe:00", 17)
    assert (first.addr(0x1000), first.addr(0x2FFF)) == (0x55D0C0001000, 0x55D0C0002FFF)
    assert first.addr(0xFFF) is None
    assert first.addr(0x3000) is None
    assert (second.path, second.inode, second.writable, second.shared) == ("/x\ny\\z", 2**64 - 1, True, True)
    assert os.fsencode(third.path) == b"\xff\xfe"


@given(st.binary(max_size=400))
def test_any_bytes_parse(data: bytes) -> None:
    for mapping in parse_maps(data):
        assert mapping.inode > 0
        assert mapping.prot[2] == "x"


@needs.gcc
def test_odd_names_and_identity(tmp_path: Path) -> None:
    names = ["plain", "with space", "new\nline", "back\\slash", "ünï", "(deleted)", "a (deleted)"]
    for name in names:
        directory = tmp_path / str(names.index(name))
        directory.mkdir()
        path = build(directory)
        path = path.rename(directory / name)
        with Child([path]) as child:
            (mapping,) = mappings_of(child.pid, [file_key(str(path))])
            assert mapping.path == str(path).removesuffix(" (deleted)")
            assert mapping.deleted == name.endswith(" (deleted)")
            assert mapping in executable_mappings(child.pid)
            assert mappings_of(child.pid, [FileKey("00:00", 12345)]) == []


def test_a_process_that_is_gone() -> None:
    child = Child([sys.executable, "-c", READY])
    child.kill()
    with pytest.raises(ProcessLookupError):
        executable_mappings(child.pid)
    assert facts(child.pid) is None
    with pytest.raises(NotFound, match=rf"no process {child.pid} on box"):
        require_process(child.pid, "box")


@needs.gcc
def test_deleted_and_replaced_files_are_told_apart(tmp_path: Path) -> None:
    path = build(tmp_path)
    code = path.read_bytes()
    old = file_key(str(path))
    with Child([path]) as child:
        path.unlink()
        build(tmp_path, "-O0")
        new = file_key(str(path))
        assert new != old
        (mapping,) = mappings_of(child.pid, [old])
        assert mapping.deleted
        if os.geteuid():
            with pytest.raises((NotFound, PermissionDenied)):
                open_mapped(child.pid, mapping)
            return
        fd = open_mapped(child.pid, mapping)
        try:
            assert os.pread(fd, len(code), 0) == code
        finally:
            os.close(fd)


def test_identity_of_what_cannot_be_mapped(tmp_path: Path) -> None:
    empty, fifo = tmp_path / "empty", tmp_path / "fifo"
    empty.touch()
    os.mkfifo(fifo)
    for path in (empty, fifo, tmp_path, Path("/dev/null"), Path("/proc/self/status")):
        with pytest.raises(ResolveError):
            file_key(str(path))
    with pytest.raises(NotFound):
        file_key(str(tmp_path / "none"))
    with pytest.raises(ResolveError):
        file_key("/a\0b")


# --- processes


def test_facts_of_a_child() -> None:
    code = "import threading; e = threading.Event(); [threading.Thread(target=e.wait, daemon=True).start() for _ in '12']; "
    with python(code + READY) as child:
        found = facts(child.pid)
        assert found is not None
        assert (found.pid, found.ppid, found.uid, found.threads) == (child.pid, os.getpid(), os.getuid(), 3)
        assert found.exe == os.path.realpath(sys.executable)
        assert found.comm == Path(f"/proc/{child.pid}/comm").read_text().strip()
        assert (found.kernel_thread, found.zombie, found.tracer_pid, found.hidden) == (False, False, 0, False)
        ticks = int(Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[19])
        assert found.start_time == ticks
        assert child.pid in pids()
        assert descends_from(child.pid, os.getpid(), ppids())
        assert not descends_from(os.getpid(), child.pid, ppids())
        tid = next(int(t) for t in os.listdir(f"/proc/{child.pid}/task") if int(t) != child.pid)
        with pytest.raises(NotFound, match=f"thread of process {child.pid}"):
            require_process(tid, "box")


def test_names_with_anything_in_them() -> None:
    code = "import ctypes, sys; ctypes.CDLL(None).prctl(15, sys.argv[1].encode(), 0, 0, 0); "
    for name in ("a) b (c", "):) 1 2", "x\ty"):
        with python(code + READY, name) as child:
            found = facts(child.pid)
            assert found is not None
            assert (found.comm, found.ppid) == (name, os.getpid())


def test_a_zombie_and_a_leader_that_ended_before_its_threads() -> None:
    child = Child([sys.executable, "-c", READY])
    child.send("")
    assert child.lines.next() is None  # it closed its output: it is ending
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    found = facts(child.pid)
    assert found is not None
    assert found.zombie
    assert ineligible(found, ())[0] == "Zombie"  # type: ignore[index]
    assert executable_mappings(child.pid) == []
    child.kill()
    code = """
import ctypes, os, threading
def last():
    while open(f"/proc/self/stat").read().rpartition(")")[2].split()[0] != "Z": pass
    print("ready", flush=True); input()
threading.Thread(target=last).start()
ctypes.CDLL(None).syscall(60, 0)
"""
    with python(code) as child:
        found = facts(child.pid)
        assert found is not None
        assert found.state == "Z"
        assert not found.zombie
        assert any("libc" in m.path for m in executable_mappings(child.pid))


def test_why_a_process_cannot_be_probed() -> None:
    me = facts(os.getpid())
    assert me is not None
    assert ineligible(me, {os.getpid()})[0] == "Self"  # type: ignore[index]
    with python(READY) as child:
        found = facts(child.pid)
        assert found is not None
        assert ineligible(found, {child.pid})[0] == "Self"  # type: ignore[index]
        assert ineligible(found, (), tracer_pid=child.pid)[0] == "Self"  # type: ignore[index]
        assert ineligible(found._replace(kernel_thread=True), ())[0] == "KernelThread"  # type: ignore[index]
        assert ineligible(found._replace(hidden=True), ())[0] == "PermissionDenied"  # type: ignore[index]


@needs.ptrace_any
def test_an_eligible_process() -> None:
    with python(READY) as child:
        found = facts(child.pid)
        assert found is not None
        assert ineligible(found, {os.getpid()}) is None


@needs.ptrace
def test_another_tracer_is_seen() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = [ctypes.c_long] * 4
    with python(READY) as child:
        assert libc.ptrace(0x4206, child.pid, 0, 0) == 0, os.strerror(ctypes.get_errno())  # PTRACE_SEIZE
        found = facts(child.pid)
        assert found is not None
        reason, message = ineligible(found, ()) or ("", "")
        assert reason == "TracedByOther"
        assert str(os.getpid()) in message
        ours = ineligible(found, (), tracer_pid=os.getpid())
        assert ours is None or ours[0] == "PermissionDenied"


def test_the_list() -> None:
    with python(READY) as child:
        listed = {p.pid: p for p in list_processes("hst_1", {os.getpid()})}
        found, me = listed[child.pid], listed[os.getpid()]
        assert found.id.startswith("hst_1:")
        assert found.id.endswith(f":{child.pid}:{found.start_time}")
        assert re.search(r"-c print\('ready'", found.cmdline)
        assert found.user
        assert (me.eligible, me.reason) == (False, "Self")
        assert found.model_dump_json()
        theirs = {int(line) for line in run(["ps", "-e", "-o", "pid="]).stdout.split()}
        assert {os.getpid(), child.pid, 1} <= set(listed) & theirs


def test_selectors() -> None:
    with python(READY) as child:
        found = facts(child.pid)
        assert found is not None
        for where, matches in [
            ({}, True),
            ({"pid": str(child.pid)}, True),
            ({"pid": str(os.getpid())}, False),
            ({"tree": str(os.getpid())}, True),
            ({"tree": str(child.pid)}, True),
            ({"comm": found.comm[:3] + "*"}, True),
            ({"comm": "nothing*"}, False),
            ({"exe": found.exe}, True),
            ({"exe": os.path.basename(found.exe)}, True),
            ({"exe": "/nowhere/*"}, False),
            ({"uid": str(os.getuid())}, True),
            ({"uid": str(os.getuid() + 1)}, False),
            ({"uid": "nobody-of-that-name"}, False),
            ({"host": "elsewhere"}, True),
            ({"comm": found.comm, "uid": str(os.getuid() + 1)}, False),
        ]:
            assert Selector(where).matches(found) is matches, where
        mine = facts(os.getpid())
        assert mine is not None
        assert not Selector({"tree": str(child.pid)}).matches(mine)
    assert with_numbers({"uid": "root", "host": "x", "comm": "y"}, "box") == {"uid": "0", "comm": "y"}
    with pytest.raises(NotFound, match="no user"):
        with_numbers({"uid": "nobody-of-that-name"}, "box")
