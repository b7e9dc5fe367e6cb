"""Processes and mappings out of the ordinary: each is probed with exact counts and unharmed, or refused by a reason of its
own. docs/architecture/odd-targets.md is the list.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engines.host import Host, untouched
from tests.support import needs
from tests.support.children import TIMEOUT_S, Child, fields, run
from tests.support.targets import Targets
from trapline.errors import Unsupported
from trapline.spec import parse_probe
from trapline_agent.kernel import procfs
from trapline_agent.resolve import Resolver
from trapline_agent.targets.maps import executable_mappings

pytestmark = [needs.gcc, needs.ptrace_any, needs.x86_64]

STATIC = [
    pytest.param("gcc", ("-static",), id="glibc-static"),
    pytest.param("gcc", ("-static-pie",), id="glibc-static-pie"),
    pytest.param("musl-gcc", (), id="musl", marks=needs.musl),
    pytest.param("musl-gcc", ("-static",), id="musl-static", marks=needs.musl),
]


def refusals(probe: object) -> set[tuple[str, str]]:
    return {(t.state, t.reason) for t in probe.targets}  # type: ignore[attr-defined]


@contextlib.contextmanager
def untouched_memory(pid: int) -> Iterator[None]:
    """``untouched`` for a process whose files' paths mean something else here: memory is as it was before."""

    def code() -> list[bytes]:
        with open(f"/proc/{pid}/mem", "rb", 0) as memory:
            return [os.pread(memory.fileno(), m.end - m.start, m.start) for m in executable_mappings(pid)]

    before = code()
    yield
    assert code() == before
    assert {procfs.tracer(tid) for tid in procfs.tasks(pid)} == {0}


# --- other kinds of programs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("compiler", "flags"), STATIC)
def test_p9_other_libraries_and_none(host: Host, targets: Targets, compiler: str, flags: tuple[str, ...]) -> None:
    program = targets.build("hot", *flags, compiler=compiler)
    with Child([program, "4"]) as child, untouched(child.pid):
        probe = host.register(host.files.plan(program, "target_hot"), pid=child.pid)
        child.ask("call 100")
        child.ask("start")
        while probe.hits < 1000:
            pass
        child.ask("stop")
        count = child.count()
        assert probe.hits == count["done"] == count["begun"]
        assert count["wrong"] == 0
        probe.unregister()
        host.engine.close()


@needs.musl
def test_a_library_that_musl_opens_is_armed_before_it_runs(host: Host, targets: Targets) -> None:
    library = targets.build("dlfn", "-shared", "-fPIC", compiler="musl-gcc")
    program = targets.build("dl", compiler="musl-gcc")
    host.table.set_loaders(Resolver("h", "h", {os.getpid()}, 0).loaders())
    with Child([program, library]) as child:
        probe = host.register(host.files.plan(library, "dlfn"), pid=child.pid)
        child.ask("open")
        child.ask("call 10")
        assert probe.hits == child.count()["done"] == 10
        assert not any(t.may_have_missed for t in probe.targets)


def test_p9_a_32_bit_process_is_refused(host: Host, targets: Targets) -> None:
    """It maps 64-bit code all the same: as data, which is the only way."""
    flags = ("-m32", "-nostdlib", "-static", "-ffreestanding", "-fno-pic", "-no-pie", "-fno-stack-protector")
    mapped = targets.build("hot")
    program = targets.build("thirty_two", *flags)
    with Child([program, mapped]) as child, untouched(child.pid):
        by_name = host.register(host.files.plan(mapped, "target_hot"), comm="thirty_two")
        assert refusals(by_name) == {("refused", "ThirtyTwoBit")}
        assert host.engine.processes() == [], "nobody needs to attach to it"
        by_number = host.register(host.files.plan(mapped, "target_hot"), probe="q", pid=child.pid)
        assert refusals(by_number) == {("refused", "ThirtyTwoBit")}
        assert child.ask("") == "right"
        by_name.unregister()
        by_number.unregister()
        host.engine.close()
        assert child.ask("") == "right"


# --- odd mappings -----------------------------------------------------------------------------------------------------


def test_first_and_last_byte_of_a_mapping_that_is_split(host: Host, targets: Targets) -> None:
    program = targets.build("mappings")
    plans = [host.files.plan(program, s, i) for i, s in enumerate(("page_first", "page_last"))]
    with targets.run("mappings") as child:
        child.ask("split")
        with untouched(child.pid):
            probe = host.register(plans, pid=child.pid)
            assert probe.states() == {"armed": 2}
            child.ask("first 10")
            child.ask("last 5")
            assert probe.hits == 15
            assert child.count()["wrong"] == 0
            probe.unregister()
            host.engine.close()


@pytest.mark.parametrize("before", [True, False])
def test_a_file_that_is_mapped_twice(host: Host, targets: Targets, before: bool) -> None:
    program = targets.build("mappings")
    with targets.run("mappings") as child, untouched(child.pid):
        if before:
            child.ask("alias private")
        probe = host.register(host.files.plan(program, "page_first"), pid=child.pid)
        if not before:
            child.ask("alias private")
            host.reconcile(child.pid)
        assert probe.states() == {"armed": 2}
        child.ask("first 10")
        child.ask("again 20")
        count = child.count()
        assert (probe.hits, count["first"], count["wrong"]) == (30, 30, 0)
        probe.unregister()
        host.engine.close()


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize(("how", "reason"), [("writable", "WritableMapping"), ("shared", "SharedMapping")])
def test_writable_and_shared_mappings_are_refused(
    host: Host, targets: Targets, how: str, reason: str, before: bool
) -> None:
    """Those that come later too (semantics R15), and beside one that is armed."""
    program = targets.build("mappings")
    content = program.read_bytes()
    with targets.run("mappings") as child:
        if before:
            child.ask(f"alias {how}")
        probe = host.register(host.files.plan(program, "page_first"), pid=child.pid)
        if not before:
            child.ask(f"alias {how}")
            host.reconcile(child.pid)
        assert refusals(probe) == {("armed", ""), ("refused", reason)}
        (refused,) = (t for t in probe.targets if t.state == "refused")
        assert "mapped" in refused.message
        child.ask("first 5")
        child.ask("again 5")
        assert (probe.hits, child.count()["wrong"]) == (5, 0)
    assert program.read_bytes() == content


def test_a_page_that_is_unmapped_and_mapped_again(host: Host, targets: Targets) -> None:
    """Nobody tells of it: what is armed is what memory says, not what was written once (semantics R12)."""
    program = targets.build("mappings")
    with targets.run("mappings") as child:
        probe = host.register(host.files.plan(program, "page_first"), pid=child.pid)
        child.ask("first 5")
        child.ask("unmap")
        host.reconcile(child.pid)
        assert probe.states() == {"gone": 1}
        child.ask("map")
        host.reconcile(child.pid)
        assert probe.states() == {"armed": 1}
        child.ask("first 5")
        child.ask("map")  # over the other: the breakpoint went with that
        child.ask("first 7")
        host.reconcile(child.pid)
        child.ask("first 5")
        assert (probe.hits, child.count()["wrong"]) == (15, 0)
        assert [t.may_have_missed for t in probe.targets] == [True], "7 calls were, and it says so"
        with untouched(child.pid):
            probe.unregister()
            host.engine.close()


@pytest.mark.parametrize("told", [True, False])
def test_other_code_at_the_address_is_not_written_to(host: Host, targets: Targets, told: bool) -> None:
    program = targets.build("mappings")
    with targets.run("mappings") as child:
        probe = host.register(host.files.plan(program, "page_first"), pid=child.pid)
        child.ask("first 5")
        child.ask("other")
        if told:
            host.reconcile(child.pid)
            assert probe.states() == {"gone": 1}
        child.ask("first 5")
        probe.unregister()
        host.engine.close()
        child.ask("first 5")
        assert (probe.hits, child.count()["wrong"]) == (5, 0)


@pytest.mark.parametrize("told", [True, False])
def test_r12_code_that_moves_takes_the_breakpoint_along(host: Host, targets: Targets, told: bool) -> None:
    program = targets.build("mappings")
    with targets.run("mappings") as child:
        probe = host.register(host.files.plan(program, "page_first"), pid=child.pid)
        child.ask("first 5")
        child.ask("move")
        if told:
            host.reconcile(child.pid)
        child.ask("first 5")
        assert (probe.hits, child.count()["wrong"]) == (10, 0)
        with untouched(child.pid):
            probe.unregister()
            host.engine.close()
        child.ask("first 5")


def test_code_that_moves_and_is_left_before_it_runs(host: Host, targets: Targets) -> None:
    program = targets.build("mappings")
    with targets.run("mappings") as child:
        probe = host.register(host.files.plan(program, "page_first"), pid=child.pid)
        child.ask("move")
        with untouched(child.pid):
            probe.unregister()
            host.engine.close()
        child.ask("first 5")
        assert (probe.hits, child.count()["wrong"]) == (0, 0)


def test_code_that_the_loader_changes_is_refused(host: Host, targets: Targets) -> None:
    """The bytes are the file's when they are looked at, and changed afterwards: the loader reports before it relocates."""
    library = targets.build("textrel", "-shared", "-fno-pic", "-Wl,-z,notext")
    resolver = Resolver("h", "h", {os.getpid()}, 0)
    with pytest.raises(Unsupported) as refused:
        resolver.resolve(parse_probe(f"{library}:dlfn"))
    assert refused.value.reason == "TextRelocation"
    (plan,) = resolver.resolve(parse_probe(f"{library}:inner")).plans
    with targets.run("dl", library) as child:
        probe = host.register(plan, pid=child.pid)
        child.ask("open")
        child.ask("call 10")
        assert (probe.hits, child.count()["wrong"]) == (10, 0)


# --- odd places -------------------------------------------------------------------------------------------------------


def _below(pid: int) -> int:
    """The process that one has started, by this host's numbers."""
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text())


PLACES = {
    "mount": "mount --make-rprivate / && mount --bind {there} {here} && exec {here} 1",
    "overlay": "mount --make-rprivate / && mount -t overlay overlay -o"
    " lowerdir={there_dir},upperdir={dir}/up,workdir={dir}/work {dir}/merged && exec {dir}/merged/hot 1",
    "copied-up": "mount --make-rprivate / && mount -t overlay overlay -o"
    " lowerdir={there_dir},upperdir={dir}/up,workdir={dir}/work {dir}/merged && cat /dev/null >>{dir}/merged/hot"
    " && exec {dir}/merged/hot 1",
    "chroot": "exec chroot {there_dir} /hot 1",
    "tmpfs": "mount --make-rprivate / && mount -t tmpfs tmpfs {dir}/merged && cp {there} {dir}/merged"
    " && exec {dir}/merged/hot 1",
    "pids": "exec unshare -pf --mount-proc {there} 1",
    "user": "exec unshare -Ur {there} 1",
}


@needs.mounts
@pytest.mark.parametrize("place", PLACES)
def test_p8_files_in_namespaces_of_their_own(host: Host, targets: Targets, tmp_path: Path, place: str) -> None:
    """Its path leads elsewhere here, or nowhere, and on overlayfs stat(2) and the maps differ (semantics P8)."""
    here = targets.copy(targets.build("hot"))
    there = targets.copy(targets.build("hot", "-static"))
    for name in ("up", "work", "merged"):
        (tmp_path / name).mkdir()
    script = PLACES[place].format(here=here, there=there, there_dir=there.parent, dir=tmp_path)
    with Child(["unshare", "-m", "sh", "-c", script]) as child, Child([here, "1"]) as other, untouched(other.pid):
        pid = _below(child.pid) if place == "pids" else child.pid
        with untouched_memory(pid):
            (plan,) = Resolver("h", "h", {os.getpid()}, 0).resolve(parse_probe(f"hot:target_hot @ pid={pid}")).plans
            probe = host.register(plan)
            assert {(t.pid, t.state) for t in probe.targets} == {(pid, "armed")}
            child.ask("call 10")
            other.ask("call 10")
            assert probe.hits == child.count()["done"] == 10
            probe.unregister()
            host.engine.close()
        child.ask("call 10")


def test_a_program_in_memory_alone(host: Host, targets: Targets) -> None:
    code = (
        "import os, sys\nfd = os.memfd_create('hot')\nos.write(fd, open(sys.argv[1], 'rb').read())\n"
        "os.execve(fd, ['hot', '1'], os.environ)"
    )
    with Child([sys.executable, "-c", code, targets.build("hot")]) as child:
        (plan,) = Resolver("h", "h", {os.getpid()}, 0).resolve(parse_probe(f"*:target_hot @ pid={child.pid}")).plans
        probe = host.register(plan)
        child.ask("call 10")
        assert probe.hits == 10


@pytest.mark.parametrize("how", ["deleted", "replaced"])
def test_a_program_that_was_deleted_and_its_inode_number(host: Host, targets: Targets, how: str) -> None:
    """The number is kept from being given to another file for as long as a probe is on it (semantics R9)."""
    program = targets.copy(targets.build("hot"))
    plan = host.files.plan(program, "target_hot")
    with Child([program, "1"]) as child:
        program.unlink()
        if how == "replaced":
            shutil.copy2(targets.build("hot"), program)
        probe = host.register(plan, comm="hot")
        child.ask("call 5")
        assert probe.hits == 5
        child.ask("quit")
        child.wait()
    for i in range(50):
        successor = program.with_name(f"successor{i}")
        shutil.copy2(targets.build("hot"), successor)
        assert host.files.plan(successor, "target_hot").file != plan.file
    with Child([program.with_name("successor0"), "1"]) as other:
        host.reconcile(other.pid)
        other.ask("call 5")
    assert probe.hits == 5


# --- confined and stopped processes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["strict", "filter", "undumpable", "no-privileges"])
@pytest.mark.parametrize("before", [True, False])
def test_confined_processes(host: Host, targets: Targets, how: str, before: bool) -> None:
    """Nothing is asked of them that they may not do."""
    program = targets.build("odd")
    with targets.run("odd") as child:
        with untouched_memory(child.pid):
            if before:
                child.ask(how)
            probe = host.register(host.files.plan(program, "target_odd"), pid=child.pid)
            if not before:
                child.ask("call 1")
                child.ask(how)
            child.ask("call 10")
            assert probe.hits == child.count()["calls"]
            probe.unregister()
            host.engine.close()
        child.ask("call 10")
        assert child.count()["wrong"] == 0


def _state(pid: int, tid: int | None = None) -> str:
    return procfs.stat_fields(pid, tid)[0].decode()


def _wait_until_stopped(child: Child, states: str) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not (now := {_state(child.pid, t) for t in procfs.tasks(child.pid)}) <= set(states):
        assert now != {"Z"}, child.obituary()
        assert time.monotonic() < deadline, now


def _wait_until_ended(tid: int) -> None:
    """Waits until a thread is a zombie: who joins it hears of its end before."""
    deadline = time.monotonic() + TIMEOUT_S
    while _state(tid) != "Z":
        assert time.monotonic() < deadline


@pytest.mark.parametrize("running", [True, False])
def test_stopped_processes_are_armed_and_left_stopped(host: Host, targets: Targets, running: bool) -> None:
    """Running ones are caught anywhere: in a slot, and on a breakpoint whose SIGTRAP comes behind the stop."""
    program = targets.build("hot")
    plan = host.files.plan(program, "target_hot")
    with targets.run("hot", "6") as child:

        def stop() -> None:
            os.kill(child.pid, signal.SIGSTOP)  # not Popen's way: that waits too, and would steal our tracees' stops
            _wait_until_stopped(child, "Tt")

        if running:
            child.ask("start")
        for cycle in range(60 if running else 3):
            stop()
            probe = host.register(plan, probe=f"p{cycle}", pid=child.pid)
            assert probe.states() == {"armed": 1}
            assert _state(child.pid) in "Tt"
            os.kill(child.pid, signal.SIGCONT)
            first = child.count()
            child.ask("call 5")
            last = child.count()
            assert last["done"] - first["begun"] <= probe.hits
            stop()
            with untouched(child.pid):
                probe.unregister()
                host.engine.close()
            _wait_until_stopped(child, "T")  # a thread that its tracer leaves goes back there by itself
            if not running:
                assert probe.hits == 5
            os.kill(child.pid, signal.SIGCONT)
        child.ask("call 5")
        assert child.count()["wrong"] == 0


def test_a_leader_that_ends_while_it_is_followed(host: Host, targets: Targets) -> None:
    program = targets.build("odd")
    with targets.run("odd", "leader-leaves") as child:
        probe = host.register(host.files.plan(program, "target_odd"), pid=child.pid)
        child.ask("call 5")
        child.ask("leave")
        _wait_until_ended(child.pid)
        child.ask("call 5")
        host.reconcile(child.pid)
        child.ask("call 5")
        assert probe.hits == 15
        probe.unregister()
        host.engine.close()
        child.ask("call 5")
        assert (probe.hits, child.count()["calls"]) == (15, 20)


# --- children and images ----------------------------------------------------------------------------------------------


def test_p7_a_child_that_asked_not_to_be_followed(host: Host, targets: Targets) -> None:
    """CLONE_UNTRACED: the kernel tells of no such child, which has its parent's breakpoints. It is safe from the next look
    at the host's processes on; see docs/architecture/odd-targets.md for what happens before."""
    program = targets.build("odd")
    with targets.run("odd") as child:
        probe = host.register(host.files.plan(program, "target_odd"))
        held = int(child.ask("hold 20").split()[-1])
        assert procfs.tracer(held) == 0
        host.looks.run(host.table.candidates, "reconcile")
        assert {(t.pid, t.state) for t in probe.targets} == {(child.pid, "armed"), (held, "armed")}
        assert fields(child.ask("go")) == {"status": 0}
        assert probe.hits == 20


@pytest.fixture
def readable(targets: Targets) -> Iterator[Path]:
    """A directory that every user may read."""
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        Path(directory).chmod(0o755)
        yield Path(directory)


def _setuid(targets: Targets, directory: Path) -> tuple[Path, Path]:
    """Returns a program that execs others, and one that is root whoever execs it."""
    program = Path(shutil.copy(targets.build("execs"), directory / "execs"))
    privileged = Path(shutil.copy(targets.build("odd"), directory / "privileged"))
    privileged.chmod(0o4755)
    return program, privileged


NOBODY = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]


@needs.root
def test_p6_a_setuid_program_keeps_its_privileges(host: Host, targets: Targets, readable: Path) -> None:
    """The tracer has CAP_SYS_PTRACE: kernel, security/commoncap.c, cap_bprm_creds_from_file."""
    program, privileged = _setuid(targets, readable)
    with Child([*NOBODY, program]) as child:
        plans = [host.files.plan(program, "target_execs"), host.files.plan(privileged, "target_odd", 1)]
        probe = host.register(plans, pid=child.pid)
        child.ask("call 5")
        child.send(f"other {privileged}")
        child.wait_for("ready")
        assert fields(child.ask("ids")) == {"uid": 65534, "euid": 0}
        child.ask("call 5")
        assert probe.hits == 10


_TRACER = """
import sys
from pathlib import Path
from tests.engines.host import Host
from tests.support.children import Child
from trapline_agent.engines.ptrace.engine import PtraceEngine
host = Host(PtraceEngine)
program, privileged, how = sys.argv[1:]
print(host.engine.capabilities().reason)
with Child([program]) as child:
    host.register(host.files.plan(Path(program), "target_execs"), pid=child.pid)
    if how == "left":
        host.unregister()
        host.engine.close()
    child.send(f"other {privileged}")
    child.wait_for("ready")
    print(child.ask("ids"))
    host.close()
"""


@needs.root
@needs.unprivileged
@pytest.mark.parametrize(("how", "euid"), [("followed", 65534), ("left", 0)])
def test_a_setuid_program_under_an_ordinary_users_tracer(targets: Targets, readable: Path, how: str, euid: int) -> None:
    """The kernel gives it no privileges, as under strace and gdb, and nobody can prevent that: it is said beforehand."""
    program, privileged = _setuid(targets, readable)
    result = run([*NOBODY, sys.executable, "-c", _TRACER, program, privileged, how])
    restriction, ids = result.stdout.splitlines()
    assert "setuid" in restriction
    assert fields(ids) == {"uid": 65534, "euid": euid}, result.stderr
