"""Tracers that are killed: with an agent in this process that arms one probe, and a look at what is left afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.support.children import TIMEOUT_S, Child
from trapline_agent.kernel import procfs
from trapline_agent.plans import SitePlan
from trapline_agent.targets.maps import executable_mappings
from trapline_agent.tracer.client import TracerClient
from trapline_agent.tracer.guardian import NAME


class Traced:
    """A tracer with one probe. ``with`` ends it by SIGKILL, if it runs still."""

    def __init__(self, path: Path, plans: SitePlan | Sequence[SitePlan]) -> None:
        """Starts it; on return the probe is armed, and the guardian is ready."""
        self._plans = [plans] if isinstance(plans, SitePlan) else list(plans)
        with (path.parent / "log").open("ab") as log:
            self.child = Child(
                [sys.executable, "-m", "trapline_agent.tracer", "--socket", path],
                ready=None,
                stderr=log.fileno(),
                session=True,
            )
        try:
            asyncio.run(self._arm(path))
            self.guardian = self.ready_guardian()
        except BaseException as e:
            self.child.kill()
            e.add_note((path.parent / "log").read_text()[-4000:])
            raise

    async def _arm(self, path: Path) -> None:
        client = await TracerClient.connect(path, host="h", process=self.child.popen)
        await client.register("p", generation=1, sites=[f"s{p.site}" for p in self._plans], plans=self._plans)
        await client.close()

    def guardians(self) -> list[int]:
        """Pids of the tracer's guardians that are ready."""
        found = []
        for text in procfs.read(f"/proc/{self.child.pid}/task/{self.child.pid}/children").split():
            with contextlib.suppress(ProcessLookupError):
                if procfs.comm(int(text)) == NAME and not procfs.has_ended(int(text), int(text)):
                    found.append(int(text))
        return found

    def ready_guardian(self, other_than: int = 0) -> int:
        """Waits for a guardian; returns its pid."""
        deadline = time.monotonic() + TIMEOUT_S
        while time.monotonic() < deadline:
            for pid in self.guardians():
                if pid != other_than:
                    return pid
        raise TimeoutError("the tracer has no guardian")

    def kill(self) -> int:
        """Kills it; returns when that was, CLOCK_MONOTONIC ns. Its guardian may be at work still."""
        at = time.monotonic_ns()
        self.child.signal(signal.SIGKILL)
        return at

    def kill_both(self) -> None:
        """Kills the guardian and it, so that neither sees the other die. Returns when both are gone."""
        ended = os.pidfd_open(self.guardian)
        os.kill(self.guardian, signal.SIGSTOP)
        self.child.signal(signal.SIGKILL)
        self.child.wait()
        signal.pidfd_send_signal(ended, signal.SIGKILL)
        wait_end(ended)

    def wait(self) -> None:
        """Waits for its end, and its guardian's."""
        with contextlib.suppress(ProcessLookupError):
            wait_end(os.pidfd_open(self.guardian))
        self.child.wait()

    def __enter__(self) -> Traced:
        return self

    def __exit__(self, *_: object) -> None:
        self.child.kill()


def wait_end(pidfd: int) -> None:
    """Waits until a process has ended. Takes over the descriptor."""
    import select

    try:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        if not poll.poll(TIMEOUT_S * 1000):
            raise TimeoutError("a process that was killed runs on")
    finally:
        os.close(pidfd)


@contextlib.contextmanager
def memory_of(child: Child, plan: SitePlan) -> Iterator[tuple[int, int]]:
    """Yields a descriptor of a target's memory, which outlives it, and the address of a plan there."""
    addr = next(a for m in executable_mappings(child.pid) if m.file == plan.file and (a := m.addr(plan.offset)))
    fd = os.open(f"/proc/{child.pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield fd, addr
    finally:
        os.close(fd)


def restored_after(fd: int, addr: int, since: int) -> int:
    """Waits until no breakpoint is at an address, or the memory is gone; returns the ns since then."""
    while os.pread(fd, 1, addr) == b"\xcc":
        if time.monotonic_ns() - since > TIMEOUT_S * 1e9:
            raise TimeoutError(f"the breakpoint at {addr:#x} stays")
    return time.monotonic_ns() - since
