"""Looking at every process of the host for what is wanted in it (semantics R2: after the table is published)."""

from __future__ import annotations

import logging

from trapline_agent.engines.base import Engine, ProcessId
from trapline_agent.tracer.table import Table

log = logging.getLogger(__name__)

_MAX_PASSES = 100
"""Against a host that forks faster than we look; the periodic look goes on from there."""


def scan(table: Table, engine: Engine, cause: str) -> None:
    """Reconciles every process in which something may be wanted, or is. On the control thread.

    A process that was forked between the listing and the seize of its parent is in neither; so it looks again until there is
    none that it has not seen. Then every process that maps a probed file is followed, and its children with it. One that the
    kernel fails us at is logged, and keeps nobody else from being looked at.
    """
    seen: set[ProcessId] = set()
    pending = {*table.candidates(), *engine.processes()}
    for _ in range(_MAX_PASSES):
        for process in pending:
            try:
                engine.reconcile(process, cause)
            except OSError as e:
                log.error("process %d could not be looked at: %s", process.pid, e)
        seen |= pending
        # What is followed by now asked the table when it was adopted, after the publication.
        pending = set(table.candidates()) - seen - set(engine.processes())
        if not pending:
            return
    log.warning("processes appear faster than they are looked at: %d are left to the next look", len(pending))
