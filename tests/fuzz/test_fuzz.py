"""Each parser of foreign bytes, fuzzed for some seconds from real files of the machine; ``make fuzz`` does it for longer."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tests.fuzz import harnesses
from tests.support import needs
from tests.support.children import run

SECONDS = 3
ROOT = Path(__file__).resolve().parents[2]


@needs.atheris
@pytest.mark.parametrize("name", harnesses.ALL)
def test_nothing_but_a_trapline_error(name: str, tmp_path: Path) -> None:
    paths = ":".join(str(ROOT / part) for part in ("", "agent", "service"))
    done = run(
        [sys.executable, "-m", "tests.fuzz", name, str(SECONDS), str(tmp_path)], env={"PYTHONPATH": paths}, timeout=100
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-4000:]
    executed = re.search(r"stat::number_of_executed_units: (\d+)", done.stderr)
    assert executed is not None
    assert int(executed[1]) > 100
    assert re.search(r"cov: \d+", done.stderr)


@pytest.mark.parametrize("name", harnesses.ALL)
def test_seeds_are_read_without_a_fuzzer_too(name: str) -> None:
    seeds = list(harnesses.ALL[name].seeds())
    assert seeds
    for seed in seeds:
        for data in (seed, seed[: len(seed) // 2], seed[:-1], b"", seed + seed):
            harnesses.run_one(name, data)
