"""The store on SQL: tables and queries in SQLAlchemy Core, without anything that only one database knows."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime

import msgspec
from sqlalchemy import (
    BigInteger,
    Column,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    delete,
    func,
    insert,
    select,
    update,
)
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine
from sqlalchemy.sql.dml import Update

from trapline.errors import Conflict, Unavailable
from trapline.model import Host
from trapline_service.frames import LinkPosition
from trapline_service.store.base import Chunk, ProbeRecord, Rollup, TokenRecord, Whole

SCHEMA_VERSION = 1

metadata = MetaData()
_schema = Table("schema_version", metadata, Column("version", Integer, primary_key=True))
_tokens = Table(
    "tokens",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("name", String(128), nullable=False, unique=True),
    Column("role", String(32), nullable=False),
    Column("prefix", String(16), nullable=False, index=True),
    Column("digest", String(64), nullable=False),
    Column("created_at", String(40), nullable=False),
)
_probes = Table("probes", metadata, Column("id", String(64), primary_key=True), Column("body", Text, nullable=False))
_hosts = Table("hosts", metadata, Column("id", String(64), primary_key=True), Column("body", Text, nullable=False))
_chunks = Table(
    "chunks",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("probe", String(64), nullable=False),
    Column("host", String(64), nullable=False),
    Column("source", String(128), nullable=False),
    Column("seq_from", BigInteger, nullable=False),
    Column("seq_to", BigInteger, nullable=False),
    Column("t0_ns", BigInteger, nullable=False),
    Column("t1_ns", BigInteger, nullable=False),
    Column("count", Integer, nullable=False),
    Column("size_bytes", Integer, nullable=False),
    Column("data", LargeBinary, nullable=False),
    Index("chunks_by_probe", "probe", "host", "t1_ns"),
    Index("chunks_by_time", "t1_ns", "size_bytes"),
)
_links = Table(
    "links",
    metadata,
    Column("host", String(64), primary_key=True),
    Column("link_id", String(64), nullable=False),
    Column("link_seq", BigInteger, nullable=False),
)
_rollups = Table(
    "rollups",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("probe", String(64), nullable=False),
    Column("start_ns", BigInteger, nullable=False),
    Column("size_bytes", Integer, nullable=False),
    Column("data", LargeBinary, nullable=False),
    Index("rollups_by_probe", "probe", "start_ns"),
    Index("rollups_by_time", "start_ns", "size_bytes"),
)
_aggregates = Table(
    "aggregates",
    metadata,
    Column("probe", String(64), primary_key=True),
    Column("body", Text, nullable=False),
    Column("data", LargeBinary, nullable=False),
)


class SqlStore:
    """A ``Store`` on an SQLAlchemy engine."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    @asynccontextmanager
    async def _begin(self) -> AsyncIterator[AsyncConnection]:
        try:
            async with self._engine.begin() as connection:
                yield connection
        except (SQLAlchemyError, OSError) as e:
            why = str(getattr(e, "orig", None) or e).splitlines()[0]
            raise Unavailable(
                f"the database does not answer: {why}", hint="is its disk full, or its directory not writable?"
            ) from e

    async def open(self) -> None:
        async with self._begin() as c:
            await c.run_sync(metadata.create_all)
            version = (await c.execute(select(func.max(_schema.c.version)))).scalar()
            if version is None:
                await c.execute(insert(_schema).values(version=SCHEMA_VERSION))
            elif version != SCHEMA_VERSION:
                raise Conflict(
                    f"the database has schema version {version}, this release of Trapline knows {SCHEMA_VERSION}",
                    hint="run the release that wrote it, or set TRAPLINE_STATE_DIR to another directory",
                )

    async def close(self) -> None:
        await self._engine.dispose()

    async def ping(self) -> None:
        async with self._begin() as c:
            await c.execute(select(_schema.c.version))

    # --- tokens ---

    async def tokens(self, prefix: str) -> list[TokenRecord]:
        async with self._begin() as c:
            rows = (await c.execute(select(_tokens).where(_tokens.c.prefix == prefix))).all()
        return [
            TokenRecord(r.id, r.name, r.role, r.prefix, r.digest, datetime.fromisoformat(r.created_at)) for r in rows
        ]

    async def has_tokens(self) -> bool:
        async with self._begin() as c:
            return (await c.execute(select(_tokens.c.id).limit(1))).first() is not None

    async def put_token(self, token: TokenRecord) -> None:
        async with self._begin() as c:
            await c.execute(delete(_tokens).where(_tokens.c.name == token.name))
            await c.execute(
                insert(_tokens).values(
                    id=token.id,
                    name=token.name,
                    role=token.role,
                    prefix=token.prefix,
                    digest=token.digest,
                    created_at=token.created_at.astimezone(UTC).isoformat(),
                )
            )

    # --- probes and hosts ---

    async def probes(self) -> list[ProbeRecord]:
        async with self._begin() as c:
            rows = (await c.execute(select(_probes.c.body).order_by(_probes.c.id))).scalars().all()
        return [ProbeRecord.model_validate_json(body) for body in rows]

    async def put_probes(self, records: Sequence[ProbeRecord]) -> None:
        async with self._begin() as c:
            for record in records:
                await _put_body(c, _probes, record.probe.id, record.model_dump_json())

    async def delete_probe(self, id: str) -> None:
        async with self._begin() as c:
            await c.execute(delete(_probes).where(_probes.c.id == id))

    async def hosts(self) -> list[Host]:
        async with self._begin() as c:
            rows = (await c.execute(select(_hosts.c.body).order_by(_hosts.c.id))).scalars().all()
        return [Host.model_validate_json(body) for body in rows]

    async def put_host(self, host: Host) -> None:
        async with self._begin() as c:
            await _put_body(c, _hosts, host.id, host.model_dump_json())

    # --- recorded hits ---

    async def add_chunks(self, chunks: Sequence[Chunk], positions: Sequence[LinkPosition]) -> None:
        rows = [
            {
                "id": k.id,
                "probe": k.probe,
                "host": k.host,
                "source": k.source,
                "seq_from": k.seq_from,
                "seq_to": k.seq_to,
                "t0_ns": k.t0_ns,
                "t1_ns": k.t1_ns,
                "count": k.count,
                "size_bytes": len(k.data),
                "data": k.data,
            }
            for k in chunks
        ]
        async with self._begin() as c:
            if rows:
                await c.execute(insert(_chunks), rows)
            for p in positions:
                at = {"link_id": p.link_id, "link_seq": p.link_seq}
                change = update(_links).where(_links.c.host == p.host).values(**at)
                if not await _changed(c, change):
                    await c.execute(insert(_links).values(host=p.host, **at))

    async def chunks(
        self, *, probe: str | None, host: str | None, until_ns: int | None, offset: int, limit: int
    ) -> list[Chunk]:
        query = select(_chunks).order_by(_chunks.c.t1_ns.desc(), _chunks.c.id.desc()).offset(offset).limit(limit)
        if probe is not None:
            query = query.where(_chunks.c.probe == probe)
        if host is not None:
            query = query.where(_chunks.c.host == host)
        if until_ns is not None:
            query = query.where(_chunks.c.t0_ns <= until_ns)
        async with self._begin() as c:
            rows = (await c.execute(query)).mappings().all()
        return [
            Chunk(
                r["id"],
                r["probe"],
                r["host"],
                r["source"],
                r["seq_from"],
                r["seq_to"],
                r["t0_ns"],
                r["t1_ns"],
                r["count"],
                r["data"],
            )
            for r in rows
        ]

    async def sequences(self) -> dict[tuple[str, str, str], int]:
        key = (_chunks.c.probe, _chunks.c.host, _chunks.c.source)
        async with self._begin() as c:
            rows = (await c.execute(select(*key, func.max(_chunks.c.seq_to)).group_by(*key))).all()
        return {(probe, host, source): last + 1 for probe, host, source, last in rows}

    async def positions(self) -> list[LinkPosition]:
        async with self._begin() as c:
            rows = (await c.execute(select(_links))).all()
        return [LinkPosition(r.host, r.link_id, r.link_seq) for r in rows]

    async def trim_chunks(self, *, max_bytes: int, before_ns: int) -> int:
        return await self._trim(_chunks, _chunks.c.t1_ns, max_bytes, before_ns)

    async def _trim(self, table: Table, at: Column[int], max_bytes: int, before_ns: int) -> int:
        """Removes rows whose time ``at`` is before ``before_ns``, and the oldest beyond ``max_bytes``."""
        async with self._begin() as c:
            removed = (await c.execute(delete(table).where(at < before_ns))).rowcount
            excess = ((await c.execute(select(func.sum(table.c.size_bytes)))).scalar() or 0) - max_bytes
            if excess > 0:
                oldest = await c.stream(select(table.c.id, table.c.size_bytes).order_by(at))
                doomed = []
                async for id, size in oldest:
                    doomed.append(id)
                    excess -= size
                    if excess <= 0:
                        break
                await oldest.close()
                for first in range(0, len(doomed), 500):  # databases bound the number of parameters
                    await c.execute(delete(table).where(table.c.id.in_(doomed[first : first + 500])))
                removed += len(doomed)
        return removed

    # --- aggregates ---

    async def put_aggregates(
        self, wholes: Sequence[Whole], rollups: Sequence[Rollup], *, gone: Collection[str]
    ) -> None:
        async with self._begin() as c:
            for probe in gone:
                await c.execute(delete(_rollups).where(_rollups.c.probe == probe))
                await c.execute(delete(_aggregates).where(_aggregates.c.probe == probe))
            for r in rollups:
                row = {"probe": r.probe, "start_ns": r.start_ns, "size_bytes": len(r.data), "data": r.data}
                if not await _changed(c, update(_rollups).where(_rollups.c.id == r.id).values(**row)):
                    await c.execute(insert(_rollups).values(id=r.id, **row))
            for w in wholes:
                body = msgspec.json.encode(
                    {"next": w.next, "lost": w.lost, "since_ns": w.since_ns, "until_ns": w.until_ns}
                ).decode()
                change = update(_aggregates).where(_aggregates.c.probe == w.probe).values(body=body, data=w.data)
                if not await _changed(c, change):
                    await c.execute(insert(_aggregates).values(probe=w.probe, body=body, data=w.data))

    async def wholes(self) -> list[Whole]:
        async with self._begin() as c:
            rows = (await c.execute(select(_aggregates))).all()
        return [Whole(probe=r.probe, data=r.data, **msgspec.json.decode(r.body)) for r in rows]

    async def rollups(self, probe: str, since_ns: int, until_ns: int) -> list[Rollup]:
        at = _rollups.c.start_ns
        query = select(_rollups).where(_rollups.c.probe == probe, at >= since_ns, at < until_ns).order_by(at)
        async with self._begin() as c:
            rows = (await c.execute(query)).all()
        return [Rollup(r.id, r.probe, r.start_ns, r.data) for r in rows]

    async def trim_rollups(self, *, max_bytes: int, before_ns: int) -> int:
        return await self._trim(_rollups, _rollups.c.start_ns, max_bytes, before_ns)


async def _changed(connection: AsyncConnection, statement: Update) -> bool:
    return (await connection.execute(statement)).rowcount > 0


async def _put_body(connection: AsyncConnection, table: Table, id: str, body: str) -> None:
    if not await _changed(connection, update(table).where(table.c.id == id).values(body=body)):
        await connection.execute(insert(table).values(id=id, body=body))
