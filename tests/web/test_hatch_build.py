"""The build hook: builds what changed with the real npm, and says clearly why when it cannot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import hatch_build
from tests.support import needs

ROOT = Path(hatch_build.__file__).parent


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source tree whose dashboard has no dependencies, so that npm needs no registry."""
    monkeypatch.delenv("TRAPLINE_WEB", raising=False)
    monkeypatch.setenv("npm_config_cache", str(tmp_path / "cache"))
    web = tmp_path / "web"
    (web / "src").mkdir(parents=True)
    (tmp_path / "service" / "trapline_service").mkdir(parents=True)
    package = {"name": "w", "version": "1.0.0", "scripts": {"build": "node src/build.mjs"}}
    (web / "package.json").write_text(json.dumps(package))
    lock = {"name": "w", "version": "1.0.0", "lockfileVersion": 3, "requires": True, "packages": {"": package}}
    (web / "package-lock.json").write_text(json.dumps(lock))
    (web / "src" / "build.mjs").write_text(
        "import { mkdirSync, writeFileSync } from 'node:fs';\n"
        "const out = process.argv[process.argv.indexOf('--outDir') + 1];\n"
        "mkdirSync(out, { recursive: true });\n"
        "writeFileSync(out + '/index.html', 'made');\n"
    )
    return tmp_path


def _static(tree: Path) -> Path:
    return tree / "service" / "trapline_service" / "static"


def _says_nothing(text: str) -> None:
    pytest.fail(f"it should have had nothing to do, but said: {text}")


@needs.node
def test_it_builds_once_and_again_when_a_source_changed(tree: Path) -> None:
    said: list[str] = []
    assert hatch_build.build(tree, said.append) is True
    assert said == ["building the dashboard (web/)"]
    assert (_static(tree) / "index.html").read_text() == "made"
    assert hatch_build.build(tree, _says_nothing) is False

    source = tree / "web" / "src" / "build.mjs"
    source.write_text(source.read_text().replace("made", "made anew"))
    (_static(tree) / "left-over.js").write_text("old")
    assert hatch_build.build(tree, said.append) is True
    assert (_static(tree) / "index.html").read_text() == "made anew"
    assert not (_static(tree) / "left-over.js").exists()
    assert [p.name for p in _static(tree).parent.iterdir()] == ["static"], "a work folder was left behind"


@needs.node
def test_a_failing_build_shows_why_and_leaves_what_is_there(tree: Path) -> None:
    hatch_build.build(tree, lambda _: None)
    (tree / "web" / "src" / "build.mjs").write_text("throw new Error('the roof is on fire')")
    with pytest.raises(hatch_build.WebBuildError, match="the roof is on fire"):
        hatch_build.build(tree, lambda _: None)
    assert (_static(tree) / "index.html").read_text() == "made"


@needs.node
def test_packages_that_cannot_be_fetched_are_said_with_the_way_out(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    web = tree / "web"
    for name in ("package.json", "package-lock.json"):
        content = json.loads((web / name).read_text())
        (content if name == "package.json" else content["packages"][""])["dependencies"] = {"left-pad": "1.3.0"}
        if name == "package-lock.json":
            content["packages"]["node_modules/left-pad"] = {"version": "1.3.0"}
        (web / name).write_text(json.dumps(content))
    monkeypatch.setenv("npm_config_registry", "http://127.0.0.1:9/")  # the discard port: nobody listens
    monkeypatch.setenv("npm_config_fetch_retries", "0")
    with pytest.raises(hatch_build.WebBuildError) as caught:
        hatch_build.build(tree, lambda _: None)
    assert "`npm ci`" in str(caught.value)
    assert "TRAPLINE_WEB=skip" in str(caught.value)
    assert not _static(tree).exists()


def test_skip_builds_nothing_and_says_so(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAPLINE_WEB", "skip")
    said: list[str] = []
    assert hatch_build.build(tree, said.append) is False
    assert "without its dashboard" in said[0]
    assert not _static(tree).exists()


def test_a_wish_that_means_nothing_is_refused(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAPLINE_WEB", "no")
    with pytest.raises(hatch_build.WebBuildError, match="skip"):
        hatch_build.build(tree, _says_nothing)


def test_without_sources_the_built_one_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRAPLINE_WEB", raising=False)
    with pytest.raises(hatch_build.WebBuildError, match="neither"):
        hatch_build.build(tmp_path, _says_nothing)
    _static(tmp_path).mkdir(parents=True)
    (_static(tmp_path) / "index.html").write_text("built elsewhere")
    assert hatch_build.build(tmp_path, _says_nothing) is False


def test_the_hash_covers_every_input_by_name_and_content(tree: Path) -> None:
    web = tree / "web"
    seen = {hatch_build.content_hash(web)}
    for path, text in (("src/a.ts", "1"), ("src/a.ts", "2"), ("public/x.svg", "2"), ("vite.config.ts", "2")):
        (web / path).parent.mkdir(exist_ok=True)
        (web / path).write_text(text)
        seen.add(hatch_build.content_hash(web))
    (web / "src" / "a.ts").rename(web / "src" / "b.ts")
    seen.add(hatch_build.content_hash(web))
    assert len(seen) == 6
    (web / "node_modules").mkdir()
    (web / "node_modules" / "x").write_text("no input")
    assert hatch_build.content_hash(web) in seen


def test_the_lock_file_pins_content_and_names_no_registry() -> None:
    lock = json.loads((ROOT / "web" / "package-lock.json").read_text())
    packages = {name: p for name, p in lock["packages"].items() if name}
    assert packages
    assert not [name for name, p in packages.items() if "resolved" in p]
    assert not [name for name, p in packages.items() if "integrity" not in p]
