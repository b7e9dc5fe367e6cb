"""The uprobe table: probes keyed by (device, inode, offset), with consumers.

Invariants

1. A uprobe is in the table while it has consumers: the first consumer's registration makes it wanted in every process that
   maps the file and matches, the last one's end makes it wanted nowhere (semantics R1).
2. The table is published before any process is looked at (R2): whoever asks ``wanted`` after ``publish`` returned, be it the
   scan, a fork, an exec or the loader's hook, gets an answer with the new consumer in it. All of them ask the same question
   and the engine's answer is idempotent, so that it does not matter which comes first or whether two do (R3).
3. Snapshots are replaced, never changed: ``wanted`` runs on the engine's threads without a lock, and sees one state whole.
4. A process of Trapline's own is never wanted in (P11).
5. A file without uprobes costs one look into a dictionary (R8).

Only the control thread publishes and withdraws; the engine's threads ask and report.
"""

from __future__ import annotations

import contextlib
import copy
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from trapline.errors import Conflict
from trapline.ids import new_id
from trapline_agent.engines.base import ProcessId, Sink, SiteReport, SiteRequest, Wanted
from trapline_agent.engines.ring import HitRing
from trapline_agent.kernel import procfs
from trapline_agent.plans import FileKey, SitePlan
from trapline_agent.targets import maps, process
from trapline_agent.targets.maps import Mapping as FileMapping
from trapline_agent.targets.selector import Selector
from trapline_agent.tracer.messages import CoverageEntry, Register, TargetState

_HOOKS = {"scan": "scan", "fork": "fork-exec", "exec": "fork-exec", "mmap": "loader", "reconcile": "reconcile"}
"""Which hook a cause means that names none. A cause is ``mmap``, or ``mmap:HOOK``."""
_MISSED = {
    "perf-mmap": "the kernel told of the mapping after it was made",
    "proc-connector": "the kernel told of the new image after it was made",
    "fanotify-late": "the mapper was let go on at the deadline, before the tracer had it",
    "unsettled": "a thread of the process stayed inside fork, clone or execve",
    "reconcile": "a look through /proc found the mapping, some time after it was made",
}
"""Hooks that come after the fact: calls may have run before the process was armed, and why."""
_LATE_HOOKS = {"fanotify-late": "fanotify", "unsettled": "fanotify"}
_MAX_LOG = 1000
"""Entries of the coverage log that a probe keeps."""
_MAX_GONE = 1000
"""Targets of ended processes that a probe remembers."""


@dataclass(eq=False)
class Consumer:
    """One probe's interest in its uprobes."""

    register: Register
    ring: HitRing
    selector: Selector
    plans: dict[tuple[FileKey, int], SitePlan] = field(default_factory=dict)
    held: dict[FileKey, int] = field(default_factory=dict)
    """O_PATH descriptors that keep the inodes from being used again (R9)."""
    sinks: dict[int, Sink] = field(default_factory=dict)
    targets: dict[tuple[int, int, int, int], TargetState] = field(default_factory=dict)
    changed: set[tuple[int, int, int, int]] = field(default_factory=set)
    log: deque[CoverageEntry] = field(default_factory=lambda: deque(maxlen=_MAX_LOG))
    logged: int = 0
    """Entries so far, those that were forgotten included."""
    unsent: dict[int, CoverageEntry] = field(default_factory=dict)
    open_entries: dict[tuple[int, int, int, int], CoverageEntry] = field(default_factory=dict)
    """Of targets that are armed now."""
    source: str = field(default_factory=lambda: new_id("trc"))
    """What its hits are numbered in: a probe that is registered again begins at 0 again, in another source."""

    @property
    def probe(self) -> str:
        return self.register.probe

    @property
    def follows(self) -> bool:
        """Whether it names processes, which are then followed though they do not map its files yet."""
        return "pid" in self.register.where or "tree" in self.register.where

    def add(self, plans: Iterable[SitePlan]) -> None:
        for plan in plans:
            self.plans[plan.file, plan.offset] = plan
            if plan.site not in self.sinks:
                self.sinks[plan.site] = self.ring.sink(plan.site)
            if plan.file not in self.held:
                with contextlib.suppress(OSError):
                    self.held[plan.file] = os.open(plan.path, os.O_PATH | os.O_CLOEXEC)

    def begin(self, key: tuple[int, int, int, int], target: TargetState) -> None:
        """Enters into the coverage log that a target is armed; or (``state`` gone) that it was not when it was due."""
        entry = CoverageEntry(
            number=self.logged,
            pid=target.pid,
            start_time=target.start_time,
            comm=target.comm,
            site=target.site,
            path=target.path,
            addr=target.addr,
            cause=target.cause,
            hook=target.hook,
            begun_ns=target.since_ns,
            may_have_missed=target.may_have_missed,
            message=target.message,
        )
        self.logged += 1
        self.log.append(entry)
        self.unsent[entry.number] = entry
        if target.state == "armed":
            self.open_entries[key] = entry
        else:
            entry.ended_ns = target.since_ns
        while len(self.unsent) > _MAX_LOG:
            del self.unsent[next(iter(self.unsent))]

    def end(self, key: tuple[int, int, int, int], at_ns: int) -> None:
        """Enters that a target is armed no more."""
        entry = self.open_entries.pop(key, None)
        if entry is not None:
            entry.ended_ns = at_ns
            self.unsent[entry.number] = entry

    def close(self) -> None:
        for fd in self.held.values():
            os.close(fd)
        self.held.clear()


class _Parents(dict[int, int]):
    """Parents of processes, looked up in /proc when asked for."""

    def get(self, pid: int, default: int | None = None) -> int:  # type: ignore[override] # 0, never None, for the unknown
        try:
            return int(procfs.stat_fields(pid)[1])
        except (OSError, ValueError):
            return default or 0


@dataclass(frozen=True)
class _Snapshot:
    consumers: tuple[Consumer, ...] = ()
    by_file: Mapping[FileKey, tuple[tuple[SitePlan, Consumer], ...]] = field(default_factory=dict)
    loaders: Mapping[FileKey, SitePlan] = field(default_factory=dict)


class Table:
    """The ``Observer`` of the engine. See the module for who may call what."""

    def __init__(self, on_change: Callable[[], None] = lambda: None) -> None:
        """``on_change`` is called by any thread when targets changed; it must not block."""
        self._now = _Snapshot()
        self._consumers: dict[str, Consumer] = {}
        self._loaders: dict[FileKey, SitePlan] = {}
        self._ancestors: dict[ProcessId, tuple[int, ...]] = {}
        """Of processes that were seen to be forked: /proc forgets them when a process between has ended."""
        self._lock = threading.Lock()
        self._on_change = on_change
        self.self_pids: frozenset[int] = frozenset()
        self.unheld: Mapping[FileKey, str] = {}
        """Files whose mappers cannot be held, and why."""
        self.on_exit: Callable[[ProcessId, int | None], None] = lambda identity, status: None

    # --- control thread ----------------------------------------------------------------------------------------------

    @property
    def consumers(self) -> tuple[Consumer, ...]:
        return self._now.consumers

    def consumer(self, probe: str) -> Consumer | None:
        return self._consumers.get(probe)

    def files(self) -> Mapping[FileKey, object]:
        """Files that have uprobes on them."""
        return self._now.by_file

    def publish(self, register: Register, ring: Callable[[], HitRing]) -> Consumer:
        """Adds a consumer, or sites to one that is there. From its return on ``wanted`` includes it.

        Raises:
            Conflict: it is there with other captures, another selector or another limit; nothing was changed.
        """
        consumer = self._consumers.get(register.probe)
        if consumer is not None and not _same_terms(consumer.register, register):
            raise Conflict(
                f"probe {register.probe} is registered with other captures, another selector or another limit",
                hint="take it out first",
            )
        if consumer is None:
            consumer = Consumer(register, ring(), Selector(register.where))
            self._consumers[register.probe] = consumer
        with self._lock:
            # This agent may be another one than the one that was told of them.
            consumer.changed |= consumer.targets.keys()
            consumer.unsent = {entry.number: entry for entry in consumer.log}
        consumer.register = register
        consumer.add(register.plans)
        self._renew()
        return consumer

    def withdraw(self, probe: str) -> Consumer | None:
        """Takes a consumer away; its sites are wanted no more. Its ``close`` is due when they are out."""
        consumer = self._consumers.pop(probe, None)
        self._renew()
        return consumer

    def descriptors(self) -> dict[FileKey, int]:
        """Returns an O_PATH descriptor of each probed file that could be opened. They belong to the consumers."""
        return {file: fd for consumer in self._now.consumers for file, fd in consumer.held.items()}

    def loaders(self) -> Mapping[FileKey, SitePlan]:
        return self._now.loaders

    def set_loaders(self, plans: Sequence[SitePlan]) -> None:
        """Sets where dynamic loaders tell that they mapped something (``_dl_debug_state``)."""
        for plan in plans:
            self._loaders[plan.file] = plan
        self._renew()

    def _renew(self) -> None:
        by_file: dict[FileKey, list[tuple[SitePlan, Consumer]]] = {}
        for consumer in self._consumers.values():
            for plan in consumer.plans.values():
                by_file.setdefault(plan.file, []).append((plan, consumer))
        self._now = _Snapshot(
            tuple(self._consumers.values()), {f: tuple(s) for f, s in by_file.items()}, dict(self._loaders)
        )

    def candidates(self) -> list[ProcessId]:
        """Looks at every process of the host, and returns those in which something may be wanted."""
        now = self._now
        needles = [maps.needle(f) for f in now.by_file]
        named = {int(c.register.where[k]) for c in now.consumers for k in ("pid", "tree") if k in c.register.where}
        if not needles and not named:
            return []
        found: list[ProcessId] = []
        for pid in process.pids():
            if pid in self.self_pids:
                continue
            try:
                if pid not in named:
                    text = maps.read_maps(pid)
                    if not any(n in text for n in needles):
                        continue
                found.append(ProcessId(pid, procfs.start_time(pid)))
            except OSError:
                continue  # ended meanwhile, or another user's
        return found

    def mark_ended(self) -> None:
        """Marks targets in processes that are no more as gone. The engine tells of those that it follows; of a process that
        refused, nobody does."""
        with self._lock:
            living = {k[:2] for c in self._consumers.values() for k, t in c.targets.items() if t.state != "gone"}
        for identity in living:
            try:
                if procfs.start_time(identity[0]) == identity[1]:
                    continue
            except ProcessLookupError:
                pass
            except OSError:
                continue  # not ours to know
            self._gone(identity)

    def take_changes(self) -> list[tuple[str, list[TargetState]]]:
        """Returns the targets that changed since the last call, by probe."""
        with self._lock:
            result = []
            for consumer in self._consumers.values():
                if consumer.changed:
                    result.append((consumer.probe, [consumer.targets[k] for k in consumer.changed]))
                    consumer.changed = set()
                    _forget_oldest(consumer.targets)
            return result

    def take_log(self) -> list[tuple[str, list[CoverageEntry]]]:
        """Returns the entries of the coverage logs that are new or have ended since the last call, by probe."""
        with self._lock:
            result = []
            for consumer in self._consumers.values():
                if consumer.unsent:
                    result.append((consumer.probe, [copy.copy(e) for e in consumer.unsent.values()]))
                    consumer.unsent = {}
            return result

    # --- Observer: the engine's threads ------------------------------------------------------------------------------

    def wanted(self, identity: ProcessId, cause: str, parent: ProcessId | None = None) -> Wanted:
        now = self._now
        if parent is not None:
            self._ancestors[identity] = (parent.pid, *self._ancestors_of(parent))
        if identity.pid in self.self_pids:
            return Wanted()
        facts = process.facts(identity.pid)
        if facts is None or facts.start_time != identity.start_time:
            raise ProcessLookupError(f"process {identity.pid} is gone")
        parents = self._parents(identity)
        matching = {c for c in now.consumers if c.selector.matches(facts, parents)}
        mappings = maps.executable_mappings(identity.pid)

        def still_mapped(addr: int, plan: SitePlan) -> bool:
            return any(m.file == plan.file and m.addr(plan.offset) == addr for m in mappings)

        sites: dict[int, SiteRequest] = {}
        for mapping in mappings if matching else ():
            for plan, consumer in now.by_file.get(mapping.file, ()):
                addr = mapping.addr(plan.offset)
                if addr is None or consumer not in matching:
                    continue
                sink = consumer.sinks[plan.site]
                known = sites.get(addr)
                sites[addr] = (
                    _request(addr, plan, mapping, mappings, (sink,))
                    if known is None
                    else SiteRequest(
                        addr, known.plan, (*known.sinks, sink), slack_addr=known.slack_addr, refusal=known.refusal
                    )
                )
        keep = any(c.follows for c in matching)
        if sites or keep:
            for mapping in mappings:
                loader = now.loaders.get(mapping.file)
                if loader is None or (addr := mapping.addr(loader.offset)) is None:
                    continue
                hook = _request(addr, loader, mapping, mappings, ())
                if addr not in sites:
                    sites[addr] = SiteRequest(addr, loader, (), True, hook.slack_addr, hook.refusal)
        return Wanted(list(sites.values()), keep, still_mapped)

    def is_meant(self, pid: int, file: FileKey) -> bool:
        """Says whether something is wanted in a process once it has mapped a file. Any thread."""
        consumers = {consumer for _, consumer in self._now.by_file.get(file, ())}
        if not consumers or pid in self.self_pids:
            return False
        facts = process.facts(pid)
        if facts is None:
            return False
        parents = self._parents(ProcessId(pid, facts.start_time))
        return any(c.selector.matches(facts, parents) for c in consumers)

    def _ancestors_of(self, identity: ProcessId) -> tuple[int, ...]:
        known = self._ancestors.get(identity)
        if known is not None:
            return known
        chain: list[int] = []
        parents = _Parents()
        pid = parents.get(identity.pid)
        while pid and pid not in chain:
            chain.append(pid)
            pid = parents.get(pid)
        return tuple(chain)

    def _parents(self, identity: ProcessId) -> dict[int, int]:
        chain = self._ancestors.get(identity)
        if chain is None:
            return _Parents()
        return dict(zip((identity.pid, *chain), chain, strict=False))

    def report(self, identity: ProcessId, reports: Iterable[SiteReport], cause: str) -> None:
        comm = ""
        with contextlib.suppress(OSError):
            comm = procfs.comm(identity.pid)
        since = time.time_ns()
        cause, _, hook = cause.partition(":")
        hook = hook or _HOOKS[cause]
        missed = _MISSED.get(hook, "")
        unheld = self.unheld
        facts = process.facts(identity.pid)
        parents = self._parents(identity)
        changed = False
        with self._lock:
            for report in reports:
                for plan, consumer in self._now.by_file.get(report.plan.file, ()):
                    if plan.offset != report.plan.offset:
                        continue
                    key = (identity.pid, identity.start_time, plan.site, report.addr)
                    known = consumer.targets.get(key)
                    # A site is there for all its consumers, but each has its own processes (semantics R16).
                    meant = known is not None if facts is None else consumer.selector.matches(facts, parents)
                    state = report.state if meant else "gone"
                    if state == "gone" and known is None:
                        continue
                    if known is not None and known.state == state and known.reason == report.reason:
                        continue
                    target = consumer.targets[key] = TargetState(
                        pid=identity.pid,
                        start_time=identity.start_time,
                        comm=comm or (known.comm if known else ""),
                        site=plan.site,
                        path=plan.path,
                        offset=plan.offset,
                        addr=report.addr,
                        state=state,
                        cause=cause,
                        hook=_LATE_HOOKS.get(hook, hook),
                        since_ns=since,
                        may_have_missed=bool(missed) and state == "armed",
                        reason=report.reason,
                        message=report.message
                        or (_why_missed(missed, unheld.get(plan.file)) if state == "armed" else ""),
                    )
                    consumer.changed.add(key)
                    changed = True
                    consumer.end(key, since)
                    if state == "armed":
                        consumer.begin(key, target)
        if changed:
            self._on_change()

    def missed(self, pid: int, file: FileKey, cause: str) -> None:
        now = time.time_ns()
        cause, _, hook = cause.partition(":")
        facts = process.facts(pid)
        parents = self._parents(ProcessId(pid, facts.start_time)) if facts is not None else {}
        with self._lock:
            for plan, consumer in self._now.by_file.get(file, ()):
                if facts is not None and not consumer.selector.matches(facts, parents):
                    continue
                target = TargetState(
                    pid=pid,
                    start_time=facts.start_time if facts else 0,
                    comm=facts.comm if facts else "",
                    site=plan.site,
                    path=plan.path,
                    offset=plan.offset,
                    state="gone",
                    cause=cause,
                    hook=_LATE_HOOKS.get(hook, hook),
                    since_ns=now,
                    may_have_missed=True,
                    message=_MISSED[hook],
                )
                consumer.begin((pid, target.start_time, plan.site, 0), target)
        self._on_change()

    def is_wanted(self, plan: SitePlan) -> bool:
        now = self._now
        if now.consumers and plan.file in now.loaders and now.loaders[plan.file].offset == plan.offset:
            return True
        return any(other.offset == plan.offset for other, _ in now.by_file.get(plan.file, ()))

    def sampled(self, plan: SitePlan, held_ns: int) -> None:
        for other, consumer in self._now.by_file.get(plan.file, ()):
            if other.offset == plan.offset:
                consumer.ring.overhead_ns.append(held_ns)

    def exited(self, identity: ProcessId, status: int | None) -> None:
        self._gone(identity)
        self.on_exit(identity, status)

    def _gone(self, identity: tuple[int, int]) -> None:
        now = time.time_ns()
        with self._lock:
            self._ancestors.pop(ProcessId(*identity), None)
            for consumer in self._consumers.values():
                for key, state in consumer.targets.items():
                    if key[:2] == identity and state.state != "gone":
                        state.state = "gone"
                        consumer.changed.add(key)
                        consumer.end(key, now)
        self._on_change()


def _why_missed(missed: str, unheld: str | None) -> str:
    return f"{missed}; it is not held before, since {unheld}" if missed and unheld else missed


def _same_terms(one: Register, other: Register) -> bool:
    return (one.fetches, one.where, one.max_hits) == (other.fetches, other.where, other.max_hits)


def _request(
    addr: int, plan: SitePlan, mapping: FileMapping, mappings: list[FileMapping], sinks: tuple[Sink, ...]
) -> SiteRequest:
    refusal = None
    if mapping.writable or mapping.shared:
        kind = "writable" if mapping.writable else "shared"
        refusal = (
            f"{kind.capitalize()}Mapping",
            f"{mapping.path} is mapped {mapping.prot} at {mapping.start:#x}: "
            f"a breakpoint in a {kind} mapping would be seen, or overwritten, by others",
        )
    slack_addr = 0
    if plan.slack_len:
        for other in mappings:
            if other.file != plan.file or other.writable or other.shared:
                continue
            at = other.addr(plan.slack_offset)
            if at is not None and at + plan.slack_len <= other.end:
                slack_addr = at
                break
    return SiteRequest(addr, plan, sinks, slack_addr=slack_addr, refusal=refusal)


def _forget_oldest(targets: dict[tuple[int, int, int, int], TargetState]) -> None:
    gone = [k for k, t in targets.items() if t.state == "gone"]
    for key in gone[: max(0, len(gone) - _MAX_GONE)]:
        del targets[key]
