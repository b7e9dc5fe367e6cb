"""Pins the latest version of every dependency, direct or not, in constraints.txt.

A plain list of name==version: no addresses and no hashes, so that any package index serves it. Runs with the standard
library alone, in a virtual environment of its own.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HEAD = """\
# Exact versions of everything that Trapline runs on and is tested with, on Python 3.11 and later.
# Made by `make constraints`; the ranges it chose from are in pyproject.toml.
"""


def main() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = [
        "pip",
        *project["build-system"]["requires"],
        *project["project"]["dependencies"],
        *(d for extra in project["project"]["optional-dependencies"].values() for d in extra),
        *project["dependency-groups"]["dev"],
    ]
    with tempfile.TemporaryDirectory() as directory:
        venv.create(directory, with_pip=True)
        python = Path(directory) / "bin" / "python"
        pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
        subprocess.run([*pip, "install", "--upgrade", "pip"], check=True)
        subprocess.run([*pip, "install", *wanted], check=True)
        frozen = subprocess.run([*pip, "freeze", "--all"], check=True, stdout=subprocess.PIPE, text=True).stdout
    pins = [line for line in frozen.splitlines() if "==" in line and not line.startswith("setuptools==")]
    lines = sorted(pins, key=str.lower)
    (ROOT / "constraints.txt").write_text(HEAD + "\n".join(lines) + "\n")
    print(f"{len(lines)} packages pinned", file=sys.stderr)


if __name__ == "__main__":
    main()
