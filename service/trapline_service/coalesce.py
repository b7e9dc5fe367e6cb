"""Many changes, one call."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Coalescer:
    """Collects keys, and hands them all over once, ``delay_s`` after the first of them. Belongs to one event loop."""

    def __init__(self, delay_s: float, flush: Callable[[set[str]], None]) -> None:
        """
        Args:
            delay_s: how long the first key may wait, in seconds.
            flush: takes the keys; called on the event loop.
        """
        self._delay_s = delay_s
        self._flush = flush
        self._keys: set[str] = set()
        self._timer: asyncio.TimerHandle | None = None

    def add(self, key: str) -> None:
        self._keys.add(key)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._delay_s, self.flush)

    def flush(self) -> None:
        """Hands over what there is, now."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._keys:
            keys, self._keys = self._keys, set()
            self._flush(keys)
