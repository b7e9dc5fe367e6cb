"""Compiles the programs in tests/targets, once per session and set of flags.

A target is built next to nothing else in a fresh directory, so that its inode is its own: a probe in one test cannot
meet the mappings of another.
"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.children import Child

SOURCES = Path(__file__).resolve().parent.parent / "targets"
FLAGS = ("-O2", "-g", "-Wall", "-Wextra", "-Werror", "-pthread")


class Targets:
    """Builds targets into a directory and starts them."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._built: dict[tuple[str, tuple[str, ...]], Path] = {}
        self._numbers = itertools.count(1)

    def build(self, name: str, *flags: str, compiler: str = "gcc") -> Path:
        """Returns the path of the program (or with ``-shared`` the library) made from ``NAME.c``.

        Args:
            name: the source without its suffix.
            flags: added to ``FLAGS``, so that a later ``-O0`` or ``-no-pie`` wins.
            compiler: ``gcc``, or one that takes its flags.
        """
        key = (name, (compiler, *flags))
        if key not in self._built:
            folder = self._directory / f"{next(self._numbers)}"
            folder.mkdir(parents=True)
            output = folder / (f"lib{name}.so" if "-shared" in flags else name)
            compile_c(SOURCES / f"{name}.c", output, flags, compiler)
            self._built[key] = output
        return self._built[key]

    def build_cxx(self, name: str) -> Path:
        """Returns the program made from ``NAME.cpp``."""
        return self._once(name, "g++", lambda output: ["g++", *FLAGS, str(SOURCES / f"{name}.cpp"), "-o", str(output)])

    def build_go(self, name: str) -> Path:
        """Returns the program made from ``NAME.go``, by the standard library alone."""
        return self._once(name, "go", lambda output: ["go", "build", "-o", str(output), str(SOURCES / f"{name}.go")])

    def _once(self, name: str, compiler: str, command: Callable[[Path], list[str]]) -> Path:
        key = (name, (compiler,))
        if key not in self._built:
            folder = self._directory / f"{next(self._numbers)}"
            folder.mkdir(parents=True)
            environment = {**os.environ, "GOCACHE": str(self._directory / "go-cache"), "GO111MODULE": "off"}
            result = subprocess.run(
                command(folder / name), capture_output=True, text=True, check=False, env=environment, cwd=folder
            )
            assert result.returncode == 0, f"{compiler} {name}: {result.stderr}"
            self._built[key] = folder / name
        return self._built[key]

    def copy(self, program: Path) -> Path:
        """Returns a copy of a built program: the same code under another inode."""
        folder = self._directory / f"{next(self._numbers)}"
        folder.mkdir(parents=True)
        return Path(shutil.copy2(program, folder / program.name))

    def library(self) -> Path:
        """Returns the library that the target ``dl`` opens."""
        return self.build("dlfn", "-shared", "-fPIC")

    def start(self, name: str, *args: str | Path, flags: Iterable[str] = ()) -> Child:
        """Builds a target, starts it, waits until it is ready. The caller ends it."""
        return Child([self.build(name, *flags), *args])

    @contextmanager
    def run(self, name: str, *args: str | Path, flags: Iterable[str] = ()) -> Iterator[Child]:
        """Builds a target, starts it, waits until it is ready; ends it on leaving. Raises ChildDied if harmed."""
        with Child([self.build(name, *flags), *args]) as child:
            yield child


def compile_c(source: Path, output: Path, flags: Iterable[str] = (), compiler: str = "gcc") -> None:
    """Compiles one C file. Raises AssertionError with the compiler's words."""
    command = [compiler, *FLAGS, *flags, str(source), "-o", str(output), "-ldl"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{compiler} {source.name}: {result.stderr}"
