"""What is built, what it needs, and who may import whom."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tests.support.children import run

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"trapline": ROOT, "trapline_agent": ROOT / "agent", "trapline_service": ROOT / "service"}
PATHS = ":".join(str(p) for p in PACKAGES.values())


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def normal(name: str) -> str:
    """Returns a package's name as PEP 503 normalises it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    rows = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {normal(name): version for name, version in rows}


def declared(project: dict[str, Any]) -> list[str]:
    extras = project["project"]["optional-dependencies"].values()
    return [
        *project["build-system"]["requires"],
        *project["project"]["dependencies"],
        *(d for extra in extras for d in extra),
        *project["dependency-groups"]["dev"],
    ]


def test_every_dependency_is_pinned(project: dict[str, Any]) -> None:
    names = {normal(re.split(r"[\[<>=;, ]", d, maxsplit=1)[0]) for d in declared(project)}
    assert names <= set(pins()), "run `make constraints`"


def test_pins_carry_no_address() -> None:
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        assert line.startswith("#") or re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+!_-]+", line), line


def test_every_pinned_version_is_the_installed_one() -> None:
    """So that what CI tested is what a newcomer gets; only meaningful in the environment that make set up."""
    from importlib.metadata import distributions

    installed = {normal(d.metadata["Name"]): d.version for d in distributions()}
    if Path(sys.prefix).resolve() == ROOT / ".venv":
        wrong = {n: (v, installed[n]) for n, v in pins().items() if n in installed and installed[n] != v}
        assert not wrong
    assert set(installed) & set(pins()), "the tests run with none of the dependencies"


def test_licence(project: dict[str, Any]) -> None:
    assert project["project"]["license"] == "GPL-2.0-or-later"
    text = (ROOT / "LICENSE").read_text()
    assert "GNU GENERAL PUBLIC LICENSE" in text
    assert "Version 2, June 1991" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_the_programs_exist(project: dict[str, Any]) -> None:
    for name, target in project["project"]["scripts"].items():
        module, function = target.split(":")
        code = f"import {module} as m; assert callable(m.{function})"
        result = run([sys.executable, "-c", code], env={"PYTHONPATH": PATHS})
        assert result.returncode == 0, f"{name}: {result.stderr}"


def test_the_packages_are_those_that_are_built(project: dict[str, Any]) -> None:
    built = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert {Path(p).name for p in built} == set(PACKAGES)
    for package in built:
        assert (ROOT / package / "__init__.py").is_file()
        assert (ROOT / package / "py.typed").is_file()


def test_every_folder_of_code_is_a_package() -> None:
    """hatchling and mypy pass over a folder without ``__init__.py`` in silence, each in its own way."""
    for name, parent in PACKAGES.items():
        for folder in (parent / name).rglob("*"):
            if folder.is_dir() and any(folder.glob("*.py")):
                assert (folder / "__init__.py").is_file(), folder.relative_to(ROOT)


# --- who may import whom ---------------------------------------------------------------------------------------------


def test_layering() -> None:
    """The contracts of .importlinter."""
    linter = Path(sys.executable).parent / "lint-imports"
    result = subprocess.run(
        [str(linter), "--no-cache"],
        cwd=ROOT,
        env={"PYTHONPATH": PATHS, "PATH": "/usr/bin:/bin", "TERM": "dumb"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-6000:]


def loads(module: str, *forbidden: str) -> list[str]:
    """Returns which of the packages a fresh interpreter has after importing a module: the truth of the matter."""
    code = f"import sys, {module}\nprint(*[m for m in {forbidden!r} if m in sys.modules])"
    result = run([sys.executable, "-c", code], env={"PYTHONPATH": PATHS})
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


def test_the_agent_process_does_not_load_python_ptrace() -> None:
    """python-ptrace is GPL-2.0-only: only the tracer process may have it (docs/adr)."""
    assert loads("trapline_agent.agent", "ptrace", "trapline_agent.kernel.ptrace", "fastapi", "sqlalchemy") == []


def test_the_service_process_loads_nothing_of_the_agent() -> None:
    assert loads("trapline_service.app", "trapline_agent", "ptrace") == []


def test_the_tracer_process_loads_no_network_and_no_parser() -> None:
    heavy = ("websockets", "httpx", "fastapi", "sqlalchemy", "elftools", "typer", "trapline_agent.symbols")
    assert loads("trapline_agent.tracer.__main__", *heavy) == []


def test_the_command_line_loads_its_commands_lazily() -> None:
    """``trapline --help`` must not pay for, nor need, the service and the agent."""
    assert loads("trapline.cli", "trapline_agent", "trapline_service", "fastapi", "sqlalchemy", "ptrace") == []
