"""How long it takes to know a file's symbols, the first time and later; and how much memory it takes.

Each figure is of a process of its own, which has read another file before: *cold* with nothing kept of the file, *warm* with
an index on disk, *again* in the same process. The file itself is in the page cache.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from trapline_agent.symbols.index import IndexCache

SELF = [sys.executable, "-m", "benchmarks.symbols"]


def libc() -> str:
    """The libc of this process."""
    found = re.search(r"\S*/libc[.-]\S*$", Path("/proc/self/maps").read_text(), re.M)
    if found is None:
        raise SystemExit("this process maps no libc: name a file")
    return found[0]


def once(path: str, directory: Path, name: str) -> dict[str, Any]:
    """Measures in this process."""
    other = os.open("/proc/self/exe", os.O_RDONLY)
    for _ in range(2):
        IndexCache(directory=directory).get(other, "python")
    fd = os.open(path, os.O_RDONLY)
    cache = IndexCache(directory=directory)

    def ms(function: Any, *args: Any) -> float:
        began = time.perf_counter()
        function(*args)
        return (time.perf_counter() - began) * 1e3

    row = {"first": ms(cache.get, fd, path), "again": ms(cache.get, fd, path)}
    index = cache.get(fd, path)
    row |= {
        "find": ms(index.find, name or next(iter(index)).name),
        "search": ms(index.search, "alloc", 50),
        "regex": ms(lambda: list(index.regex("^no_such_name$"))),
    }
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return row | {"symbols": len(index), "source": index.source or "dynsym", "peak_mb": peak}


def measure(path: str, rounds: int) -> dict[str, Any]:
    """Returns the medians of some rounds."""
    rows: dict[str, list[dict[str, Any]]] = {"cold": [], "warm": []}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as directory:
            for kind in rows:
                argv = [*SELF, "--once", directory, path]
                rows[kind].append(json.loads(subprocess.run(argv, check=True, capture_output=True).stdout))
    warm = rows["warm"][0]
    middle = {key: statistics.median(r[key] for r in rows["warm"]) for key in ("again", "find", "search", "regex")}
    return {
        "file": path,
        "symbols": warm["symbols"],
        "source": warm["source"],
        "cold": statistics.median(r["first"] for r in rows["cold"]),
        "warm": statistics.median(r["first"] for r in rows["warm"]),
        **middle,
        "peak_mb": max(r["peak_mb"] for r in rows["cold"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", help="programs and libraries [default: libc]")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--once", help=argparse.SUPPRESS)
    args = parser.parse_args()
    files = args.files or [libc()]
    if args.once:
        print(json.dumps(once(files[0], Path(args.once) / "symbols", "")))
        return
    found = [measure(path, args.rounds) for path in files]
    if args.json:
        print(json.dumps(found))
        return
    table = Table("file", "symbols", "from", "cold, ms", "warm", "again", "find", "search", "regex", "peak, MB")
    for r in found:
        times = (f"{r[key]:.2f}" for key in ("cold", "warm", "again", "find", "search", "regex"))
        table.add_row(os.path.basename(r["file"]), f"{r['symbols']:,}", r["source"], *times, f"{r['peak_mb']:.0f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
