"""``trapline demo``: from POST to hits on real programs, which count for themselves."""

from __future__ import annotations

import json
import signal
import sys

from tests.support import children, needs
from tests.support.children import Child

DEMO = [sys.executable, "-m", "trapline", "demo", "--port", "0"]


@needs.ptrace
@needs.gcc
@needs.sqlite
def test_it_ends_by_itself_and_every_count_agrees() -> None:
    done = children.run([*DEMO, "--seconds", "2", "--json"])
    assert done.returncode == 0, done.stderr
    first, *hits, last = [json.loads(line) for line in done.stdout.splitlines()]
    assert first["url"].startswith("http://127.0.0.1:")
    assert len(first["probes"]) == 3
    summary = {row["probe"]: row for row in last["summary"]}
    assert set(summary) == {"sqlite3_step", "sqlite3_bind_text", "handle_request"}
    for row in summary.values():
        assert row["hits"] == row["counted_by_program"] > 0
        assert (row["processes"], row["dropped"]) == (1, 0)
        # Sampled: a slow machine may not have come to the first sample.
        assert row["overhead_ns"] is None or row["overhead_ns"] > 0
    # What came over the stream is what there was, but for what came before it was subscribed to.
    assert 0 < len(hits) <= sum(row["hits"] for row in summary.values())
    paths = {hit["args"]["path"] for hit in hits if hit["site"].endswith(":handle_request")}
    assert paths <= {"/", "/cart", "/cart/checkout", "/items/17", "/items/4711?ref=mail", "/login", "/static/logo.svg"}
    assert paths


@needs.ptrace
@needs.gcc
@needs.sqlite
def test_ctrl_c_ends_it_with_the_same_summary() -> None:
    with Child(DEMO, ready=None, session=True) as demo:
        demo.wait_for("", timeout=60)  # the first hit
        demo.signal(signal.SIGINT)
        _, err = demo.popen.communicate(timeout=60)
        said = err.decode()
        assert demo.popen.returncode == 0, said
    assert "#token=tlp_" in said
    rows = [line.split() for line in said.splitlines()[-3:]]
    assert [row[0] for row in rows] == ["sqlite3_step", "sqlite3_bind_text", "handle_request"]
    for row in rows:
        assert row[2] == row[4], "hits equal the program's own count"
