"""The embedded store: one SQLite file, for a service that is the only one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from sqlalchemy import event
from sqlalchemy.ext.asyncio import create_async_engine

from trapline.errors import Unavailable
from trapline_service.store.sql import SqlStore


def sqlite_store(path: Path) -> SqlStore:
    """Returns a store in this file, which is made, with its directory, where it is not there; readable by its owner alone.

    Write-ahead logging lets readers go on while the recorder writes; ``synchronous=NORMAL`` with it survives a crash of
    the process without loss, and one of the machine without damage (sqlite.org/pragma.html).

    Raises:
        Unavailable: the directory or the file cannot be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    except OSError as e:
        raise Unavailable(
            f"the database {path} cannot be opened: {e.strerror}",
            hint="set TRAPLINE_STATE_DIR to a directory that this user may write to",
        ) from e
    engine = create_async_engine(f"sqlite+aiosqlite:///{path}")

    @event.listens_for(engine.sync_engine, "connect")
    def _prepare(connection: Any, _record: Any) -> None:
        cursor = connection.cursor()
        cursor.execute("PRAGMA journal_mode=WAL")
        cursor.execute("PRAGMA synchronous=NORMAL")
        cursor.execute("PRAGMA busy_timeout=5000")
        cursor.close()

    return SqlStore(engine)
