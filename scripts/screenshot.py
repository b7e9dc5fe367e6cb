#!/usr/bin/env python3
"""Takes the README's picture: the dashboard of `trapline demo`, in a real browser.

    .venv/bin/python scripts/screenshot.py [--url 'http://HOST:PORT/#token=TOKEN'] [--scheme light] [-o FILE]

Without --url it starts a demo and ends it again; as root in namespaces of its own, so that the picture shows the demo's
processes alone and not the name of this machine.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, expect, sync_playwright

ROOT = Path(__file__).resolve().parent.parent
MAX_BYTES = 300_000
_SIZE = {"width": 1280, "height": 800}
_FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
_WAIT_MS = 120_000


@contextmanager
def demo() -> Iterator[str]:
    """Runs a demo; gives the address of its dashboard."""
    command = [sys.executable, "-m", "trapline", "demo", "--json", "--port", "0"]
    if os.geteuid() == 0:
        alone = ["unshare", "--uts", "--pid", "--fork", "--mount-proc", "sh", "-c", 'hostname demo; exec "$@"', "sh"]
        command = alone + command
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        access = json.loads(process.stdout.readline())
        # Hits follow, and would fill the pipe.
        with subprocess.Popen(["cat"], stdin=process.stdout, stdout=subprocess.DEVNULL):
            try:
                yield f"{access['url']}/#token={access['token']}"
            finally:
                # unshare(1) ignores SIGTERM; its child is the demo.
                children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
                os.kill(int(children[0]) if os.geteuid() == 0 else process.pid, signal.SIGTERM)
                process.wait()


def take(browser: Browser, url: str, scheme: str, hits: int) -> bytes:
    """Returns a PNG of the dashboard, once so many hits have come."""
    page = browser.new_page(viewport=_SIZE, color_scheme=scheme)  # type: ignore[arg-type] # argparse checked it
    page.goto(url)
    expect(page.get_by_test_id("link-state")).to_have_text("Live", timeout=_WAIT_MS)
    page.wait_for_function(
        "n => Number(document.querySelector('[data-testid=fact-hits] dd')?.title.replace(/[^0-9]/g, '')) >= n",
        arg=hits,
        timeout=_WAIT_MS,
    )
    return page.screenshot()


def main() -> int:
    """Takes the picture; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--url", help="a dashboard as `trapline demo` and `trapline up` print it; none: start a demo")
    parser.add_argument("--scheme", choices=("dark", "light"), default="dark")
    parser.add_argument("--hits", type=int, default=4000, help="wait until the dashboard has shown so many")
    parser.add_argument("--chromium", default="/usr/bin/chromium", help="the browser's program")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "docs" / "images" / "dashboard.png")
    args = parser.parse_args()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=args.chromium, args=_FLAGS)
        if args.url:
            picture = take(browser, args.url, args.scheme, args.hits)
        else:
            with demo() as url:
                picture = take(browser, url, args.scheme, args.hits)
        browser.close()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_bytes(picture)
    print(f"{args.output}: {len(picture):,} bytes")
    return int(len(picture) > MAX_BYTES)


if __name__ == "__main__":
    sys.exit(main())
