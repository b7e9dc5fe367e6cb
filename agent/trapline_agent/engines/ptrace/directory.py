"""Where a tracer thread enters the processes it follows: the engine. Called on the tracer thread; must not block."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from trapline_agent.engines.ptrace.tracee import TracedProcess

if TYPE_CHECKING:
    from trapline_agent.engines.ptrace.loop import TraceThread


class Directory(Protocol):
    """See the module."""

    def adopted(self, process: TracedProcess, thread: TraceThread) -> None:
        """It follows this process from now on."""

    def renamed(self, process: TracedProcess) -> None:
        """An exec gave it another name."""

    def held(self, pid: int) -> None:
        """A launched command stands before its first instruction."""

    def again(self, pid: int) -> None:
        """A process could not be brought to what is wanted, and is to be reconciled once more in a while."""

    def forgot(self, process: TracedProcess, status: int | None) -> None:
        """It ended (wait status) or was let go (None)."""
