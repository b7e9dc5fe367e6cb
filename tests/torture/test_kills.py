"""kill -9 of agent and service, over and over: no target dies, no call is lost uncounted, the lease takes all out (S1)."""

from __future__ import annotations

import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from tests.engines.host import Files, altered_bytes, mapped_files
from tests.engines.test_tracer import tracer
from tests.support import needs
from tests.support.children import Child
from tests.support.targets import Targets
from tests.system.stack import GETPPID, Stack, caller
from tests.torture.scale import Torture
from trapline_agent.kernel import procfs

pytestmark = [needs.gcc, needs.ptrace_any, needs.x86_64]

LEASE_S = 0.3
AGENT = """
import asyncio, sys
from pathlib import Path
import msgspec
from trapline_agent.plans import SitePlan
from trapline_agent.tracer.client import TracerClient

async def main():
    plan = msgspec.json.decode(sys.argv[3], type=SitePlan)
    client = await TracerClient.connect(Path(sys.argv[1]), host="h", lease_s=float(sys.argv[2]))
    print("connected", flush=True)
    await client.register("stays", generation=1, sites=["s"], plans=[plan])
    print("ready", flush=True)
    while True:
        await client.register("comes", generation=1, sites=["s"], plans=[plan])
        await client.unregister("comes")

asyncio.run(main())
"""
"""An agent with one probe that stays and others that come and go: so it is killed in the middle of everything."""


@pytest.fixture
def path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="trapline-test-") as directory:
        yield Path(directory) / "tracer.sock"


def kill(child: Child) -> float:
    """Kills it, and returns when that was (CLOCK_MONOTONIC seconds)."""
    child.signal(signal.SIGKILL)
    at = time.monotonic()
    child.wait()
    child.kill()
    return at


def bytes_out(child: Child, program: Path, since: float) -> float:
    """Waits until no byte of ours is in a target; returns the seconds that took, at most 10 more than the lease."""
    while altered_bytes(child.pid, [program]):
        assert time.monotonic() < since + LEASE_S + 10, altered_bytes(child.pid, [program])
    return time.monotonic() - since


def test_s1_agents_are_killed_and_the_lease_takes_all_out(path: Path, targets: Targets, torture: Torture) -> None:
    program = targets.build("hot")
    plan = msgspec.json.encode(Files().plan(program, "target_hot")).decode()
    dice = random.Random(1)
    longest = 0.0
    with Child(["nice", "-n", "19", program, "4"]) as child, tracer(path, "--stay"):
        child.ask("start")
        while not path.exists():
            child.ask("count")
        for cycle in torture.cycles(8, 1000):
            with Child([sys.executable, "-c", AGENT, str(path), str(LEASE_S), plan], ready="connected") as agent:
                if cycle % 4:
                    agent.wait_for("ready")
                    for _ in range(dice.randrange(20)):
                        child.ask("count")
                killed = kill(agent)
                agent.popen.returncode = 0  # it was this test that killed it
            if cycle % 2 == 0:  # else another one comes at once
                longest = max(longest, bytes_out(child, program, killed) - LEASE_S)
                # Of a second, as long as there is a processor for us; the target's threads are nice.
                assert longest < max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1)), longest
        bytes_out(child, program, time.monotonic())
        child.ask("stop")
        count = child.count()
        assert (count["wrong"], count["begun"] - count["done"]) == (0, 0)
        while any(procfs.tracer(tid) for tid in procfs.tasks(child.pid)):
            child.ask("call 1")
        assert altered_bytes(child.pid, mapped_files(child.pid)) == {}
        torture.note(f"out {longest * 1000:.0f} ms after the lease")


@pytest.mark.parametrize("part", ["agent", "service"])
def test_s1_a_part_of_the_whole_is_killed_and_no_call_is_missed(torture: Torture, part: str) -> None:
    with caller() as target, Stack() as stack:
        probe = stack.arm(f"{GETPPID} @ pid={target.pid}")
        calls = 0
        for _ in torture.cycles(2, 1000):
            calls = int(target.ask("call 50"))
            kill(getattr(stack, part))
            calls = int(target.ask("call 50"))
            getattr(stack, f"start_{part}")()
            stack.armed(probe.id, target.pid)
            calls = int(target.ask("call 50"))
            counters = stack.until_hits(probe.id, calls).status.counters
            assert counters.hits == calls
        torture.note(f"hits={calls} dropped={counters.dropped}")
        stack.client.delete_probe(probe.id)
        assert altered_bytes(target.pid, mapped_files(target.pid)) == {}
