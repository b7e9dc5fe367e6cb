"""The Python client of a Trapline service: ``Client`` for ordinary code, ``AsyncClient`` for asyncio.

::

    from trapline.client import Client

    with Client() as trapline:
        probe = trapline.create_probe("redis-server:processCommand {arg0}")
        for item in trapline.stream(probes=[probe.id]):
            print(item)

Both run the same conversations, written once as generators: each yields what is to be done (a request, a pause), is
sent the response, and returns the result. The two classes only differ in how they wait.

Without arguments they talk to ``$TRAPLINE_URL`` with ``$TRAPLINE_TOKEN``, or to the service that this user runs on this
machine (``trapline.state``).
"""

from __future__ import annotations

import asyncio
import os
import struct
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Literal, Self, TypeVar
from urllib.parse import quote

import httpx
import websockets.asyncio.client
import websockets.sync.client
from pydantic import ValidationError
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus
from websockets.typing import Subprotocol

from trapline.errors import AuthError, NotFound, ProtocolError, TraplineError, Unavailable
from trapline.model import (
    AggregateTable,
    CoverageLog,
    FrameNames,
    Hit,
    Host,
    Model,
    Module,
    Phase,
    Probe,
    ProbeCreate,
    ProbeLimits,
    Problem,
    Process,
    Resolution,
    StackFrame,
    Symbolize,
    SymbolPage,
    Target,
)
from trapline.protocol import hits as hit_codec
from trapline.protocol import stream as s
from trapline.protocol.messages import encode
from trapline.protocol.stream import Gap
from trapline.state import DEFAULT_PORT, is_loopback, read_access, state_dir

__all__ = ["AsyncClient", "Client", "Gap", "Hit", "HitBatch"]

HitBatch = hit_codec.HitBatch
T = TypeVar("T")
M = TypeVar("M", bound=Model)

_PAGE = 500
_HITS_PAGE = 10_000
_STREAM_PREFIX = struct.Struct("<II")
_MAX_FRAME_BYTES = 32 * 1024 * 1024
_SETTLED = (Phase.ARMED, Phase.PARTIAL, Phase.NO_TARGETS, Phase.COMPLETED, Phase.EXPIRED, Phase.ERROR)


# --- conversations ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """One HTTP request below ``/api/v1``."""

    method: str
    path: str
    params: Mapping[str, str | int] = field(default_factory=dict)
    body: Model | None = None


@dataclass(frozen=True)
class Pause:
    """Seconds to wait before going on."""

    seconds: float


Exchange = Generator[Request | Pause, dict[str, Any], T]
"""A conversation: yields steps, is sent the parsed JSON body of each response ({} after a pause), returns ``T``."""


def _read(model: type[M], fields: object) -> M:
    try:
        return model.model_validate(fields)
    except ValidationError as e:
        raise ProtocolError(
            f"the service's answer is not a {model.__name__}: {e.errors(include_url=False)[0]['msg']}",
            hint="client and service may be of different releases",
        ) from e


def _segment(name: str) -> str:
    """Returns a name as one segment of a path, whatever is in it."""
    return quote(name, safe="")


def _one(model: type[M], request: Request) -> Exchange[M]:
    return _read(model, (yield request))


def _all(model: type[M], path: str, params: Mapping[str, str | int] | None = None) -> Exchange[list[M]]:
    items: list[M] = []
    wanted: dict[str, str | int] = {k: v for k, v in (params or {}).items() if v != ""}
    while True:
        page = yield Request("GET", path, wanted)
        items += (_read(model, item) for item in page.get("items", []))
        token = page.get("next_page_token")
        if not token:
            return items
        wanted["page_token"] = str(token)


def _processes(host: str, filter: str) -> Exchange[list[Process]]:
    return _all(Process, f"/hosts/{_segment(host)}/processes", {"filter": filter, "page_size": _PAGE})


def _symbols(query: str, module: str, host: str, limit: int) -> Exchange[list[SymbolPage]]:
    return _all(SymbolPage, "/symbols", {"q": query, "module": module, "host": host, "limit": limit})


def _latest_hits(probe: str, host: str, limit: int) -> Exchange[list[Hit]]:
    items: list[Hit] = []
    wanted: dict[str, str | int] = {k: v for k, v in (("probe", probe), ("host", host)) if v}
    while len(items) < limit:
        wanted["limit"] = min(limit - len(items), _HITS_PAGE)
        page = yield Request("GET", "/hits", wanted)
        # Each page is older than the one before it, and in itself ends with the newest.
        items[:0] = (_read(Hit, item) for item in page.get("items", []))
        if not page.get("next_page_token"):
            break
        wanted["page_token"] = str(page["next_page_token"])
    return items


def _aggregate(
    probe: str, top: int, since: datetime | None, until: datetime | None, step: int | None
) -> Exchange[AggregateTable]:
    wanted: dict[str, str | int] = {"top": top}
    for name, at in (("since", since), ("until", until)):
        if at is not None:
            wanted[name] = at.astimezone(UTC).isoformat()
    if step is not None:
        wanted["step"] = step
    return _one(AggregateTable, Request("GET", f"/probes/{_segment(probe)}/aggregates", wanted))


def _symbolize(host: str, frames: Sequence[StackFrame]) -> Exchange[list[list[str]]]:
    body = Symbolize(frames=list(frames))
    return _read(FrameNames, (yield Request("POST", f"/hosts/{_segment(host)}:symbolize", body=body))).names


def _create(action: str, body: ProbeCreate, model: type[M]) -> Exchange[M]:
    return _read(model, (yield Request("POST", action, body=body)))


def _pauses(timeout: float) -> Iterator[Pause]:
    """Yields ever longer pauses, until they sum up to ``timeout`` seconds."""
    pause, waited = 0.02, 0.0
    while waited < timeout:
        yield Pause(pause)
        waited += pause
        pause = min(2 * pause, 0.5)


def _wait_for(probe: str, true: Callable[[Probe], bool], timeout: float) -> Exchange[Probe]:
    pauses = _pauses(timeout)
    while True:
        now = _read(Probe, (yield Request("GET", f"/probes/{_segment(probe)}")))
        if true(now):
            return now
        if (pause := next(pauses, None)) is None:
            raise Unavailable(
                f"probe {now.name} is still {now.status.phase}, with {now.status.counters.hits} hits, after {timeout:g} s",
                hint="see its conditions with `trapline probe show`",
            )
        yield pause


def _settled(probe: Probe) -> bool:
    return probe.status.phase in _SETTLED


def _wait_host(host: str, timeout: float) -> Exchange[Host]:
    pauses = _pauses(timeout)
    while True:
        for found in (yield from _all(Host, "/hosts")):
            if found.online and host in ("", found.id, found.facts.name):
                return found
        if (pause := next(pauses, None)) is None:
            raise Unavailable(f"{f'{host} is not' if host else 'no host is'} online after {timeout:g} s")
        yield pause


def _delete(probe: str, wait: bool, timeout: float) -> Exchange[Probe]:
    last = _read(Probe, (yield Request("DELETE", f"/probes/{_segment(probe)}")))
    pauses = _pauses(timeout)
    while wait:
        try:
            last = _read(Probe, (yield Request("GET", f"/probes/{_segment(last.id)}")))
        except NotFound:
            break
        if (pause := next(pauses, None)) is None:
            raise Unavailable(
                f"probe {last.name} is not out of every process after {timeout:g} s",
                hint="a host may be offline; the service goes on by itself",
            )
        yield pause
    return last


def _body(
    text: str, name: str, ttl_s: int | None, labels: Mapping[str, str], limits: ProbeLimits, offline: bool
) -> ProbeCreate:
    return ProbeCreate(
        probe=text,
        name=name,
        ttl_s=ttl_s,
        labels=dict(labels),
        limits=limits,
        allow_offline=offline,
    )


# --- what both clients have in common --------------------------------------------------------------------------------


def problem_error(response: httpx.Response) -> TraplineError:
    """Returns the error that a response of status 400 or above stands for."""
    try:
        problem = Problem.model_validate_json(response.content)
    except ValidationError:
        text = f"{response.request.url} answered {response.status_code} {response.reason_phrase}"
        return (
            AuthError(text)
            if response.status_code in (401, 403)
            else ProtocolError(text, hint="is a Trapline service there?")
        )
    text, _, mark = problem.caret.partition("\n")
    fields: dict[str, Any] = {
        "code": problem.code,
        "detail": problem.detail or problem.title,
        "hint": problem.hint,
        "reason": problem.reason,
        "suggestions": problem.suggestions,
        "pointer": str(problem.errors[0].get("pointer", "")) if problem.errors else "",
    }
    if "^" in mark:
        fields |= {"text": text, "position": mark.index("^")}
    return TraplineError.from_wire(fields)


class _Base:
    """Where the service is, and what proves who we are."""

    def __init__(self, url: str | None = None, token: str | None = None) -> None:
        """
        Args:
            url: the service, ``http://HOST:PORT``; by default ``$TRAPLINE_URL``, or this machine's own.
            token: bearer token; by default ``$TRAPLINE_TOKEN``, or this machine's own, for its own service only.
        """
        local = read_access(state_dir())
        url = url or os.environ.get("TRAPLINE_URL") or (local.url if local else f"http://127.0.0.1:{DEFAULT_PORT}")
        self.url = url.rstrip("/")
        token = token or os.environ.get("TRAPLINE_TOKEN")
        if not token and local is not None and local.url.rstrip("/") == self.url:
            token = local.token
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._direct = is_loopback(self.url)

    def _http(self) -> dict[str, Any]:
        return {
            "base_url": f"{self.url}/api/v1",
            "headers": self._headers,
            "timeout": 30.0,
            # A proxy of the environment must not come between this machine and itself.
            "trust_env": not self._direct,
        }

    def _websocket(self) -> dict[str, Any]:
        return {
            "uri": f"ws{self.url.removeprefix('http')}/api/v1/stream",
            "additional_headers": self._headers,
            "subprotocols": [Subprotocol(s.BINARY_SUBPROTOCOL)],
            "compression": None,
            "max_size": _MAX_FRAME_BYTES,
            "proxy": None if self._direct else True,
        }

    def _unreachable(self, error: Exception) -> TraplineError:
        if isinstance(error, InvalidStatus):
            status = error.response.status_code
            if status in (401, 403):
                return AuthError(f"the service at {self.url} refuses the token", hint="set TRAPLINE_TOKEN")
            return Unavailable(f"the service at {self.url} answered {status} instead of opening a stream")
        why = str(error) or type(error).__name__
        return Unavailable(
            f"no service answers at {self.url}: {why}", hint="start one with `trapline up`, or set TRAPLINE_URL"
        )

    @staticmethod
    def _parse(response: httpx.Response) -> dict[str, Any]:
        if response.status_code >= 400:
            raise problem_error(response)
        try:
            fields = response.json() if response.content else {}
        except ValueError:
            fields = None
        if not isinstance(fields, dict):
            raise ProtocolError(f"{response.request.url} did not answer in JSON", hint="is a Trapline service there?")
        return fields

    @staticmethod
    def _subscription(probes: Sequence[str] | None, hosts: Sequence[str] | None) -> str:
        wanted = s.StreamFilter(
            probes=None if probes is None else list(probes), hosts=None if hosts is None else list(hosts)
        )
        return encode(s.Subscribe(id="hits", topic="hits", filter=wanted))

    @staticmethod
    def _items(frame: str | bytes) -> Iterator[HitBatch | Gap]:
        """Yields what a frame of the stream holds. Raises the error that it tells of."""
        if isinstance(frame, bytes):
            if len(frame) < _STREAM_PREFIX.size:
                raise ProtocolError(f"stream frame of {len(frame)} bytes is shorter than its prefix")
            yield hit_codec.decode(memoryview(frame)[_STREAM_PREFIX.size :])
            return
        message = s.parse_server_message(frame)
        if isinstance(message, Gap):
            yield message
        elif isinstance(message, s.StreamError):
            raise TraplineError.from_wire(message.error)
        elif isinstance(message, s.Bye):
            raise Unavailable(f"the service ended the stream: {message.reason}")


class Client(_Base):
    """A service, for ordinary code; not to be shared between threads while a stream is read.

    Every method raises the error that the service told of (``trapline.errors``), Unavailable when none answers.
    """

    def __init__(self, url: str | None = None, token: str | None = None) -> None:
        super().__init__(url, token)
        self._client = httpx.Client(**self._http())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._client.close()

    def _run(self, exchange: Exchange[T]) -> T:
        try:
            step = next(exchange)
            while True:
                try:
                    answer = self._perform(step)
                except TraplineError as e:
                    step = exchange.throw(e)
                else:
                    step = exchange.send(answer)
        except StopIteration as done:
            result: T = done.value
            return result

    def _perform(self, step: Request | Pause) -> dict[str, Any]:
        if isinstance(step, Pause):
            time.sleep(step.seconds)
            return {}
        body = None if step.body is None else step.body.model_dump(mode="json")
        try:
            response = self._client.request(step.method, step.path, params=dict(step.params), json=body)
        except httpx.TransportError as e:
            raise self._unreachable(e) from e
        return self._parse(response)

    def hosts(self) -> list[Host]:
        return self._run(_all(Host, "/hosts"))

    def host(self, host: str) -> Host:
        return self._run(_one(Host, Request("GET", f"/hosts/{_segment(host)}")))

    def processes(self, host: str, filter: str = "") -> list[Process]:
        """Returns a host's processes; ``filter`` is looked for in name, command line, user and pid."""
        return self._run(_processes(host, filter))

    def modules(self, host: str, pid: int = 0) -> list[Module]:
        """Returns the files that a process (0: any process) of a host maps executable."""
        return self._run(_all(Module, f"/hosts/{_segment(host)}/modules", {"pid": pid}))

    def symbols(self, query: str, *, module: str = "", host: str = "", limit: int = 50) -> list[SymbolPage]:
        """Searches symbols; one page for each host that was asked."""
        return self._run(_symbols(query, module, host, limit))

    def symbolize(self, host: str, frames: Sequence[StackFrame]) -> list[list[str]]:
        """Names frames of ``Hit.stacks``: for each the functions that are inlined there, then the function."""
        return self._run(_symbolize(host, frames))

    def resolve(self, probe: str) -> Resolution:
        """Says what a probe text would do, and does nothing."""
        return self._run(_create("/probes:resolve", ProbeCreate(probe=probe), Resolution))

    def create_probe(
        self,
        probe: str,
        *,
        name: str = "",
        ttl_s: int | None = 3600,
        labels: Mapping[str, str] | None = None,
        max_hits: int | None = None,
        overhead: float | Literal["off"] | None = None,
        allow_offline: bool = False,
    ) -> Probe:
        """Creates a probe. It is armed moments later: see ``wait``."""
        limits = ProbeLimits(max_hits=max_hits, overhead=overhead)
        return self._run(_create("/probes", _body(probe, name, ttl_s, labels or {}, limits, allow_offline), Probe))

    def probes(self) -> list[Probe]:
        return self._run(_all(Probe, "/probes"))

    def probe(self, probe: str) -> Probe:
        """Returns a probe by id or name."""
        return self._run(_one(Probe, Request("GET", f"/probes/{_segment(probe)}")))

    def wait(self, probe: str, *, timeout: float = 30.0) -> Probe:
        """Waits until a probe's hosts have said how it went; returns it then."""
        return self._run(_wait_for(probe, _settled, timeout))

    def wait_for(self, probe: str, true: Callable[[Probe], bool], *, timeout: float = 30.0) -> Probe:
        """Waits until something is true of a probe; returns it then. Raises Unavailable when it takes too long."""
        return self._run(_wait_for(probe, true, timeout))

    def wait_host(self, host: str = "", *, timeout: float = 30.0) -> Host:
        """Waits until a host (its name or id; empty: any) is online; returns it then. Raises Unavailable as ``wait_for``."""
        return self._run(_wait_host(host, timeout))

    def delete_probe(self, probe: str, *, wait: bool = True, timeout: float = 30.0) -> Probe:
        """Deletes a probe; with ``wait`` it returns when its breakpoints are out on every online host."""
        return self._run(_delete(probe, wait, timeout))

    def targets(self, probe: str) -> list[Target]:
        """Returns where a probe is armed, and where not and why."""
        return self._run(_all(Target, f"/probes/{_segment(probe)}/targets"))

    def coverage(self, probe: str) -> list[CoverageLog]:
        """Returns when a probe was armed in which process, and where calls may have been missed; one log a host."""
        return self._run(_all(CoverageLog, f"/probes/{_segment(probe)}/coverage"))

    def hits(self, probe: str = "", *, host: str = "", limit: int = 100) -> list[Hit]:
        """Returns the latest recorded hits, newest last."""
        return self._run(_latest_hits(probe, host, limit))

    def aggregate(
        self,
        probe: str,
        *,
        top: int = 100,
        since: datetime | None = None,
        until: datetime | None = None,
        step: int | None = None,
    ) -> AggregateTable:
        """Returns what a probe's aggregate says so far, or of a time.

        Args:
            probe: id or name.
            top: rows, those with the most hits.
            since: only hits from then on, to ten seconds.
            until: only hits before then; None: up to now.
            step: with ``since``, a series too, in steps of so many seconds, a multiple of ten.
        """
        return self._run(_aggregate(probe, top, since, until, step))

    def batches(
        self, probes: Sequence[str] | None = None, hosts: Sequence[str] | None = None
    ) -> Iterator[HitBatch | Gap]:
        """Yields hits as they come, as columns; for many of them. Ends with Unavailable when the service goes away."""
        try:
            with websockets.sync.client.connect(**self._websocket()) as socket:
                socket.send(self._subscription(probes, hosts))
                while True:
                    yield from self._items(socket.recv())
        except (OSError, TimeoutError, InvalidHandshake, ConnectionClosed) as e:
            raise self._unreachable(e) from e

    def stream(self, probes: Sequence[str] | None = None, hosts: Sequence[str] | None = None) -> Iterator[Hit | Gap]:
        """Yields hits as they come, of these probes (ids or names; None: all); a ``Gap`` says how many are missing."""
        for item in self.batches(probes, hosts):
            if isinstance(item, Gap):
                yield item
            else:
                yield from item.hits()


class AsyncClient(_Base):
    """A service, for asyncio. The methods are those of ``Client``."""

    def __init__(self, url: str | None = None, token: str | None = None) -> None:
        super().__init__(url, token)
        self._client = httpx.AsyncClient(**self._http())

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self._client.aclose()

    async def _run(self, exchange: Exchange[T]) -> T:
        try:
            step = next(exchange)
            while True:
                try:
                    answer = await self._perform(step)
                except TraplineError as e:
                    step = exchange.throw(e)
                else:
                    step = exchange.send(answer)
        except StopIteration as done:
            result: T = done.value
            return result

    async def _perform(self, step: Request | Pause) -> dict[str, Any]:
        if isinstance(step, Pause):
            await asyncio.sleep(step.seconds)
            return {}
        body = None if step.body is None else step.body.model_dump(mode="json")
        try:
            response = await self._client.request(step.method, step.path, params=dict(step.params), json=body)
        except httpx.TransportError as e:
            raise self._unreachable(e) from e
        return self._parse(response)

    async def hosts(self) -> list[Host]:
        return await self._run(_all(Host, "/hosts"))

    async def host(self, host: str) -> Host:
        return await self._run(_one(Host, Request("GET", f"/hosts/{_segment(host)}")))

    async def processes(self, host: str, filter: str = "") -> list[Process]:
        return await self._run(_processes(host, filter))

    async def modules(self, host: str, pid: int = 0) -> list[Module]:
        return await self._run(_all(Module, f"/hosts/{_segment(host)}/modules", {"pid": pid}))

    async def symbols(self, query: str, *, module: str = "", host: str = "", limit: int = 50) -> list[SymbolPage]:
        return await self._run(_symbols(query, module, host, limit))

    async def symbolize(self, host: str, frames: Sequence[StackFrame]) -> list[list[str]]:
        return await self._run(_symbolize(host, frames))

    async def resolve(self, probe: str) -> Resolution:
        return await self._run(_create("/probes:resolve", ProbeCreate(probe=probe), Resolution))

    async def create_probe(
        self,
        probe: str,
        *,
        name: str = "",
        ttl_s: int | None = 3600,
        labels: Mapping[str, str] | None = None,
        max_hits: int | None = None,
        overhead: float | Literal["off"] | None = None,
        allow_offline: bool = False,
    ) -> Probe:
        limits = ProbeLimits(max_hits=max_hits, overhead=overhead)
        return await self._run(
            _create("/probes", _body(probe, name, ttl_s, labels or {}, limits, allow_offline), Probe)
        )

    async def probes(self) -> list[Probe]:
        return await self._run(_all(Probe, "/probes"))

    async def probe(self, probe: str) -> Probe:
        return await self._run(_one(Probe, Request("GET", f"/probes/{_segment(probe)}")))

    async def wait(self, probe: str, *, timeout: float = 30.0) -> Probe:
        return await self._run(_wait_for(probe, _settled, timeout))

    async def wait_for(self, probe: str, true: Callable[[Probe], bool], *, timeout: float = 30.0) -> Probe:
        return await self._run(_wait_for(probe, true, timeout))

    async def wait_host(self, host: str = "", *, timeout: float = 30.0) -> Host:
        return await self._run(_wait_host(host, timeout))

    async def delete_probe(self, probe: str, *, wait: bool = True, timeout: float = 30.0) -> Probe:
        return await self._run(_delete(probe, wait, timeout))

    async def targets(self, probe: str) -> list[Target]:
        return await self._run(_all(Target, f"/probes/{_segment(probe)}/targets"))

    async def coverage(self, probe: str) -> list[CoverageLog]:
        """See ``Client.coverage``."""
        return await self._run(_all(CoverageLog, f"/probes/{_segment(probe)}/coverage"))

    async def hits(self, probe: str = "", *, host: str = "", limit: int = 100) -> list[Hit]:
        return await self._run(_latest_hits(probe, host, limit))

    async def aggregate(
        self,
        probe: str,
        *,
        top: int = 100,
        since: datetime | None = None,
        until: datetime | None = None,
        step: int | None = None,
    ) -> AggregateTable:
        """See ``Client.aggregate``."""
        return await self._run(_aggregate(probe, top, since, until, step))

    async def batches(
        self, probes: Sequence[str] | None = None, hosts: Sequence[str] | None = None
    ) -> AsyncIterator[HitBatch | Gap]:
        try:
            async with websockets.asyncio.client.connect(**self._websocket()) as socket:
                await socket.send(self._subscription(probes, hosts))
                while True:
                    for item in self._items(await socket.recv()):
                        yield item
        except (OSError, TimeoutError, InvalidHandshake, ConnectionClosed) as e:
            raise self._unreachable(e) from e

    async def stream(
        self, probes: Sequence[str] | None = None, hosts: Sequence[str] | None = None
    ) -> AsyncIterator[Hit | Gap]:
        async for item in self.batches(probes, hosts):
            if isinstance(item, Gap):
                yield item
            else:
                for hit in item.hits():
                    yield hit
