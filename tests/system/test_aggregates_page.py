"""docs/aggregates.md: each of its examples is run, on the program that it shows, and prints what it shows."""

from __future__ import annotations

import itertools
import re
import signal
import sys
from pathlib import Path

from tests.support import children, needs
from tests.support.children import Child
from tests.support.targets import Targets
from tests.system.stack import caller

PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "aggregates.md"
_FENCES = re.compile(r"^```(\w+)\n(.*?)^```", re.S | re.M)

pytestmark = [needs.ptrace_any, needs.x86_64]


def _times_hidden(text: str) -> str:
    """Returns a table without its figures: how long something took is another time each time."""
    return " ".join(re.sub(r"(?<=\s)[\d,.]+( [num]?s\b)?", "#", text).split())


def test_every_example_prints_what_is_shown() -> None:
    (_, program), *blocks = _FENCES.findall(PAGE.read_text())
    examples = [(text.strip(), shown) for (kind, text), (_, shown) in itertools.pairwise(blocks) if kind == "aggregate"]
    assert len(examples) >= 10
    head, _, loop = program.partition("for ")
    waiting = f"{head}print('ready', flush=True)\ninput()\nfor {loop}print('done', flush=True)\ninput()\n"
    with caller(waiting) as target:
        given = [word for text, _ in examples for word in ("-e", text)]
        argv = [sys.executable, "-m", "trapline", "trace", *given, "-p", str(target.pid), "--overhead", "off"]
        with Child(argv, ready=None, session=True) as trace:
            assert trace.popen.stderr is not None
            for _ in examples:
                assert "armed in 1 process" in trace.popen.stderr.readline().decode()
            assert target.ask("go") == "done"
            trace.signal(signal.SIGINT)
            out, err = trace.popen.communicate(timeout=children.TIMEOUT_S)
        assert trace.popen.returncode == 0, err
    said = _by_title(out.decode(), [text for text, _ in examples])
    for text, shown in examples:
        if "latency" in text:
            assert _times_hidden(said[text]) == _times_hidden(shown), text
        else:
            assert said[text] == shown, text


@needs.gcc
def test_every_stack_is_what_is_shown(targets: Targets, tmp_path: Path) -> None:
    """What libc has around ``main`` is another on each system, so that the examples have the innermost frames alone."""
    program = targets.build("stacks")
    blocks = _FENCES.findall(PAGE.read_text())
    examples = [
        (kind, text, shown) for (kind, text), (_, shown) in itertools.pairwise(blocks) if kind in ("stacks", "folded")
    ]
    assert len(examples) == 3
    for kind, text, shown in examples:
        probe = text.strip().replace("stacks:", f"{program}:", 1)
        argv = ["trace", *(["--folded"] if kind == "folded" else []), "-o", tmp_path / "said", probe]
        done = children.run([sys.executable, "-m", "trapline", *argv, "--", program, "deep 3", "deep 3", "spin 2 5"])
        assert done.returncode == 0, done.stderr
        said = (tmp_path / "said").read_text()
        title = "" if kind == "folded" else f"{probe}\n"
        assert said.rstrip("\n") == f"{title}{shown}".rstrip("\n"), text


def _by_title(out: str, titles: list[str]) -> dict[str, str]:
    """Takes apart what was printed: each table has the probe's text above it, and an empty line below."""
    tables: dict[str, str] = {}
    for title, later in zip(titles, [*titles[1:], None], strict=True):
        head, _, out = out.partition(f"{title}\n")
        assert not head.strip(), head
        end = len(out) if later is None else out.index(f"\n{later}\n")
        tables[title], out = out[:end].rstrip("\n") + "\n", out[end:]
    return tables
