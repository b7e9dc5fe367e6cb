"""``trapline trace --folded``: how often each stack was met, one line each, for flamegraph.pl, speedscope and their like."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import IO

import numpy as np

from trapline.protocol.hits import FIXED, HitBatch
from trapline.protocol.stacks import Frame, folded, unpack

MAX_STACKS = 100_000
"""Different ones that are kept; hits with others count in one line."""
OTHER = "[other stacks]"


class Folded:
    """Counts the stacks of batches: the first stack that each hit has, under its process' name."""

    def __init__(self, name: Callable[[Frame], Iterable[str]], most: int = MAX_STACKS) -> None:
        self._name = name
        self._most = most
        self._lines: dict[tuple[str, str, bytes], str] = {}
        """By source, process name and packed stack; named at once, while its files are there."""
        self.counts: Counter[str] = Counter()

    def add(self, batch: HitBatch, stop: int | None = None) -> None:
        """Takes the first ``stop`` hits of a batch (None: all)."""
        h = batch.header
        column = next((c.name for c in h.columns[len(FIXED) :] if c.type == "stack"), None)
        if column is None:
            return
        pairs = np.stack([batch.columns["pid"][:stop], batch.columns[column][:stop]], axis=1)
        found, counts = np.unique(pairs, axis=0, return_counts=True)
        for (pid, index), count in zip(found.tolist(), counts.tolist(), strict=True):
            self.counts[self._line(h.source, h.comms.get(pid, ""), h.strings[index], batch)] += count

    def _line(self, source: str, comm: str, packed: bytes, batch: HitBatch) -> str:
        line = self._lines.get((source, comm, packed))
        if line is None:
            if len(self._lines) >= self._most:
                return OTHER
            line = folded(unpack(packed, batch.header.files), self._name, root=(comm,) if comm else ())
            self._lines[source, comm, packed] = line
        return line

    def write(self, file: IO[bytes]) -> None:
        """Writes ``frame;frame;frame COUNT`` lines, the most frequent first."""
        for line, count in self.counts.most_common():
            file.write(f"{line} {count}\n".encode())
