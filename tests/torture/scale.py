"""How much torture: ``TRAPLINE_TORTURE=long`` (``make torture``) or the short form that is part of ``make test``.

A test asks for its cycles here, so that there is one knob, long work shows how far it is, and the summary at the end has a
row for each test: cycles, deaths, the slowest cycle.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

LONG = os.environ.get("TRAPLINE_TORTURE") == "long"
_SHOW_EVERY_S = 5.0


def size(short: int, long: int) -> int:
    """Returns one of two numbers, by the knob."""
    return long if LONG else short


@dataclass
class Torture:
    """What one test did."""

    name: str
    show: Callable[[str], None]
    """Writes a line for whoever waits."""
    planned: int = 0
    done: int = 0
    deaths: int = 0
    slowest_s: float = 0.0
    notes: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    def cycles(self, short: int, long: int) -> Iterator[int]:
        """Counts from 0; what the body takes for one round is that cycle's time."""
        number = size(short, long)
        self.planned += number
        shown = began = time.monotonic()
        for cycle in range(number):
            yield cycle
            now = time.monotonic()
            self.slowest_s = max(self.slowest_s, now - began)
            began = now
            self.done += 1
            if LONG and now - shown > _SHOW_EVERY_S:
                shown = now
                self.show(f"  {self.name}: {self.done}/{self.planned}, slowest {self.slowest_s * 1000:.0f} ms")

    def note(self, text: str) -> None:
        """Adds to the summary's row."""
        self.notes.append(text)

    def row(self) -> str:
        took = time.monotonic() - self.started
        return (
            f"{self.name:64} {self.done:6}/{self.planned:<6} {self.deaths:6} "
            f"{self.slowest_s * 1000:9.1f} ms {took:7.1f} s  {' '.join(self.notes)}"
        )
