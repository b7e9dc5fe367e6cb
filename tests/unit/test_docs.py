"""The documentation says what is so: its links lead somewhere, its commands and probes are real, its tables are whole."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main

from trapline.cli.app import app
from trapline.errors import Unsupported
from trapline.spec import parse_probe, require_supported

ROOT = Path(__file__).resolve().parent.parent.parent
CODE = ("trapline", "agent/trapline_agent", "service/trapline_service")
REFUSALS = ROOT / "docs/architecture/life-of-a-probe.md"
LANGUAGE = ROOT / "docs/probe-language.md"


def _pages() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode:  # an unpacked archive
        return [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    return [ROOT / line for line in listed.stdout.split("\n") if line and (ROOT / line).exists()]


PAGES = _pages()


def _blocks(page: Path, language: str) -> list[str]:
    """Returns the lines of a page's fenced blocks of a language; empty ones left out."""
    found = re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.S | re.M)
    return [line for block in found for line in block.splitlines() if line.strip()]


def _anchors(page: Path) -> set[str]:
    """Returns the anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ +(.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        to = (page.parent / path).resolve() if path else page
        assert to.exists(), f"{page.name} links to {target}"
        assert ROOT in to.parents, f"{page.name} links to {target}, out of the repository"
        assert not anchor or anchor in _anchors(to), f"{page.name} links to {target}, which has no such heading"


def test_every_page_of_docs_is_in_the_index() -> None:
    index = (ROOT / "docs/README.md").read_text()
    pages = [p for p in PAGES if ROOT / "docs" in p.parents and p.name != "README.md"]
    assert len(pages) > 5
    assert [str(p.relative_to(ROOT / "docs")) for p in pages if str(p.relative_to(ROOT / "docs")) not in index] == []


def _commands(text: str) -> Iterator[list[str]]:
    for code in (*re.findall(r"^```\w*\n(.*?)^```", text, re.S | re.M), *re.findall(r"`([^`\n]+)`", text)):
        for line in code.splitlines():
            if found := re.match(r"(?:\$ )?trapline( [a-z].*)", line.strip()):
                yield re.sub(r"'[^']*'", "TEXT", found[1]).split(" -- ")[0].split()


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_exist(page: Path) -> None:
    for words in _commands(page.read_text()):
        command = typer.main.get_command(app)
        while (commands := getattr(command, "commands", None)) and words:
            name = words.pop(0).rstrip(",|")
            assert name.split("|")[0] in commands, f"{page.name} shows `trapline ... {name}`"
            command = commands[name.split("|")[0]]
        options = {o for p in command.params for o in (*p.opts, *p.secondary_opts)}
        shown = {w.partition("=")[0] for w in words if re.fullmatch(r"--?[a-z][a-z-]*(=.*)?", w)}
        assert shown <= options | {"--help"}, f"{page.name} shows `{command.name}` with {shown - options}"


def test_the_readme_shows_commands() -> None:
    shown = {words[0] for words in _commands((ROOT / "README.md").read_text())}
    assert shown >= {"up", "probe", "hits", "trace", "symbols", "serve", "agent"}


@pytest.mark.parametrize("text", _blocks(LANGUAGE, "probe"))
def test_probes_that_are_shown_are_supported(text: str) -> None:
    require_supported(parse_probe(text))


@pytest.mark.parametrize("text", _blocks(LANGUAGE, "probe-later"))
def test_probes_for_later_are_refused_by_name(text: str) -> None:
    with pytest.raises(Unsupported) as e:
        require_supported(parse_probe(text))
    assert e.value.reason == "NotInThisRelease"


def test_tests_that_are_named_exist() -> None:
    source = "\n".join(p.read_text() for p in (ROOT / "tests").rglob("test_*.py"))
    defined = set(re.findall(r"def (test_\w+)", source)) | {p.stem for p in (ROOT / "tests").rglob("test_*.py")}
    named = {name for page in PAGES for name in re.findall(r"\b(test_[a-z]\w+)\b", page.read_text())}
    assert "test_r13_window_is_exact_while_threads_run" in named
    assert named - defined == set()


# --- refusals ---------------------------------------------------------------------------------------------------------

_REASON = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]*")


def _text_of(node: ast.expr) -> str | None:
    """Returns a literal text, with `{}` for what is formatted into it; None for any other expression."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(str(v.value) if isinstance(v, ast.Constant) else "{}" for v in node.values)
    return None


def _literals(node: ast.expr) -> Iterator[str]:
    if isinstance(node, ast.IfExp):
        yield from _literals(node.body)
        yield from _literals(node.orelse)
    elif text := _text_of(node):
        yield text


def _reasons_in(tree: ast.AST, *, pairs: bool) -> Iterator[str]:
    """Yields reasons in the three ways in which code gives one: `reason=...`; an argument after "refused" or a call of
    `_refuse`; and, in the agent, a pair of a word and a sentence."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            for keyword in node.keywords:
                if keyword.arg == "reason":
                    yield from _literals(keyword.value)
            words = [_text_of(a) or "" for a in node.args]
            if getattr(node.func, "attr", "") == "_refuse":
                yield from (w for w in words if _REASON.fullmatch(w))
            elif "refused" in words[:-1]:
                yield words[words.index("refused") + 1]
        elif pairs and isinstance(node, ast.Tuple) and len(node.elts) == 2:
            word, sentence = (_text_of(e) or "" for e in node.elts)
            if " " in sentence and (_REASON.fullmatch(word) or word == "{}Mapping"):
                yield word


def _reasons() -> set[str]:
    found: set[str] = set()
    for folder in CODE:
        for path in (ROOT / folder).rglob("*.py"):
            found |= set(_reasons_in(ast.parse(path.read_text()), pairs="agent" in folder))
    if "{}Mapping" in found:  # tracer/table.py
        found = found - {"{}Mapping"} | {"WritableMapping", "SharedMapping"}
    return {r for r in found if _REASON.fullmatch(r)}


def test_every_refusal_is_in_the_table_and_no_other() -> None:
    table = REFUSALS.read_text().partition("## Refusals")[2]
    rows = re.findall(r"^\| (`[^|]*) \| ([^|]*) \|", table, re.M)
    documented = {reason for cell, _ in rows for reason in re.findall(r"`([^`]+)`", cell)}
    assert all(meaning.strip() for _, meaning in rows)
    code = _reasons()
    assert len(code) > 30
    assert sorted(code - documented) == [], "reasons that the table lacks"
    assert sorted(documented - code) == [], "reasons that no code gives"
