"""What the service asks of a store, and the records it keeps there."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from pydantic import Field

from trapline.model import Host, Model, Probe
from trapline_service.frames import LinkPosition
from trapline_service.ledger import Tally


@dataclass(frozen=True)
class TokenRecord:
    """A token, without the token."""

    id: str
    name: str
    role: str
    prefix: str
    """Its first characters, by which it is looked up and recognised in a list."""
    digest: str
    """SHA-256 of the whole, in hex."""
    created_at: datetime


class ProbeRecord(Model):
    """A probe with what the service must not forget of it."""

    probe: Probe
    ended_at: datetime | None = None
    """When it expired or was completed."""
    deleting: bool = False
    tallies: dict[str, Tally] = Field(default_factory=dict)
    """By host."""


@dataclass(frozen=True)
class Chunk:
    """Recorded hits of one (probe, host, source): compressed batches, in the order in which they came."""

    id: str
    probe: str
    host: str
    source: str
    seq_from: int
    seq_to: int
    t0_ns: int
    """Wall-clock time of the earliest hit, Unix ns."""
    t1_ns: int
    count: int
    data: bytes


@dataclass(frozen=True)
class Rollup:
    """What a probe's aggregate gained in a stretch of time; of the same stretch there may be several."""

    id: str
    probe: str
    start_ns: int
    """Unix ns."""
    data: bytes


@dataclass(frozen=True)
class Whole:
    """A probe's aggregate so far."""

    probe: str
    next: Mapping[str, int]
    """The next sequence by host and source: what is in here is everything before."""
    lost: int
    """Hits that never came."""
    since_ns: int
    until_ns: int
    data: bytes


class Store(Protocol):
    """Where things are kept. All methods may raise ``Unavailable`` when the database cannot be reached."""

    async def open(self) -> None:
        """Connects, and makes the tables at the first start."""
        ...

    async def close(self) -> None: ...

    async def ping(self) -> None:
        """Asks the database for something trivial."""
        ...

    async def tokens(self, prefix: str) -> list[TokenRecord]: ...

    async def has_tokens(self) -> bool: ...

    async def put_token(self, token: TokenRecord) -> None:
        """Keeps a token; any of the same name is replaced."""
        ...

    async def probes(self) -> list[ProbeRecord]: ...

    async def put_probes(self, records: Sequence[ProbeRecord]) -> None:
        """Keeps probes, each in place of its former state."""
        ...

    async def delete_probe(self, id: str) -> None: ...

    async def hosts(self) -> list[Host]: ...

    async def put_host(self, host: Host) -> None: ...

    async def add_chunks(self, chunks: Sequence[Chunk], positions: Sequence[LinkPosition]) -> None:
        """Keeps chunks and link positions, all or none."""
        ...

    async def chunks(
        self, *, probe: str | None, host: str | None, until_ns: int | None, offset: int, limit: int
    ) -> list[Chunk]:
        """Returns chunks, latest hit first, of those that begin at or before ``until_ns``."""
        ...

    async def sequences(self) -> dict[tuple[str, str, str], int]:
        """Returns the next sequence of each (probe, host, source) by what is recorded."""
        ...

    async def positions(self) -> list[LinkPosition]:
        """Returns, of each host's last link, the highest sequence whose hits are in the store."""
        ...

    async def trim_chunks(self, *, max_bytes: int, before_ns: int) -> int:
        """Removes chunks that ended before ``before_ns``, and the oldest beyond ``max_bytes``; returns how many."""
        ...

    async def put_aggregates(
        self, wholes: Sequence[Whole], rollups: Sequence[Rollup], *, gone: Collection[str]
    ) -> None:
        """Keeps aggregates, each in place of its former state, and forgets those of probes that are gone; all or none."""
        ...

    async def wholes(self) -> list[Whole]: ...

    async def rollups(self, probe: str, since_ns: int, until_ns: int) -> list[Rollup]:
        """Returns those that begin in a time, oldest first."""
        ...

    async def trim_rollups(self, *, max_bytes: int, before_ns: int) -> int:
        """Removes those that began before ``before_ns``, and the oldest beyond ``max_bytes``; returns how many."""
        ...
