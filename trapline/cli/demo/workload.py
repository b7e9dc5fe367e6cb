"""The programs that ``trapline demo`` probes, and the probes it puts on them."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

_HERE = Path(__file__).parent
_LIBRARY = "libsqlite3.so.0"
_BUILD_TIMEOUT_S = 60.0
_ASK = "import sqlite3, sys; sys.exit(not any(sys.argv[1] in line for line in open('/proc/self/maps')))"


@dataclass
class Program:
    """One program of the workload; ``{pid}`` in its probes becomes its pid."""

    title: str
    argv: list[str]
    ready: Path
    """It makes this file when it waits for SIGUSR1 to begin."""
    report: Path
    """Where it writes what it counted itself, when it ends: a JSON object, by the probes' names."""
    probes: dict[str, str]
    pid: int = 0
    counted: dict[str, int] = field(default_factory=dict)

    def texts(self) -> Iterator[tuple[str, str]]:
        """Yields (name, text) of its probes, once it has a pid."""
        for name, text in self.probes.items():
            yield name, text.format(pid=self.pid)

    def read_report(self) -> None:
        """Takes what it counted; nothing where it could not say."""
        try:
            self.counted = {str(name): int(count) for name, count in json.loads(self.report.read_text()).items()}
        except (OSError, ValueError, AttributeError):
            self.counted = {}


async def programs(directory: Path) -> tuple[list[Program], list[str]]:
    """Prepares the workload in a directory of its own; returns it, and what had to be left out and why."""
    (found, missing_python), (built, missing_c) = await asyncio.gather(
        asyncio.to_thread(_orders, directory), asyncio.to_thread(_shop, directory)
    )
    ready = [program for program in (found, built) if program is not None]
    return ready, [reason for reason in (missing_python, missing_c) if reason]


def _orders(directory: Path) -> tuple[Program | None, str]:
    for python in dict.fromkeys((sys.executable, "/usr/bin/python3")):
        if python and os.path.exists(python) and _uses_the_library(python):
            ready, report = directory / "orders.ready", directory / "orders.json"
            probes = {
                "sqlite3_step": f"{_LIBRARY}:sqlite3_step @ tree={{pid}}",
                "sqlite3_bind_text": f"{_LIBRARY}:sqlite3_bind_text @ tree={{pid}} {{{{column=arg1, text=str(arg2, 48)}}}}",
            }
            argv = [python, str(_HERE / "orders.py"), str(ready), str(report)]
            return Program("python3 with SQLite", argv, ready, report, probes), ""
    return None, f"no python3 here has an sqlite3 module that uses {_LIBRARY}, so that program is left out"


def _uses_the_library(python: str) -> bool:
    try:
        return (
            subprocess.run([python, "-c", _ASK, _LIBRARY], timeout=_BUILD_TIMEOUT_S, capture_output=True).returncode
            == 0
        )
    except (OSError, subprocess.TimeoutExpired):
        return False


def _shop(directory: Path) -> tuple[Program | None, str]:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        return None, "there is no gcc, so the C program is left out"
    program, ready, report = directory / "shop", directory / "shop.ready", directory / "shop.json"
    command = [compiler, "-O2", "-g", "-pthread", "-o", str(program), str(_HERE / "shop.c")]
    try:
        built = subprocess.run(command, timeout=_BUILD_TIMEOUT_S, capture_output=True, text=True)
    except (OSError, subprocess.TimeoutExpired) as e:
        return None, f"the C program is left out: {compiler}: {e}"
    if built.returncode != 0:
        first = (built.stderr.strip() or "failed").splitlines()[0]
        return None, f"the C program is left out: {compiler}: {first}"
    probes = {"handle_request": f"{program}:handle_request @ tree={{pid}} {{{{path=str(arg0, 48), bytes=arg1}}}}"}
    argv = [str(program), str(ready), str(report)]
    return Program("a C program of four threads", argv, ready, report, probes), ""
