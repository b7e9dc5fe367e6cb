"""Looking at every process of the host for what is wanted in it (semantics R2: after the table is published)."""

from __future__ import annotations

from trapline_agent.engines.base import Engine, ProcessId
from trapline_agent.tracer.table import Table


def scan(table: Table, engine: Engine, cause: str) -> None:
    """Reconciles every process in which something may be wanted, or is. On the control thread.

    A process that was forked between the listing and the seize of its parent is in neither; so it looks again until there is
    none that it has not seen. Then every process that maps a probed file is followed, and its children with it.
    """
    seen: set[ProcessId] = set()
    pending = {*table.candidates(), *engine.processes()}
    while pending:
        for process in pending:
            engine.reconcile(process, cause)
        seen |= pending
        pending = set(table.candidates()) - seen
