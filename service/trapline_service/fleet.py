"""The hosts: which are known, which are online, what runs there, and questions to their agents."""

from __future__ import annotations

import asyncio
import fnmatch
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal, Protocol

from trapline.errors import Conflict, NotFound, TraplineError, Unavailable
from trapline.ids import new_id
from trapline.model import Host, Model, Process
from trapline.protocol.messages import Heartbeat, Hello, Processes, Reply, Request
from trapline_service.coalesce import Coalescer
from trapline_service.hub import Hub
from trapline_service.peer import peer_error
from trapline_service.store.base import Store

log = logging.getLogger(__name__)

_PUBLISH_S = 0.25
SILENT_BEATS = 3
"""Heartbeats that may be missing before a host counts as offline."""
_MAX_QUESTIONS = 256


class AgentPort(Protocol):
    """The agent's end of a link, as the fleet sees it."""

    def send(self, message: Model) -> None:
        """Queues a message; never waits."""
        ...

    def end(self, error: TraplineError) -> None:
        """Tells the agent why, and closes its socket."""
        ...


@dataclass
class Member:
    """A host of the fleet."""

    host: Host
    port: AgentPort | None = None
    processes: dict[str, Process] = field(default_factory=dict)
    last_frame: float = 0.0
    """Monotonic seconds of the agent's last frame."""
    questions: dict[str, asyncio.Future[dict[str, Any]]] = field(default_factory=dict)


class Fleet:
    """All hosts. Belongs to one event loop."""

    def __init__(self, store: Store, hub: Hub, *, heartbeat_s: float, request_timeout_s: float) -> None:
        self._store = store
        self._hub = hub
        self.heartbeat_s = heartbeat_s
        self._request_timeout_s = request_timeout_s
        self._members: dict[str, Member] = {}
        self._publish = Coalescer(_PUBLISH_S, self._publish_now)
        self.presence_changed: Callable[[str], None] = lambda host: None
        """Called with a host's id when it came or went."""

    async def load(self) -> None:
        """Brings back the hosts that were seen before; all are offline."""
        for host in await self._store.hosts():
            host.online = False
            host.process_count = 0
            self._members[host.id] = Member(host)

    # --- who is there ---

    def hosts(self) -> list[Host]:
        return [m.host for m in sorted(self._members.values(), key=lambda m: m.host.id)]

    def member(self, host: str) -> Member:
        """Returns a host by its id, or by its name where only one has it. Raises NotFound, Conflict."""
        if host in self._members:
            return self._members[host]
        named = [m for m in self._members.values() if m.host.facts.name == host]
        if len(named) > 1:
            raise Conflict(
                f"{len(named)} hosts are named `{host}`", hint="use the id", suggestions=[m.host.id for m in named]
            )
        if not named:
            known = sorted({m.host.facts.name for m in self._members.values()})
            raise NotFound(
                f"no host `{host}` is known here", hint="GET /api/v1/hosts lists them", suggestions=known[:3]
            )
        return named[0]

    def name_of(self, host: str) -> str:
        """Returns a host's name for its id, or the id where it is not known."""
        member = self._members.get(host)
        return member.host.facts.name if member else host

    def online(self, pattern: str = "*") -> list[str]:
        """Returns the ids of the hosts that are online and whose name or id matches a shell pattern."""
        return [id for id, m in sorted(self._members.items()) if m.port is not None and self.matches(id, pattern)]

    def matches(self, host: str, pattern: str) -> bool:
        return fnmatch.fnmatchcase(host, pattern) or fnmatch.fnmatchcase(self.name_of(host), pattern)

    def is_online(self, host: str) -> bool:
        member = self._members.get(host)
        return member is not None and member.port is not None

    # --- who comes and goes ---

    def connect(self, hello: Hello, port: AgentPort) -> None:
        """An agent has said hello: it is its host's from now on; a former link of the same host is closed."""
        member = self._members.get(hello.instance_id)
        if member is None:
            member = Member(Host(id=hello.instance_id, online=True, facts=hello.facts))
            self._members[hello.instance_id] = member
        if member.port is not None:
            former = member.port
            self._let_go(member)
            former.end(
                Conflict(
                    f"another agent has linked as host {hello.instance_id}",
                    hint="run one agent a host, and copy no agent's state directory to another host",
                )
            )
        now = datetime.now(UTC)
        member.port = port
        member.last_frame = time.monotonic()
        member.host = Host(id=hello.instance_id, online=True, facts=hello.facts, connected_at=now, last_seen=now)
        member.processes = {}
        log.info("host %s (%s) is online", hello.facts.name, hello.instance_id)
        self.presence_changed(hello.instance_id)
        self._publish.add(hello.instance_id)

    def disconnect(self, host: str, port: AgentPort) -> None:
        """A link is over. Nothing happens when another one has taken its place."""
        member = self._members[host]
        if member.port is not port:
            return
        self._let_go(member)
        log.info("host %s (%s) is offline", member.host.facts.name, host)
        self.presence_changed(host)
        self._publish.add(host)

    async def save(self, host: str) -> None:
        """Keeps what is known of a host, so that it is still listed after a restart. A failure is logged alone."""
        try:
            await self._store.put_host(self._members[host].host)
        except TraplineError as e:
            log.error("host %s was not saved: %s", host, e)

    def _let_go(self, member: Member) -> None:
        member.port = None
        member.host.online = False
        member.host.last_seen = datetime.now(UTC)
        for question in member.questions.values():
            if not question.done():
                question.set_exception(Unavailable(f"host {member.host.facts.name} went offline before it answered"))
        member.questions.clear()

    def heard(self, host: str) -> None:
        """Any frame is a sign of life."""
        self._members[host].last_frame = time.monotonic()

    async def keep_watch(self) -> None:
        """Sends heartbeats, and ends the links that have been silent for too long; runs until it is cancelled."""
        while True:
            await asyncio.sleep(self.heartbeat_s)
            limit = time.monotonic() - SILENT_BEATS * self.heartbeat_s
            for member in list(self._members.values()):
                if member.port is None:
                    continue
                if member.last_frame < limit:
                    port = member.port
                    self.disconnect(member.host.id, port)
                    port.end(Unavailable(f"nothing was heard for {SILENT_BEATS * self.heartbeat_s:g} s"))
                else:
                    member.host.last_seen = datetime.now(UTC)
                    member.port.send(Heartbeat())

    # --- what runs there ---

    def update_processes(self, host: str, message: Processes) -> None:
        member = self._members[host]
        if message.full:
            member.processes = {}
        for process in message.upsert:
            process.host = host
            member.processes[process.id] = process
        for id in message.removed:
            member.processes.pop(id, None)
        if member.host.process_count != len(member.processes):
            member.host.process_count = len(member.processes)
            self._publish.add(host)

    # --- questions ---

    def send(self, host: str, message: Model) -> None:
        """Says something to a host, if it is online."""
        member = self._members.get(host)
        if member is not None and member.port is not None:
            member.port.send(message)

    async def ask(
        self,
        host: str,
        method: Literal["resolve", "symbols", "modules", "coverage", "symbolize"],
        params: dict[str, Any],
    ) -> dict[str, Any]:
        """Asks a host's agent, and waits for its answer.

        Raises:
            Unavailable: the host is offline, went offline meanwhile, or did not answer in time.
            TraplineError: what the agent answered with.
        """
        member = self.member(host)
        name = member.host.facts.name
        if member.port is None:
            raise Unavailable(f"host {name} is offline", hint="is its agent running?")
        if len(member.questions) >= _MAX_QUESTIONS:
            raise Unavailable(f"host {name} has {_MAX_QUESTIONS} questions to answer already", hint="try again")
        request = Request(id=new_id("req"), method=method, params=params)
        answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        member.questions[request.id] = answer
        member.port.send(request)
        try:
            async with asyncio.timeout(self._request_timeout_s):
                return await answer
        except TimeoutError:
            raise Unavailable(
                f"host {name} did not answer `{method}` within {self._request_timeout_s:g} s",
                hint="it may be busy reading symbols: try again",
            ) from None
        finally:
            member.questions.pop(request.id, None)

    def answered(self, host: str, reply: Reply) -> None:
        """Passes an answer on to who asked; one that comes too late is ignored."""
        question = self._members[host].questions.get(reply.id)
        if question is None or question.done():
            return
        if reply.error is not None:
            question.set_exception(peer_error(reply.error))
        else:
            question.set_result(reply.result or {})

    # --- what people see ---

    def _publish_now(self, hosts: set[str]) -> None:
        for id in sorted(hosts):
            self._hub.changed("hosts", id, status_fields(self._members[id].host))

    def close(self) -> None:
        """Ends all links: the service stops."""
        for member in self._members.values():
            if member.port is not None:
                member.port.end(Unavailable("the service stops", hint="link again in a while"))


def status_fields(host: Host) -> str:
    """Returns a host as the members of a ``Status`` message after its ``id``."""
    return f'"probe":null,"host":{host.model_dump_json()},"aggregate":null,"removed":null'
