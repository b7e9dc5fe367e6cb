"""A probe's life: asked for, tried on the hosts, kept, handed to the agents, watched, and taken out again.

What people asked for is in the store; what is so is what the agents report. The service sends each agent the probes it
should have, whole when it links and as changes after, and never asks whether a command has arrived.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from pydantic import ValidationError

from trapline.errors import (
    Conflict,
    NotFound,
    PermissionDenied,
    ProtocolError,
    SpecError,
    TraplineError,
    Unavailable,
    Unsupported,
)
from trapline.ids import new_id
from trapline.model import (
    CoverageLog,
    DesiredProbe,
    HostResolution,
    Phase,
    PointKind,
    Probe,
    ProbeCreate,
    ProbeSpec,
    Resolution,
    Target,
    TargetState,
)
from trapline.protocol.messages import Desired, Observed
from trapline.spec import parse_probe, require_supported
from trapline_service.coalesce import Coalescer
from trapline_service.fleet import Fleet
from trapline_service.hub import Hub
from trapline_service.ledger import Ledger
from trapline_service.peer import peer_error
from trapline_service.status import status_of
from trapline_service.store.base import ProbeRecord, Store

log = logging.getLogger(__name__)

_PUBLISH_S = 0.2
_SAVE_S = 1.0
_SUGGESTIONS = 5
_NAME = re.compile(r"(?!prb_)[^\s/\x00-\x1f\x7f]([^/\x00-\x1f\x7f]*[^\s/\x00-\x1f\x7f])?\Z")
_NOT_IN_NAME = re.compile(r"[/\x00-\x1f\x7f]|^prb_")
_NO_HINT = "GET /api/v1/probes lists them"


class ProbeRefused(Exception):
    """Every host that was asked said no.

    Attributes:
        error: what the first of them said.
    """

    def __init__(self, error: TraplineError) -> None:
        super().__init__(str(error))
        self.error = error


@dataclass
class _Entry:
    record: ProbeRecord
    observed: dict[str, Observed] = field(default_factory=dict)
    awaiting: set[str] = field(default_factory=set)
    """Online hosts that have yet to confirm that it is out."""

    @property
    def probe(self) -> Probe:
        return self.record.probe

    @property
    def settled(self) -> Phase | None:
        if self.record.deleting:
            return Phase.DELETING
        if self.record.ended_at is not None:
            return Phase.COMPLETED if self.probe.status.phase == Phase.COMPLETED else Phase.EXPIRED
        return None

    @property
    def host_pattern(self) -> str:
        return self.probe.spec.where.get("host", "*")


def read_spec(body: ProbeCreate) -> ProbeSpec:
    """Returns the spec of a probe text. Raises SpecError or Unsupported, with the place in the request's body."""
    try:
        spec = parse_probe(body.probe)
        require_supported(spec)
    except (SpecError, Unsupported) as e:
        e.pointer = e.pointer or "/probe"
        raise
    return spec


class Probes:
    """All probes. Belongs to one event loop."""

    def __init__(self, store: Store, fleet: Fleet, hub: Hub, ledger: Ledger, *, retention_s: float) -> None:
        """``retention_s``: seconds for which a probe that ended is still listed."""
        self._store = store
        self._fleet = fleet
        self._hub = hub
        self._ledger = ledger
        self._retention = timedelta(seconds=retention_s)
        self._entries: dict[str, _Entry] = {}
        self._reserved: set[str] = set()
        self._publish = Coalescer(_PUBLISH_S, self._publish_now)
        self._unsaved: set[str] = set()
        self._gone: set[str] = set()
        self._save_wanted = asyncio.Event()
        self._deadlines_changed = asyncio.Event()
        self.forgotten: Callable[[str], None] = lambda probe: None
        """Told of a probe that is gone for good."""

    async def load(self) -> None:
        """Brings back the probes that were kept."""
        for record in await self._store.probes():
            entry = _Entry(record)
            self._entries[record.probe.id] = entry
            self._ledger.open(record.probe.id, record.tallies)
            if record.deleting:
                # Its agents learn from the whole set that it is not wanted, as soon as they link.
                self._drop(entry)
            else:
                self._refresh(entry)

    # --- what people ask ---

    def all(self) -> list[Probe]:
        return [self._refresh(entry) for _, entry in sorted(self._entries.items())]

    def get(self, probe: str) -> Probe:
        """Returns a probe by id or name. Raises NotFound."""
        return self._refresh(self._entry(probe))

    def name_of(self, probe: str) -> str:
        """Returns a probe's name for its id, or the id where it is not known."""
        entry = self._entries.get(probe)
        return entry.probe.name if entry else probe

    def targets(self, probe: str) -> list[Target]:
        """Returns a probe's targets on all hosts, as last reported. Raises NotFound."""
        entry = self._entry(probe)
        return [target for _, report in sorted(entry.observed.items()) for target in report.targets]

    async def coverage(self, probe: str) -> list[CoverageLog]:
        """Asks the hosts that reported on a probe for its coverage log. Raises NotFound."""
        entry = self._entry(probe)
        hosts = sorted(entry.observed)
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._coverage_on(host, entry.probe.id)) for host in hosts]
        return [task.result() for task in tasks]

    async def _coverage_on(self, host: str, probe: str) -> CoverageLog:
        try:
            return CoverageLog.model_validate(
                await self._fleet.ask(host, "coverage", {"probe": probe}) | {"host": host}
            )
        except TraplineError as e:
            return CoverageLog(host=host, error=e.to_wire())
        except ValidationError:
            error = ProtocolError(
                "the host gave an answer that cannot be read", hint="is its agent of the same release?"
            )
            return CoverageLog(host=host, error=error.to_wire())

    def _entry(self, probe: str) -> _Entry:
        if probe in self._entries:
            return self._entries[probe]
        named = [e for e in self._entries.values() if e.probe.name == probe]
        if not named:
            known = sorted(e.probe.name for e in self._entries.values())
            raise NotFound(f"no probe `{probe}`", hint=_NO_HINT, suggestions=known[:3])
        # A name may be used again when its probe has ended; the live one is meant, or else the latest.
        return max(named, key=lambda e: (e.settled is None, e.probe.id))

    async def resolve(self, body: ProbeCreate) -> Resolution:
        """Says what a probe would mean on each online host that it is for, and arms nothing.

        Raises:
            SpecError: the text is wrong.
            Unsupported: this release cannot do it.
            Unavailable: no such host is online.
        """
        spec = read_spec(body)
        hosts = self._fleet.online(spec.where.get("host", "*"))
        if not hosts:
            raise _no_host(spec)
        return Resolution(spec=spec, hosts=await self._resolve_on(hosts, spec))

    async def _resolve_on(self, hosts: list[str], spec: ProbeSpec) -> list[HostResolution]:
        params = {"spec": spec.model_dump(mode="json")}

        async def ask(host: str) -> HostResolution:
            try:
                answer = HostResolution.model_validate({"host": host} | await self._fleet.ask(host, "resolve", params))
            except TraplineError as e:
                return HostResolution(host=host, error=e.to_wire())
            except ValidationError:
                return HostResolution(
                    host=host,
                    error=TraplineError(
                        f"host {self._fleet.name_of(host)} gave an answer that cannot be read",
                        hint="are its agent and this service of the same release?",
                    ).to_wire(),
                )
            answer.host = host
            for target in answer.targets:
                target.host = host
            return answer

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(ask(host)) for host in hosts]
        return [task.result() for task in tasks]

    async def create(self, body: ProbeCreate, *, by: str) -> Probe:
        """Keeps a probe and hands it to the agents, after all online hosts it is for were asked what it means there.

        Raises:
            SpecError: the text or the name is wrong.
            Unsupported: this release cannot do it.
            Conflict: a live probe has this name.
            Unavailable: no host that it is for is online, and the body does not allow that.
            ProbeRefused: no host can do it; nothing was kept.
        """
        spec = read_spec(body)
        with self._name(body.name or spec.name, spec) as name:
            hosts = self._fleet.online(spec.where.get("host", "*"))
            if hosts:
                _refuse_hopeless(await self._resolve_on(hosts, spec))
            elif not body.allow_offline:
                raise _no_host(spec)
            now = datetime.now(UTC)
            probe = Probe(
                id=new_id("prb"),
                name=name,
                created_at=now,
                created_by=by,
                expires_at=None if body.ttl_s is None else now + timedelta(seconds=body.ttl_s),
                labels=body.labels,
                spec=spec,
                limits=body.limits,
            )
            entry = _Entry(ProbeRecord(probe=probe))
            await self._store.put_probes([entry.record])
            self._entries[probe.id] = entry
        self._ledger.open(probe.id)
        for host in self._fleet.online(entry.host_pattern):
            self._fleet.send(host, Desired(upsert=[_desired(probe)]))
        self._deadlines_changed.set()
        self._publish.add(probe.id)
        return self._refresh(entry)

    @contextmanager
    def _name(self, wanted: str, spec: ProbeSpec) -> Iterator[str]:
        """Keeps a name free for a probe while it is being made: the wanted one, or one after its symbol."""
        live = self._reserved | {e.probe.name for e in self._entries.values() if e.settled in (None, Phase.DELETING)}
        name = wanted
        if wanted and not _NAME.match(wanted):
            raise SpecError(
                f"`{wanted}` cannot be a probe's name",
                hint="it is part of a URL: no slash, no control character, no space at an end, no `prb_` to begin with",
                pointer="/name",
            )
        if not name:
            point = spec.point
            base = f"0x{point.offset:x}" if point.kind is PointKind.OFFSET else point.value or spec.object
            base = _NOT_IN_NAME.sub("_", base.strip()) or "probe"
            name, n = base, 1
            while name in live:
                n += 1
                name = f"{base}-{n}"
        elif name in live:
            raise Conflict(
                f"a probe is named `{name}` already", hint="choose another name, or delete that one", pointer="/name"
            )
        self._reserved.add(name)
        try:
            yield name
        finally:
            self._reserved.discard(name)

    async def delete(self, probe: str) -> Probe:
        """Takes a probe out; it is gone when every online agent has confirmed. Raises NotFound."""
        entry = self._entry(probe)
        if entry.record.deleting:
            return self._refresh(entry)
        entry.record.deleting = True
        try:
            await self._store.put_probes([entry.record])
        except TraplineError:
            entry.record.deleting = False
            raise
        entry.awaiting = set(self._fleet.online(entry.host_pattern))
        self._send_removal(entry)
        result = self._refresh(entry).model_copy(deep=True)
        self._publish.add(entry.probe.id)
        self._drop_if_out(entry)
        return result

    def _send_removal(self, entry: _Entry) -> None:
        for host in self._fleet.online(entry.host_pattern):
            self._fleet.send(host, Desired(remove=[entry.probe.id]))

    def _drop_if_out(self, entry: _Entry) -> None:
        entry.awaiting = {host for host in entry.awaiting if self._fleet.is_online(host)}
        if entry.record.deleting and not entry.awaiting:
            self._drop(entry)

    def _drop(self, entry: _Entry) -> None:
        id = entry.probe.id
        self._entries.pop(id, None)
        self._ledger.forget(id)
        self._unsaved.discard(id)
        self._gone.add(id)
        self._save_wanted.set()
        self._hub.changed("probes", id, f'"probe":null,"host":null,"aggregate":null,"removed":"{id}"')
        self.forgotten(id)

    # --- what agents say ---

    def desired_of(self, host: str) -> Desired:
        """Returns the whole set of probes that a host should have.

        Those that wait for this host to confirm that they are out are named once more: an agent that was started anew
        knows nothing of them, but its tracer may.
        """
        wanted = [e.probe for e in self._entries.values() if e.settled is None]
        return Desired(
            full=True,
            upsert=[_desired(p) for p in wanted if self._fleet.matches(host, p.spec.where.get("host", "*"))],
            remove=[e.probe.id for e in self._entries.values() if host in e.awaiting],
        )

    def observe(self, host: str, report: Observed) -> None:
        """Takes a host's report of one probe."""
        entry = self._entries.get(report.probe)
        if entry is None:
            if not report.removed:
                self._fleet.send(host, Desired(remove=[report.probe]))
            return
        for target in report.targets:
            target.host = host
        self._ledger.report(host, report)
        if report.removed:
            # Its targets are history; what it counted is in the ledger.
            entry.observed.pop(host, None)
            entry.awaiting.discard(host)
        else:
            entry.observed[host] = report
        if report.removed and entry.record.deleting:
            self._drop_if_out(entry)
            if entry.probe.id not in self._entries:
                return
        elif report.completed and entry.settled is None:
            self._complete_if_done(entry)
        self._changed(entry.probe.id)

    def booked(self, probe: str) -> None:
        """Hits or losses of a probe were booked: its counters have changed."""
        entry = self._entries.get(probe)
        if entry is None:
            return
        limit = entry.probe.limits.max_hits
        if limit is not None and entry.settled is None and self._ledger.totals(probe)[0].hits >= limit:
            self._complete_if_done(entry)
        self._changed(probe)

    def _changed(self, probe: str) -> None:
        self._publish.add(probe)
        self._unsaved.add(probe)
        self._save_wanted.set()

    def presence_changed(self, host: str) -> None:
        """A host came or went."""
        came = self._fleet.is_online(host)
        for entry in list(self._entries.values()):
            if came:
                # Of a former link, maybe of a former agent: nothing is armed there until this one has said so.
                entry.observed.pop(host, None)
            if self._fleet.matches(host, entry.host_pattern):
                self._drop_if_out(entry)
                self._publish.add(entry.probe.id)

    def _complete_if_done(self, entry: _Entry) -> None:
        """Ends a probe that reached its limit: all its hosts say so, or together they have hits enough."""
        hits = self._ledger.totals(entry.probe.id)[0].hits
        enough = entry.probe.limits.max_hits is not None and hits >= entry.probe.limits.max_hits
        online = self._fleet.online(entry.host_pattern)
        if enough or all(h in entry.observed and entry.observed[h].completed for h in online):
            self._end(entry, Phase.COMPLETED)

    def _end(self, entry: _Entry, phase: Phase) -> None:
        entry.probe.status.phase = phase
        entry.record.ended_at = datetime.now(UTC)
        log.info("probe %s (%s): %s", entry.probe.name, entry.probe.id, phase.value)
        self._send_removal(entry)
        self._changed(entry.probe.id)
        self._deadlines_changed.set()

    # --- status ---

    def _refresh(self, entry: _Entry) -> Probe:
        probe = entry.probe
        online = self._fleet.online(entry.host_pattern)
        counters, reasons = self._ledger.totals(probe.id)
        probe.status = status_of(
            generation=probe.generation,
            settled=entry.settled,
            hosts={*entry.observed, *self._ledger.tallies(probe.id), *online},
            online=online,
            observed=entry.observed,
            counters=counters,
            dropped_by_reason=reasons,
            unreturned_by_reason=self._ledger.unreturned(probe.id),
            former=probe.status,
            at=datetime.now(UTC),
        )
        return probe

    def _publish_now(self, probes: set[str]) -> None:
        for id in sorted(probes):
            if id in self._entries:
                self._hub.changed("probes", id, status_fields(self._refresh(self._entries[id])))

    # --- time ---

    async def keep_deadlines(self) -> None:
        """Ends probes that expire, and forgets those that ended long ago; runs until it is cancelled."""
        while True:
            self._deadlines_changed.clear()
            now = datetime.now(UTC)
            soonest: datetime | None = None
            for entry in list(self._entries.values()):
                deadline = self._deadline(entry)
                if deadline is not None and deadline <= now:
                    if entry.settled is None:
                        self._end(entry, Phase.EXPIRED)
                    else:
                        self._drop(entry)
                    deadline = self._deadline(entry) if entry.probe.id in self._entries else None
                if deadline is not None:
                    soonest = deadline if soonest is None else min(soonest, deadline)
            # At most an hour, since the wall clock may be set meanwhile.
            pause = 3600.0 if soonest is None else min(3600.0, max(0.0, (soonest - datetime.now(UTC)).total_seconds()))
            try:
                async with asyncio.timeout(pause):
                    await self._deadlines_changed.wait()
            except TimeoutError:
                pass  # the deadline is there

    def _deadline(self, entry: _Entry) -> datetime | None:
        if entry.record.deleting:
            return None
        if entry.record.ended_at is not None:
            return entry.record.ended_at + self._retention
        return entry.probe.expires_at

    async def keep_saved(self) -> None:
        """Writes changes to the store, at most once a second; runs until it is cancelled."""
        while True:
            await self._save_wanted.wait()
            await asyncio.sleep(_SAVE_S)
            self._save_wanted.clear()
            try:
                await self.save()
            except TraplineError as e:
                log.error("probes were not saved: %s", e)
                self._save_wanted.set()

    async def save(self) -> None:
        """Writes changes to the store. Raises Unavailable; what was not written is tried again the next time."""
        unsaved, self._unsaved = self._unsaved, set()
        gone, self._gone = self._gone, set()
        try:
            records = []
            for id in unsaved:
                if id in self._entries:
                    record = self._entries[id].record
                    record.tallies = dict(self._ledger.tallies(id))
                    records.append(record)
            await self._store.put_probes(records)
            for id in gone:
                await self._store.delete_probe(id)
        except TraplineError:
            self._unsaved |= unsaved
            self._gone |= gone
            raise


def status_fields(probe: Probe) -> str:
    """Returns a probe as the members of a ``Status`` message after its ``id``."""
    return f'"probe":{probe.model_dump_json()},"host":null,"aggregate":null,"removed":null'


def _desired(probe: Probe) -> DesiredProbe:
    return DesiredProbe(id=probe.id, generation=probe.generation, spec=probe.spec, limits=probe.limits)


def _no_host(spec: ProbeSpec) -> Unavailable:
    wanted = spec.where.get("host")
    which = f"no host that matches `{wanted}`" if wanted else "no host"
    return Unavailable(
        f"{which} is online",
        hint="start an agent (`trapline agent --server URL`), or allow_offline to have it armed when one comes",
        reason="NoHostOnline",
    )


def _refuse_hopeless(answers: list[HostResolution]) -> None:
    """Raises ProbeRefused, or Unavailable, where no host can do what is asked."""
    errors = [error for answer in answers if (error := _hopeless(answer)) is not None]
    if len(errors) < len(answers):
        return
    # A host that knows why says more than one that is away.
    first = next((e for e in errors if not isinstance(e, Unavailable)), errors[0])
    suggestions = dict.fromkeys(s for e in errors if type(e) is type(first) for s in e.suggestions)
    first.suggestions = list(suggestions)[:_SUGGESTIONS]
    if isinstance(first, Unavailable):
        raise first
    raise ProbeRefused(first)


def _hopeless(answer: HostResolution) -> TraplineError | None:
    """Returns why nothing can come of a probe on a host; None where something may."""
    if answer.error is not None:
        return peer_error(answer.error)
    if not answer.sites:
        return NotFound("nothing on this host is meant by it")
    refused = [site.refused for site in answer.sites if site.refused is not None]
    if len(refused) == len(answer.sites):
        return peer_error(refused[0])
    if answer.targets and all(t.state == TargetState.REFUSED for t in answer.targets):
        target = answer.targets[0]
        kind = PermissionDenied if target.reason == "PermissionDenied" else Unsupported
        return kind(
            target.message or f"process {target.pid} ({target.comm}) cannot be probed: {target.reason}",
            reason=target.reason,
        )
    return None
