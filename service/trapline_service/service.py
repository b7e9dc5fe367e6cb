"""The service's parts, put together: everything but HTTP."""

from __future__ import annotations

import asyncio
import logging
from types import TracebackType
from typing import Self

from trapline.errors import NotFound, TraplineError
from trapline.model import Aggregate
from trapline_service.aggregates import Aggregates
from trapline_service.auth import Tickets, Tokens
from trapline_service.config import Settings
from trapline_service.fleet import Fleet
from trapline_service.hub import Hub, Subscriber
from trapline_service.ledger import Ledger
from trapline_service.link import AgentLink, Links
from trapline_service.probes import Probes
from trapline_service.recorder import Recorder
from trapline_service.store.base import Store

log = logging.getLogger(__name__)


class Service:
    """All parts of one service process; ``async with service: ...`` runs it.

    Attributes:
        new_token: the admin token where entering made one, for its owner to see this once; None otherwise.
    """

    def __init__(self, settings: Settings, store: Store) -> None:
        self.settings = settings
        self.store = store
        self.tokens = Tokens(store)
        self.tickets = Tickets(settings.ticket_ttl_s)
        self.hub = Hub()
        self.ledger = Ledger()
        self.fleet = Fleet(
            store, self.hub, heartbeat_s=settings.heartbeat_s, request_timeout_s=settings.request_timeout_s
        )
        self.probes = Probes(store, self.fleet, self.hub, self.ledger, retention_s=settings.retention_s)
        self.recorder = Recorder(
            store,
            max_queue_bytes=settings.recorder_queue_bytes,
            retention_bytes=settings.retention_bytes,
            retention_s=settings.retention_s,
        )
        self.aggregates = Aggregates(
            store,
            self.hub,
            self._aggregate_of,
            max_keys=settings.aggregate_keys,
            retention_bytes=settings.retention_bytes,
            retention_s=settings.retention_s,
        )
        self.probes.forgotten = self.aggregates.forget
        self._links = Links(self.fleet, self.probes, self.ledger, self.hub, self.aggregates)
        self.new_token: str | None = None
        self._tasks = asyncio.TaskGroup()
        self._background: list[asyncio.Task[None]] = []

    def _aggregate_of(self, probe: str) -> Aggregate | None:
        try:
            return self.probes.get(probe).spec.aggregate
        except NotFound:
            return None

    def new_link(self) -> AgentLink:
        """Returns the link of an agent that has just been let in."""
        return AgentLink(self._links)

    def new_subscriber(self, *, binary: bool) -> Subscriber:
        """Returns the queue of a subscriber that has just been let in."""
        return Subscriber(
            binary=binary,
            max_bytes=self.settings.subscriber_queue_bytes,
            probe_name=self.probes.name_of,
            host_name=self.fleet.name_of,
        )

    async def __aenter__(self) -> Self:
        await self.store.open()
        given = self.settings.admin_token
        self.new_token = await self.tokens.prepare(given.get_secret_value() if given else None)
        self.ledger.load(await self.store.sequences())
        self._links.positions = {p.host: p for p in await self.store.positions()}
        await self.fleet.load()
        await self.aggregates.load()
        self.ledger.load(self.aggregates.sequences())
        await self.probes.load()
        self.aggregates.keep_only(probe.id for probe in self.probes.all())
        self.fleet.presence_changed = self.probes.presence_changed
        self.hub.attach(self.recorder)
        await self._tasks.__aenter__()
        for work in (
            self.fleet.keep_watch(),
            self.probes.keep_deadlines(),
            self.probes.keep_saved(),
            self.recorder.keep_writing(),
            self.aggregates.keep_writing(),
        ):
            self._background.append(self._tasks.create_task(work))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._background:
            task.cancel()
        try:
            await self._tasks.__aexit__(kind, error, trace)
        finally:
            self.say_goodbye()
            try:
                await self.recorder.flush()
                await self.aggregates.flush()
                await self.probes.save()
            except TraplineError as e:
                log.error("the last changes were not saved: %s", e)
            await self.store.close()

    def say_goodbye(self) -> None:
        """Ends all links and subscriptions in good order; their sockets close when they have sent what says so."""
        self.hub.close("the service stops")
        self.fleet.close()
