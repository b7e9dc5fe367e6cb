"""The support itself: targets that count right when nobody probes them, children that die, skips in the ledger."""

from __future__ import annotations

import ast
import os
import selectors
import signal
import sys
from pathlib import Path

import pytest

from tests.support import children, needs
from tests.support.children import Child, ChildDied
from tests.support.targets import Targets

TESTS = Path(__file__).resolve().parent.parent


@needs.gcc
def test_hot_counts_its_calls(targets: Targets) -> None:
    with targets.run("hot", "3") as hot:
        assert hot.ask("call 5 some text").startswith("called 5 ns=")
        assert hot.ask("callp 2 0") == "called 2"
        assert hot.ask("six") == "six 15"
        hot.ask("start")
        hot.ask("spawn 2")
        hot.ask("stop")
        first = hot.count()
        assert first["begun"] == first["done"] >= 7
        assert first["threads"] == 5
        assert first["wrong"] == 0
        assert hot.count() == first, "it stands still"


@needs.gcc
def test_forks_counts_every_kind_of_child(targets: Targets) -> None:
    with targets.run("forks") as forks:
        for kind in ("fork", "vfork", "spawn", "clone", "thread", "call"):
            forks.ask(f"{kind} 10")
        held = children.fields(forks.ask("hold 3").replace("held ", "pid="))["pid"]
        assert Path(f"/proc/{held}/maps").exists()
        forks.ask("go")
        forks.ask("storm")
        forks.ask("calm")
        count = forks.count()
        assert count["begun"] == count["done"] >= 63
        assert count["children"] >= 5
        assert count["failed"] == 0


@needs.gcc
def test_execs_counts_over_all_images(targets: Targets) -> None:
    with targets.run("execs") as execs:
        execs.ask("call 3")
        for command in ("exec", "exec-thread", "storm 4", "storm-thread 4"):
            assert execs.ask(command) == f"ready {execs.pid}"
        count = execs.count()
        assert (count["begun"], count["images"], count["wrong"]) == (3 + 2 * 4 * 5, 1 + 2 + 8, 0)
        assert execs.ask("other /bin/echo another image") == "another image"
        assert execs.wait() == 0


@needs.gcc
def test_dl_opens_and_closes(targets: Targets) -> None:
    library = targets.library()

    def mapped(child: Child) -> bool:
        return str(library) in Path(f"/proc/{child.pid}/maps").read_text()

    with targets.run("dl", library) as dl:
        assert not mapped(dl)
        dl.ask("open")
        assert mapped(dl)
        dl.ask("call 4")
        dl.ask("close")
        assert not mapped(dl)
        dl.ask("cycle 3 2")
        count = dl.count()
        assert (count["begun"], count["opens"], count["wrong"]) == (10, 4, 0)


@needs.gcc
@needs.x86_64
def test_prologues_agree_with_themselves(targets: Targets) -> None:
    with targets.run("prologues") as prologues:
        names = prologues.ask("list").split()[1:]
        assert len(names) > 100
        assert prologues.ask("run all 2").endswith("wrong=0"), prologues.ask("why")
        count = prologues.count()
        assert all(count[name.removeprefix("p_")] >= 128 for name in names)
        assert count["calls"] == sum(count[name.removeprefix("p_")] for name in names)


@needs.gcc
@needs.x86_64
def test_signals_are_all_handled(targets: Targets) -> None:
    with targets.run("signals", "2") as signals:
        before = signals.count()
        signals.ask("start")
        while signals.count()["handled"] < before["handled"] + 100:
            pass
        signals.ask("stop")
        count = signals.count()
        assert count["sent"] == count["handled"]
        assert count["inner"] == count["handled"] + count["timers"]
        assert (count["wrong"], count["outside"]) == (0, 0)


@needs.gcc
def test_blocking_waits_without_being_interrupted(targets: Targets) -> None:
    with targets.run("blocking") as blocking:
        blocking.ask("wake")
        count = blocking.count()
        assert count["loops"] >= 20
        assert (count["eintr"], count["failed"]) == (0, 0)


@needs.gcc
def test_blocking_notices_an_interrupted_wait(targets: Targets) -> None:
    """The oracle itself: a stop and continuation, which is what an INTERRUPT looks like to it, must show."""
    with targets.run("blocking") as blocking:
        while blocking.count()["eintr"] == 0:
            blocking.signal(signal.SIGSTOP)
            blocking.signal(signal.SIGCONT)
        assert blocking.count()["epoll_wait.eintr"] + blocking.count()["semtimedop.eintr"] > 0


@needs.gcc
@pytest.mark.parametrize(
    ("mode", "action", "blocked", "pending"),
    [
        ("default", "default", 0, 0),
        ("handler", "ours", 0, 0),
        ("ignored", "ignored", 0, 0),
        ("blocked", "default", 1, 1),
        ("blocked-handler", "ours", 1, 1),
    ],
)
def test_sigstate_says_what_the_kernel_says(
    targets: Targets, mode: str, action: str, blocked: int, pending: int
) -> None:
    with targets.run("sigstate", mode) as sigstate:
        sigstate.ask("call 2")
        if mode == "handler":
            sigstate.ask("trap 3")
        if mode != "default":
            sigstate.ask("raise 2")
        assert sigstate.ask("state") == f"state action={action} blocked={blocked} pending={pending}"
        count = sigstate.count()
        expected = (2, 0, 3, 2, 0) if mode == "handler" else (2, 0, 0, 0, 0)
        assert tuple(count[k] for k in ("calls", "wrong", "traps", "raised", "strange")) == expected


@needs.gcc
def test_a_target_is_built_once_for_each_set_of_flags(targets: Targets) -> None:
    assert targets.build("hot") == targets.build("hot")
    assert targets.build("hot", "-O0") != targets.build("hot")
    copy = targets.copy(targets.build("hot"))
    assert copy.read_bytes() == targets.build("hot").read_bytes()
    assert copy.stat().st_ino != targets.build("hot").stat().st_ino


def test_a_child_killed_by_a_signal_fails_its_test() -> None:
    with pytest.raises(ChildDied, match="SIGTRAP"):  # noqa: PT012, SIM117 - it is raised on leaving the inner one
        with children.python("print('ready', flush=True); input()") as child:
            child.signal(signal.SIGTRAP)
            child.wait()


def test_a_child_that_never_gets_ready_says_its_last_words() -> None:
    with pytest.raises(ChildDied, match=r"exit status 3.*the reason"):
        Child(["sh", "-c", "echo the reason >&2; exit 3"])


def test_a_child_dies_with_its_parent() -> None:
    code = (
        "import sys\nfrom tests.support.children import Child\n"
        "c = Child(['cat'], ready=None)\nprint('ready', c.pid, flush=True)\ninput()"
    )
    with Child([sys.executable, "-c", code], env={"PYTHONPATH": str(TESTS.parent)}) as parent:
        grandchild = int(parent.ready_line.split()[1])
        pidfd = os.pidfd_open(grandchild)
        try:
            parent.popen.kill()
            parent.wait()
            poll = selectors.PollSelector()
            poll.register(pidfd, selectors.EVENT_READ)
            assert poll.select(children.TIMEOUT_S), "the grandchild still runs"
        finally:
            os.close(pidfd)
        parent.popen.returncode = 0  # it was this test that killed it


def test_the_ledger_has_each_need_and_nothing_else() -> None:
    rows = needs.ledger()
    assert set(rows) == set(needs.ALL)
    assert all(row.reason for row in rows.values())


SKIPS = {"skip", "skipif", "importorskip", "xfail", "exit"}


def test_every_skip_of_the_tree_goes_through_a_need() -> None:
    """A skip that has no name in the ledger would be a test that silently never runs."""
    found = []
    for path in TESTS.rglob("*.py"):
        if path == Path(needs.__file__).resolve():
            continue
        for node in ast.walk(ast.parse(path.read_text(), str(path))):
            if isinstance(node, ast.Attribute) and node.attr in SKIPS:
                owner = ast.unparse(node.value)
                if owner.split(".")[0] in ("pytest", "unittest"):
                    found.append(f"{path.relative_to(TESTS)}:{node.lineno} {owner}.{node.attr}")
    assert not found, "use tests.support.needs"


def test_every_need_that_is_asked_for_exists() -> None:
    for path in TESTS.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(), str(path))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.needs":
                names = [a.value for a in node.args if isinstance(a, ast.Constant)]
                assert set(names) <= set(needs.ALL), f"{path}:{node.lineno}"


def test_no_test_sleeps() -> None:
    """The house rule: wait for the event."""
    found = []
    for path in TESTS.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(), str(path))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("time.sleep", "asyncio.sleep"):
                zero = bool(node.args) and isinstance(node.args[0], ast.Constant) and node.args[0].value == 0
                if not zero:
                    found.append(f"{path.relative_to(TESTS)}:{node.lineno}")
    assert not found
