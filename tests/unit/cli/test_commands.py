"""The command line as a process: its errors are one line on standard error and status 2."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path

import pytest

import trapline
from tests.support import children


def _trapline(*args: str, state: Path) -> tuple[int, str, str]:
    env = {"TRAPLINE_STATE_DIR": str(state), "TRAPLINE_URL": "", "TRAPLINE_TOKEN": "", "COLUMNS": "80"}
    done = children.run([sys.executable, "-m", "trapline", *args], env=env)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["frobnicate"], "no such command"),
        (["trace"], "name a probe"),
        (["trace", "libc.so.6:malloc", "--bogus"], "no such option"),
        (["trace", "libc.so.6:malloc", "-p", "1", "--", "true"], "either --pid or a command"),
        (["trace", "libc.so.6:f @ pid=1", "-p", "2"], "pid=1"),
        (["trace", "-n", "0", "libc.so.6:malloc"], "-n"),
        (["probe", "add", "libc.so.6:malloc", "--label", "x"], "KEY=VALUE"),
        (["agent", "--server", "nowhere"], "setting server"),
        (["serve", "--port", "65536"], "--port"),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(tmp_path: Path, args: list[str], said: str) -> None:
    status, out, err = _trapline(*args, state=tmp_path)
    assert (status, out) == (2, "")
    assert err.startswith("trapline: ")
    assert said in err
    assert err.count("\n") == 1


def test_an_error_in_a_probe_text_shows_the_place(tmp_path: Path) -> None:
    status, out, err = _trapline("trace", "libc.so.6:", state=tmp_path)
    assert (status, out) == (2, "")
    lines = err.splitlines()
    assert lines[1] == "  libc.so.6:"
    assert lines[2].strip() == "^"


def test_no_service_says_how_to_start_one(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
    status, out, err = _trapline("probe", "list", "--url", url, state=tmp_path)
    assert (status, out) == (2, "")
    assert "trapline up" in err


def test_version(tmp_path: Path) -> None:
    status, out, _ = _trapline("version", "--json", state=tmp_path)
    assert (status, json.loads(out)) == (0, {"version": trapline.__version__})


def test_help_is_not_an_error(tmp_path: Path) -> None:
    status, out, _ = _trapline("--help", state=tmp_path)
    assert status == 0
    assert "trace" in out
