"""What becomes of traced programs when their tracer is killed by SIGKILL: how many die, and how long a breakpoint stays.

    python -m benchmarks.engines.killed [--kills 100] [--rates 0,10,1000,max]

For each rate some processes call one probed function so many times a second each; the tracer is killed at a random moment.
A process dies that meets its breakpoint before the guardian has taken it out, or that stands in it. A row counts each
process at each kill. Needs root and gcc, as the tests do; targets and helpers are the tests'.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tests.engines.host import Files
from tests.support.children import Child, ChildDied
from tests.support.targets import Targets
from tests.support.tracers import Traced, memory_of, restored_after

PROCESSES = {"0": 1, "10": 4, "100": 4, "1000": 2, "max": 1}


@dataclass
class Row:
    rate: str
    kills: int = 0
    processes: int = 0
    deaths: int = 0
    wrong: int = 0
    """Processes that went on and counted wrong, or ended otherwise than by SIGTRAP."""
    restored_us: list[float] = field(default_factory=list)

    def bury(self, children: list[Child]) -> list[Child]:
        """Books those that have ended, and returns the others."""
        for child in [c for c in children if not c.alive()]:
            self.deaths += child.wait() == -signal.SIGTRAP
            self.wrong += child.wait() != -signal.SIGTRAP
        return [c for c in children if c.alive()]

    def text(self) -> str:
        share = 100 * self.deaths / max(self.processes, 1)
        text = f"| {self.rate} | {self.processes} | {self.deaths} | {share:.2f} % | {self.wrong} |"
        if times := sorted(self.restored_us):
            p90, p99 = (times[min(len(times) - 1, int(len(times) * part))] for part in (0.9, 0.99))
            text += (
                f"\nbytes were back after {statistics.median(times):.0f} us (median), {p90:.0f} (p90), {p99:.0f} (p99)"
            )
        return text


@contextmanager
def first() -> Iterator[None]:
    """Runs the body before ordinary processes, so that the time is the guardian's and not that of our own turn."""
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    try:
        yield
    finally:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def measure(rate: str, kills: int, directory: Path, dice: random.Random) -> Row:
    """Kills tracers of programs that hit at a rate."""
    targets = Targets(directory / rate)
    name, symbol = ("hot", "target_hot") if rate == "max" else ("paced", "target_paced")
    plan = Files().plan(targets.build(name), symbol)
    row = Row(rate)
    socket = directory / "tracer.sock"
    with ExitStack() as stack:
        children: list[Child] = []
        for _ in range(kills):
            children = row.bury(children)
            while len(children) < PROCESSES.get(rate, 1):
                child = targets.start(name, "1" if rate == "max" else rate)
                stack.callback(child.kill)
                children.append(child)
                if rate == "max":
                    child.ask("start")
            with Traced(socket, plan) as tracer, ExitStack() as memories:
                looks = [memories.enter_context(memory_of(c, plan)) for c in children]
                time.sleep(dice.random() * 0.2)  # the moment is to have nothing to do with the targets' own
                if rate == "0":
                    with first():
                        killed = tracer.kill()
                        row.restored_us.append(restored_after(*looks[0], killed) / 1000)
                else:  # nobody looks on, who would keep the targets from a CPU
                    killed = tracer.kill()
                tracer.wait()
                for look in looks:
                    restored_after(*look, killed)
            row.kills += 1
            row.processes += len(children)
            time.sleep(0.01 if rate in ("max", "1000") else 0.15)  # so that each has called once more
            children = row.bury(children)
            if rate == "max":
                for child in children:
                    with suppress(ChildDied):
                        child.ask("stop")
                        row.wrong += child.count()["wrong"] != 0
                        child.ask("start")
        row.bury(children)
    return row


def main() -> int:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=100, help="for each rate")
    parser.add_argument("--rates", default="0,10,1000,max", help="hits a second in each process")
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    args = parser.parse_args()
    dice = random.Random()
    rows = []
    print("| hits/s | processes x kills | deaths | share | wrong |\n|---|---:|---:|---:|---:|", flush=True)
    with tempfile.TemporaryDirectory(prefix="trapline-killed-") as directory:
        for rate in args.rates.split(","):
            row = measure(rate, args.kills, Path(directory), dice)
            rows.append(row)
            print(row.text(), flush=True)
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
