"""Probes by names that are not in the symbol table as they are written: every call counts, as the target counts them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support import needs
from tests.support.children import run
from tests.system.stack import TRAPLINE
from tests.unit.symbols.programs import build, build_with, strip
from tests.unit.symbols.test_usdt import USDT

CPP = """
#include <cstdio>
namespace shop {
struct Till { int sum = 0; __attribute__((noinline)) int ring(int n) { return sum += n; } int ring(const char *); };
__attribute__((noinline)) int Till::ring(const char *s) { return sum += s[0]; }
}
int main() {
    shop::Till till; int calls = 0;
    puts("ready"); fflush(stdout);
    for (int c; (c = getchar()) != EOF; calls++) { till.ring(c); if (c == 'x') till.ring("x"); }
    printf("%d\\n", calls);
}
"""


def hits(probe: str, program: Path, text: str, state: Path) -> list[dict[str, object]]:
    """Traces a program that is given a text, and returns its hits."""
    argv = [*TRAPLINE, "trace", "--json", probe, "--", "sh", "-c", f"printf {text} | {program}"]
    done = run(argv, env={"TRAPLINE_STATE_DIR": str(state)}, timeout=60)
    assert done.returncode == 0, done.stderr
    rows = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
    return [row for row in rows if "site" in row]


@needs.ptrace
@needs.gcc
@needs.binutils
@pytest.mark.parametrize("stripped", [False, True])
def test_every_usdt_hit_of_both_places(tmp_path: Path, stripped: bool) -> None:
    program = build(tmp_path, "-O2", source=USDT)
    program = strip(program) if stripped else program
    found = hits(f"usdt:{program}:shop:sold", program, "1234567", tmp_path / "state")
    assert [row["site"] for row in found] == [f"{program.name}:shop:sold"] * 14


@needs.ptrace
@needs.gxx
@pytest.mark.parametrize(
    ("point", "count"),
    [
        ('"shop::Till::ring"', 9),
        ('"shop::Till::ring(int)"', 7),
        ('"shop::Till::ring(char const*)"', 2),
        ("shop::Till::*", 9),
        ("/^shop::.*ring.int/", 7),
        ("/Till4ringEPKc$/", 2),
    ],
)
def test_every_call_of_a_cpp_function(tmp_path: Path, point: str, count: int) -> None:
    program = build_with("g++", tmp_path, CPP, "till.cpp", "-O2")
    assert len(hits(f"{program}:{point}", program, "12x45x7", tmp_path / "state")) == count
