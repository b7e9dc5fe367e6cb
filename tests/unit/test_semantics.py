"""Every rule has a row in docs/architecture/semantics.md, and what the row names is there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
PAGE = ROOT / "docs/architecture/semantics.md"
RULES = [f"{letter}{n}" for letter, count in (("R", 19), ("H", 7), ("P", 11), ("S", 5)) for n in range(1, count + 1)]
PACKAGES = ("", "agent/trapline_agent", "service/trapline_service")


def _rows() -> list[list[str]]:
    lines = [line for line in PAGE.read_text().splitlines() if re.match(r"\| [RHPS]\d+ \|", line)]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def _tests() -> dict[str, str]:
    """Returns the tests, and the modules of tests, with the source of each module."""
    found = {}
    for path in (ROOT / "tests").rglob("test_*.py"):
        source = path.read_text()
        found[path.stem] = source
        found |= dict.fromkeys(re.findall(r"^(?:async )?def (test_\w+)", source, re.M), source)
    return found


def test_every_rule_has_one_row() -> None:
    assert [row[0] for row in _rows()] == RULES
    assert all(len(row) == 5 and all(row) for row in _rows())


def test_what_a_row_names_is_there() -> None:
    tests = _tests()
    for rule, _, cited, code, _ in _rows():
        named = re.findall(r"`(test_\w+)`", cited)
        assert named or cited.startswith("Not yet"), rule
        assert [t for t in named if t not in tests] == [], rule
        files = re.findall(r"`([\w/]+\.py)`", code)
        assert files, rule
        assert [f for f in files if not any((ROOT / p / f).exists() for p in PACKAGES)] == [], rule


def test_a_test_that_bears_a_rule_in_its_name_is_in_that_rule_s_row() -> None:
    """And so a rule that gets a test gets it here too."""
    rows = {row[0]: row[2] for row in _rows()}
    for name in _tests():
        if bearing := re.match(r"test_((?:[rhps]\d+_)+)", name):
            for rule in bearing[1].upper().strip("_").split("_"):
                assert rule in rows, name
                cited = re.findall(r"`(test_\w+)`", rows[rule])
                assert any(re.match(rf"test_(\w+_)?{rule.lower()}_", c) for c in cited), f"{name}: {rule} cites {cited}"
