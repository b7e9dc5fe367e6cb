"""All benchmarks of the engines: python -m benchmarks.engines [hits] [attach] [bystanders]."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import sys
from typing import Any

from rich.console import Console

from benchmarks.engines import attach, bystanders, hits, several

PARTS = ("hits", "several", "attach", "bystanders")


async def run(args: argparse.Namespace, console: Console) -> tuple[dict[str, Any], list[str]]:
    """Measures and shows; returns the figures, and what was left out."""
    result: dict[str, Any] = {
        "python": platform.python_version(),
        "kernel": platform.release(),
        "cpus": len(os.sched_getaffinity(0)),
        "load": os.getloadavg(),
    }
    skipped: list[str] = []
    if "hits" in args.parts:
        measured, left_out = await hits.measure(args.rounds, args.cpu, args.ms / 1000, not args.no_peers, console)
        skipped += left_out
        result["hits"] = hits.to_json(measured)
        hits.show(measured, console)
    if "several" in args.parts:
        together = await several.measure(args.rounds, console)
        result["several"] = several.to_json(together)
        several.show(together, console)
    if "attach" in args.parts:
        attached = await attach.measure(args.rounds, args.cpu, not args.no_peers, console)
        result["attach"] = attach.to_json(attached)
        attach.show(attached, console)
    if "bystanders" in args.parts:
        others = await bystanders.measure(args.rounds, args.cpu, console)
        result["bystanders"] = bystanders.to_json(others)
        bystanders.show(others, console)
    return result, skipped


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engines", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all of them by default")
    parser.add_argument("--rounds", type=int, default=5, help="default %(default)s")
    parser.add_argument("--ms", type=float, default=60, help="of hits in one measurement (default %(default)s)")
    parser.add_argument("--cpu", type=int, default=max(os.sched_getaffinity(0)), help="where the target is pinned")
    parser.add_argument("--no-peers", action="store_true", help="Trapline and the tracer in C alone")
    parser.add_argument(
        "--json", action="store_true", help="figures as JSON on standard output, the tables on the other"
    )
    args = parser.parse_args()
    args.parts = args.parts or PARTS
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}: there are {', '.join(PARTS)}")
    console = Console(stderr=args.json, width=None if sys.stdout.isatty() else 140)
    result, skipped = asyncio.run(run(args, console))
    for why in skipped:
        console.print(f"left out: {why}", highlight=False)
    if args.json:
        print(json.dumps({**result, "skipped": skipped}, indent=2))


if __name__ == "__main__":
    main()
