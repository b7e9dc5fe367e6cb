"""The uprobe table: probes keyed by (device, inode, offset), with consumers.

Invariants

1. A uprobe is in the table while it has consumers: the first consumer's registration makes it wanted in every process that
   maps the file and matches, the last one's end makes it wanted nowhere (semantics R1).
2. The table is published before any process is looked at (R2): whoever asks ``wanted`` after ``publish`` returned, be it the
   scan, a fork, an exec or the loader's hook, gets an answer with the new consumer in it. All of them ask the same question
   and the engine's answer is idempotent, so that it does not matter which comes first or whether two do (R3).
3. Snapshots are replaced, never changed: ``wanted`` runs on the engine's threads without a lock, and sees one state whole.
4. A process of Trapline's own is never wanted in (P11).
5. A file without uprobes costs one look into a dictionary, and a process that maps none of a probe's files is not looked at
   on its behalf: when nothing is wanted, no process is (R8).
6. What is wanted follows from the mappings as they are, and from nothing that was counted up or down before (R12). So a
   mapping that is refused is refused again wherever it comes back, and each target says so (R15).
7. A target is what the engine said last about one site of one process to one consumer. It is never forgotten while its
   process lives and the consumer is there; what is not meant any more is ``gone``.
8. What the overhead breaker leaves out is not wanted for now (S4), and its target says so; the process stays followed.

Only the control thread publishes and withdraws, in the order of what it is told; so the table has one writer and needs no
lock for each inode (R6). Everybody else asks and reports, from any thread.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import msgspec

from trapline.errors import Conflict, TraplineError, Unsupported
from trapline.ids import new_id
from trapline_agent.engines.base import Counter, ProcessId, ReturnSink, Sink, SiteReport, SiteRequest, Wanted
from trapline_agent.engines.ring import HitRing
from trapline_agent.kernel import procfs
from trapline_agent.plans import FileKey, Program, SitePlan
from trapline_agent.targets import maps, process
from trapline_agent.targets.files import file_key_of, open_mapped, open_regular
from trapline_agent.targets.maps import Mapping as FileMapping
from trapline_agent.targets.proc import Proc, RealProc
from trapline_agent.targets.process import is_own
from trapline_agent.targets.selector import Selector
from trapline_agent.tracer.breaker import Point, State, Verdict, Verdicts
from trapline_agent.tracer.coverage import CoverageLog, Key
from trapline_agent.tracer.messages import CoverageEntry, Register, TargetState
from trapline_agent.tracer.meters import Meters
from trapline_agent.tracer.outages import Outages
from trapline_agent.tracer.places import Places
from trapline_agent.unwind.walk import Stacks

log = logging.getLogger(__name__)

_OVER_BUDGET = "OverBudget"
_BACK = "it was left out while it was over its budget"
_HELD = frozenset((State.THROTTLED.text, State.TRIPPED.text))
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
    """Descriptors that keep the inodes from being used again (R9); -1 where none can be had."""
    closed: bool = False
    _holding: threading.Lock = field(default_factory=threading.Lock)
    sinks: dict[tuple[int, Program | None], Sink] = field(default_factory=dict)
    """By site number and what is computed there."""
    return_sinks: dict[tuple[int, Program | None], ReturnSink] = field(default_factory=dict)
    """Of a return probe, in the place of ``sinks``."""
    targets: dict[Key, TargetState] = field(default_factory=dict)
    of_process: dict[tuple[int, int], set[Key]] = field(default_factory=dict)
    """Keys of ``targets``, by process, until that ends: many may end in a second, and a probe has thousands of targets."""
    changed: set[Key] = field(default_factory=set)
    outages: Outages = field(default_factory=Outages)
    coverage: CoverageLog = field(default_factory=CoverageLog)
    source: str = field(default_factory=lambda: new_id("trc"))
    """What its hits are numbered in: a probe that is registered again begins at 0 again, in another source."""

    @property
    def probe(self) -> str:
        return self.register.probe

    @property
    def follows(self) -> bool:
        """Whether it names processes, which are then followed though they do not map its files yet."""
        return "pid" in self.register.where or "tree" in self.register.where

    def add(self, plans: Iterable[SitePlan], held: Callable[[FileKey], int] = lambda file: -1) -> None:
        """Adds sites.

        Args:
            plans: of these.
            held: returns a descriptor of a file that somebody else holds, or -1.
        """
        self.plans = {**self.plans, **{(plan.file, plan.offset): plan for plan in plans}}  # replaced: others read it
        for plan in plans:
            recorder = plan.site, plan.program
            if self.register.returns:
                if recorder not in self.return_sinks:
                    self.return_sinks[recorder] = self.ring.return_sink(*recorder)
            elif recorder not in self.sinks:
                self.sinks[recorder] = self.ring.sink(*recorder)
            if plan.file not in self.held:
                # Its path may be another file's here, or nobody's: then who maps it leads there.
                fd = _copy(held(plan.file))
                self._keep(plan.file, fd if fd >= 0 else _opened(plan.file, partial(open_regular, plan.path)))

    def hold(self, pid: int, mapping: FileMapping) -> None:
        """Keeps the inode of a mapped file. Any thread."""
        fd = _opened(mapping.file, lambda: open_mapped(pid, mapping))
        self._keep(mapping.file, fd)
        with self._holding:
            self.held.setdefault(mapping.file, -1)

    def _keep(self, file: FileKey, fd: int) -> None:
        with self._holding:
            if fd >= 0 and not self.closed and file not in self.held:
                self.held[file] = fd
                return
        if fd >= 0:
            os.close(fd)

    def end(self, key: Key, target: TargetState) -> None:
        """One of its targets is gone. The caller has the table's lock."""
        target.state = "gone"
        self.outages.end(key, time.monotonic_ns())
        self.coverage.end(key, time.time_ns())
        self.changed.add(key)

    def close(self) -> None:
        with self._holding:
            self.closed = True
            held, self.held = self.held, {}
        for fd in held.values():
            if fd >= 0:
                os.close(fd)


class _Parents(dict[int, int]):
    """Parents of processes, looked up when asked for."""

    def __init__(self, proc: Proc) -> None:
        super().__init__()
        self._proc = proc

    def get(self, pid: int, default: int | None = None) -> int:  # type: ignore[override] # 0, never None, for the unknown
        try:
            return self._proc.parent(pid)
        except (OSError, ValueError):
            return default or 0


@dataclass(frozen=True)
class _Snapshot:
    consumers: tuple[Consumer, ...] = ()
    by_file: Mapping[FileKey, tuple[tuple[SitePlan, Consumer], ...]] = field(default_factory=dict)
    by_site: Mapping[tuple[FileKey, int], tuple[tuple[SitePlan, Consumer], ...]] = field(default_factory=dict)
    """The uprobes: by (file, offset), each with its consumers."""
    loaders: Mapping[FileKey, SitePlan] = field(default_factory=dict)
    unwinders: Mapping[FileKey, Mapping[int, SitePlan]] = field(default_factory=dict)

    def of(self, plan: SitePlan) -> tuple[tuple[SitePlan, Consumer], ...]:
        """Returns who wants the instruction of a plan, each with its own plan."""
        return self.by_site.get((plan.file, plan.offset), ())


class Table:
    """The ``Observer`` of the engine. See the module for who may call what."""

    def __init__(self, on_change: Callable[[], None] = lambda: None, proc: Proc | None = None) -> None:
        """
        Args:
            on_change: called by any thread when targets changed; it must not block.
            proc: the processes; by default this host's.
        """
        self._proc = RealProc() if proc is None else proc
        self._now = _Snapshot()
        self._consumers: dict[str, Consumer] = {}
        self._loaders: dict[FileKey, SitePlan] = {}
        self._unwinders: dict[FileKey, dict[int, SitePlan]] = {}
        self._ancestors: dict[ProcessId, tuple[int, ...]] = {}
        """Of processes that were seen to be forked: /proc forgets them when a process between has ended."""
        self._places = Places()
        self._lock = threading.Lock()
        self._on_change = on_change
        self.meters = Meters()
        self.stacks = Stacks()
        self.verdicts = Verdicts()
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
        fresh = consumer is None
        if consumer is None:
            consumer = Consumer(register, ring(), Selector(register.where))
            self._consumers[register.probe] = consumer
        with self._lock:
            # This agent may be another one than the one that was told of them.
            consumer.changed |= consumer.targets.keys()
            consumer.coverage.tell_again()
        consumer.register = register
        consumer.add(register.plans, self._held)
        if fresh:
            self._enter(consumer)
        else:
            self._renew()
        return consumer

    def retract(self, register: Register, before: Register, plans: Mapping[tuple[FileKey, int], SitePlan]) -> None:
        """Takes back what a second registration added (semantics R5); nothing, if another has come since.

        Args:
            register: the one that failed.
            before, plans: what ``Consumer.register`` and a copy of ``Consumer.plans`` were before it was published.
        """
        consumer = self._consumers.get(register.probe)
        if consumer is not None and consumer.register is register:
            consumer.register = before
            consumer.plans = dict(plans)
            self._renew()

    def withdraw(self, probe: str) -> Consumer | None:
        """Takes a consumer away; its sites are wanted no more. Its ``close`` is due when they are out."""
        consumer = self._consumers.pop(probe, None)
        if consumer is not None:
            self._strike_off(consumer)
        self.verdicts = self.verdicts.without(probe)
        self.meters.forget(probe)
        return consumer

    def descriptors(self) -> dict[FileKey, int]:
        """Returns an O_PATH descriptor of each probed file that could be opened. They belong to the consumers."""
        return {file: fd for file in self._now.by_file if (fd := self._held(file)) >= 0}

    def _held(self, file: FileKey) -> int:
        fds = (consumer.held.get(file, -1) for _, consumer in self._now.by_file.get(file, ()))
        return next((fd for fd in fds if fd >= 0), -1)

    def loaders(self) -> Mapping[FileKey, SitePlan]:
        return self._now.loaders

    def set_loaders(self, plans: Sequence[SitePlan]) -> None:
        """Sets where dynamic loaders tell that they mapped something (``_dl_debug_state``), and where longjmp begins."""
        for plan in plans:
            if plan.unwinds:
                self._unwinders[plan.file] = {**self._unwinders.get(plan.file, {}), plan.offset: plan}
            else:
                self._loaders[plan.file] = plan
        self._publish(self._now.by_file, self._now.by_site)

    def _enter(self, consumer: Consumer) -> None:
        """As ``_renew`` where a consumer has come: a thousand that come at once must not cost a million steps."""
        by_file, by_site = dict(self._now.by_file), dict(self._now.by_site)
        theirs: dict[FileKey, list[tuple[SitePlan, Consumer]]] = {}
        for key, plan in consumer.plans.items():
            theirs.setdefault(plan.file, []).append((plan, consumer))
            by_site[key] = (*by_site.get(key, ()), (plan, consumer))
        for file, entries in theirs.items():
            by_file[file] = (*by_file.get(file, ()), *entries)
        self._publish(by_file, by_site)

    def _strike_off(self, consumer: Consumer) -> None:
        """As ``_renew`` where a consumer has gone."""
        by_file, by_site = dict(self._now.by_file), dict(self._now.by_site)
        for key in consumer.plans:
            by_site[key] = tuple(e for e in by_site.get(key, ()) if e[1] is not consumer)
            if not by_site[key]:
                del by_site[key]
        for file in {file for file, _ in consumer.plans}:
            by_file[file] = tuple(e for e in by_file.get(file, ()) if e[1] is not consumer)
            if not by_file[file]:
                del by_file[file]
        self._publish(by_file, by_site)

    def _renew(self) -> None:
        by_file: dict[FileKey, list[tuple[SitePlan, Consumer]]] = {}
        by_site: dict[tuple[FileKey, int], list[tuple[SitePlan, Consumer]]] = {}
        for consumer in self._consumers.values():
            for key, plan in consumer.plans.items():
                by_file.setdefault(plan.file, []).append((plan, consumer))
                by_site.setdefault(key, []).append((plan, consumer))
        self._publish({f: tuple(s) for f, s in by_file.items()}, {k: tuple(s) for k, s in by_site.items()})

    def _publish(
        self,
        by_file: Mapping[FileKey, tuple[tuple[SitePlan, Consumer], ...]],
        by_site: Mapping[tuple[FileKey, int], tuple[tuple[SitePlan, Consumer], ...]],
    ) -> None:
        if not any(c.register.returns for c in self._consumers.values()):
            self._places.clear()
        self._now = _Snapshot(
            tuple(self._consumers.values()), by_file, by_site, dict(self._loaders), dict(self._unwinders)
        )

    # --- the breaker: control thread ---------------------------------------------------------------------------------

    def judge(self, verdicts: Verdicts) -> None:
        """Says what is to be left out; from its return on ``wanted`` does. ``settle`` is due when that is so."""
        self.verdicts = verdicts

    def settle(self, points: Iterable[Point], judged_ns: int) -> None:
        """Has the targets say what became of them by the present verdicts.

        Args:
            points: those of the former verdicts and of the present ones.
            judged_ns: when ``judge`` was called, CLOCK_MONOTONIC ns: what is out may have been so from then on.
        """
        now_ns = time.monotonic_ns()
        with self._lock:
            for point in points:
                for plan, consumer in self._now.by_site.get((point.file, point.offset), ()):
                    key = (*point.process, plan.site, point.addr)
                    target = consumer.targets.get(key)
                    if target is None or target.state not in ("armed", *_HELD):
                        continue
                    self._settle(consumer, key, target, self.verdicts.of(point, consumer.probe), judged_ns, now_ns)
        self._on_change()

    @staticmethod
    def _settle(
        consumer: Consumer,
        key: Key,
        target: TargetState,
        verdict: Verdict | None,
        judged_ns: int,
        now_ns: int,
    ) -> None:
        state, message = (verdict.state.text, verdict.message) if verdict else ("armed", "")
        if verdict is None and key not in consumer.outages:
            return  # it was never out
        consumer.outages.mark(
            key, out=verdict is not None and verdict.out, since_ns=judged_ns if verdict and verdict.out else now_ns
        )
        if (target.state, target.message) == (state, message):
            return
        if target.state != state:
            consumer.outages.begin(key, now_ns)
            target.since_ns = time.time_ns()
            why = message or "within its budget again"
            log.warning("probe %s, process %d at %#x: %s (%s)", consumer.probe, target.pid, target.addr, state, why)
        target.state, target.message = state, message
        target.reason = _OVER_BUDGET if verdict else ""
        # One that is throttled is in and out all the time: ``covered`` says how much.
        if state == State.TRIPPED.text:
            consumer.coverage.end(key, time.time_ns())
        elif key not in consumer.coverage:  # it was tripped, or began its life left out
            consumer.coverage.begin(
                key, msgspec.structs.replace(target, state="armed", hook="budget", may_have_missed=True, message=_BACK)
            )
        _tell_outages(consumer, key, target, now_ns)

    def measure(self) -> None:
        """Has the targets that are, or were, left out say for how long."""
        now_ns = time.monotonic_ns()
        changed = False
        with self._lock:
            for consumer in self._consumers.values():
                for key in consumer.outages.keys():  # noqa: SIM118 - not a dictionary
                    if (target := consumer.targets.get(key)) is not None and target.state in _HELD:
                        _tell_outages(consumer, key, target, now_ns)
                        changed = True
        if changed:
            self._on_change()

    def uncovered_ms(self, consumer: Consumer) -> int:
        """Returns for how long a probe's targets were left out, summed over them, in ms."""
        with self._lock:
            return consumer.outages.total_ns(time.monotonic_ns()) // 1_000_000

    # --- whoever looks at processes ----------------------------------------------------------------------------------

    def candidates(self, consumer: Consumer | None = None) -> set[ProcessId]:
        """Looks through the processes of the host, and returns those in which something may be wanted: by this consumer, or
        by any. Where nothing can be, none is looked at (R8)."""
        now = self._now
        asking = now.consumers if consumer is None else (consumer,)
        needles = {maps.needle(file) for c in asking for file, _ in c.plans}
        named = {int(c.register.where[k]) for c in asking for k in ("pid", "tree") if k in c.register.where}
        if all("pid" in c.register.where for c in asking):
            pids = sorted(named)
        elif needles or named:
            pids = self._proc.pids()
        else:
            return set()
        found: set[ProcessId] = set()
        for pid in pids:
            if pid in self.self_pids:
                continue
            try:
                if pid not in named:
                    text = procfs.tried(lambda pid=pid: self._proc.maps(pid))  # type: ignore[misc]
                    if not any(n in text for n in needles):
                        continue
                start_time = procfs.tried(lambda pid=pid: self._proc.start_time(pid))  # type: ignore[misc]
                found.add(ProcessId(pid, start_time))
            except OSError:
                continue  # ended meanwhile, or another user's
        return found

    def concerned(self, consumer: Consumer, followed: Iterable[ProcessId]) -> set[ProcessId]:
        """Returns the processes, of those that are followed, in which a consumer that was withdrawn may have left something:
        a site, a target, or only that it is followed."""
        needles = {maps.needle(file) for file, _ in consumer.plans}
        with self._lock:
            known = {ProcessId(*key[:2]) for key, t in consumer.targets.items() if t.state != "gone"}
        found: set[ProcessId] = set()
        for identity in followed:
            if not consumer.follows and identity not in known:
                with contextlib.suppress(OSError):  # then it is one that is looked at
                    text = self._proc.maps(identity.pid)
                    if text and not any(n in text for n in needles):
                        continue
            found.add(identity)
        return found

    def mark_ended(self) -> None:
        """Marks targets in processes that are no more as gone. The engine tells of those that it follows; of a process that
        refused, nobody does."""
        living: set[tuple[int, int]] = set(self.meters.processes())  # some ended before they were followed
        with self._lock:
            living |= {k[:2] for c in self._now.consumers for k, t in c.targets.items() if t.state != "gone"}
        for identity in living:
            try:
                if self._proc.start_time(identity[0]) == identity[1]:
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
            return [(c.probe, c.coverage.take()) for c in self._consumers.values() if c.coverage.pending]

    # --- Observer: the engine's threads ------------------------------------------------------------------------------

    def wanted(self, identity: ProcessId, cause: str, parent: ProcessId | None = None) -> Wanted:
        self.stacks.changed(identity.pid)
        now, verdicts = self._now, self.verdicts
        if parent is not None:
            self._ancestors[identity] = (parent.pid, *self._ancestors_of(parent))
        if identity.pid in self.self_pids:
            return Wanted()
        facts = self._proc.facts(identity.pid)
        if facts is None or facts.start_time != identity.start_time:
            raise ProcessLookupError(f"process {identity.pid} is gone")
        if is_own(facts, self.self_pids):
            return Wanted()
        parents = self._parents(identity)
        matching = {c for c in now.consumers if c.selector.matches(facts, parents)}
        text = self._proc.maps(identity.pid)
        mappings = maps.parse_maps(text)
        if any(consumer.ring.of_stacks for consumer in matching):
            self.stacks.meet(identity.pid, text)

        def still_mapped(addr: int, plan: SitePlan) -> bool:
            return maps.is_mapped(mappings, plan.file, plan.offset, addr)

        def places(plan: SitePlan) -> list[int]:
            return [a for m in mappings if m.is_of(plan.file) and (a := m.addr(plan.offset)) is not None]

        is_data = maps.data_lookup(text)

        def holds(counter: Counter) -> bool:
            return is_data(counter.file, counter.offset, counter.addr)

        sites: dict[int, SiteRequest] = {}
        interested: dict[int, list[Consumer]] = {}
        left_out: dict[tuple[Consumer, int], tuple[SitePlan, Verdict]] = {}
        for mapping in mappings if matching else ():
            for plan, consumer in now.by_file.get(mapping.file, ()):
                addr = mapping.addr(plan.offset)
                if addr is None or consumer not in matching:
                    continue
                if plan.file not in consumer.held:
                    consumer.hold(identity.pid, mapping)
                point = Point(identity, addr, plan.file, plan.offset)
                if verdicts and (verdict := verdicts.of(point, consumer.probe)) is not None and verdict.out:
                    left_out[consumer, addr] = plan, verdict
                    continue
                interested.setdefault(addr, []).append(consumer)
                tally = self.meters.tally(point, interested[addr])
                known = sites.get(addr) or _request(addr, plan, mapping, mappings)
                known = replace(known, tally=tally, semaphore=known.semaphore or _counter(addr, plan))
                sites[addr] = (
                    replace(known, returns=(*known.returns, consumer.return_sinks[plan.site, plan.program]))
                    if consumer.register.returns
                    else replace(known, sinks=(*known.sinks, consumer.sinks[plan.site, plan.program]))
                )
        # (Budgets may have been lifted meanwhile: then what is out comes back, if it is mapped still.)
        if verdicts or any(c.outages for c in now.consumers):
            self._note_left_out(identity, interested, left_out, cause, facts.comm)
        # What is left out comes back: the process is followed meanwhile.
        keep = bool(left_out) or any(c.follows for c in matching)
        if sites or keep:
            for mapping in mappings:
                loader = now.loaders.get(mapping.file)
                if loader is None or (addr := mapping.addr(loader.offset)) is None:
                    continue
                if addr not in sites:
                    sites[addr] = replace(_request(addr, loader, mapping, mappings), is_hook=True)
        if any(r.returns and r.refusal is None for r in sites.values()):
            for mapping in mappings:
                for unwinder in now.unwinders.get(mapping.file, {}).values():
                    if (addr := mapping.addr(unwinder.offset)) is not None:
                        known = sites.get(addr) or _request(addr, unwinder, mapping, mappings)
                        sites[addr] = replace(known, unwinds=True)
        return Wanted(_refused_32_bit(identity.pid, list(sites.values())), keep, still_mapped, places, holds)

    def _note_left_out(
        self,
        identity: ProcessId,
        interested: Mapping[int, Sequence[Consumer]],
        left_out: Mapping[tuple[Consumer, int], tuple[SitePlan, Verdict]],
        cause: str,
        comm: str,
    ) -> None:
        """Enters targets that begin their life left out, and strikes off those that went away while they were: the engine
        has no breakpoint there of which to report either."""
        cause, hook = _cause_and_hook(cause)
        now_ns = time.monotonic_ns()
        with self._lock:
            for (consumer, addr), (plan, verdict) in left_out.items():
                key = (*identity, plan.site, addr)
                known = consumer.targets.get(key)
                if known is not None and known.state != "gone":
                    continue
                consumer.of_process.setdefault(key[:2], set()).add(key)
                consumer.targets[key] = TargetState(
                    pid=identity.pid,
                    start_time=identity.start_time,
                    comm=comm,
                    site=plan.site,
                    path=plan.path,
                    offset=plan.offset,
                    addr=addr,
                    state=verdict.state.text,
                    cause=cause,
                    hook=_LATE_HOOKS.get(hook, hook),
                    since_ns=time.time_ns(),
                    reason=_OVER_BUDGET,
                    message=verdict.message,
                )
                consumer.outages.mark(key, out=True, since_ns=now_ns)
                consumer.changed.add(key)
            for consumer in self._now.consumers:
                for key in consumer.outages.keys():  # noqa: SIM118 - not a dictionary
                    addr, target = key[3], consumer.targets.get(key)
                    if key[:2] != identity or target is None or target.state not in _HELD:
                        continue
                    if (consumer, addr) not in left_out and consumer not in interested.get(addr, ()):
                        consumer.end(key, target)
        self._on_change()

    def is_meant(self, pid: int, file: FileKey) -> bool:
        """Says whether something is wanted in a process once it has mapped a file. Any thread."""
        consumers = {consumer for _, consumer in self._now.by_file.get(file, ())}
        if not consumers or pid in self.self_pids:
            return False
        facts = self._proc.facts(pid)
        if facts is None or is_own(facts, self.self_pids):
            return False
        parents = self._parents(ProcessId(pid, facts.start_time))
        return any(c.selector.matches(facts, parents) for c in consumers)

    def place(self, process: ProcessId, addr: int) -> SiteRequest:
        mappings = maps.parse_maps(self._proc.maps(process.pid))
        mapping = next((m for m in mappings if m.start <= addr < m.end), None)
        if mapping is None:
            raise Unsupported(
                f"process {process.pid} has no code of a file at {addr:#x}: what calls was made at run time, or by hand",
                reason="GeneratedCode",
            )
        plan = self._places.plan(
            mapping, addr, lambda offset, size: self._proc.content(process.pid, mapping, offset, size)
        )
        return _request(addr, plan, mapping, mappings)

    def _ancestors_of(self, identity: ProcessId) -> tuple[int, ...]:
        known = self._ancestors.get(identity)
        if known is not None:
            return known
        chain: list[int] = []
        parents = _Parents(self._proc)
        pid = parents.get(identity.pid)
        while pid and pid not in chain:
            chain.append(pid)
            pid = parents.get(pid)
        return tuple(chain)

    def _parents(self, identity: ProcessId) -> dict[int, int]:
        chain = self._ancestors.get(identity)
        if chain is None:
            return _Parents(self._proc)
        return dict(zip((identity.pid, *chain), chain, strict=False))

    def report(self, identity: ProcessId, reports: Iterable[SiteReport], cause: str) -> None:
        since = time.time_ns()
        cause, hook = _cause_and_hook(cause)
        missed = _MISSED.get(hook, "")
        unheld = self.unheld
        blind = False
        try:
            facts = procfs.tried(lambda: self._proc.facts(identity.pid))
        except OSError:
            facts, blind = None, True  # the engine knows what it did, if not for whom
        comm = "" if facts is None else facts.comm
        parents = self._parents(identity)
        changed = False
        with self._lock:
            for report in reports:
                for plan, consumer in self._now.of(report.plan):
                    key = (identity.pid, identity.start_time, plan.site, report.addr)
                    known = consumer.targets.get(key)
                    # A site is there for all its consumers, but each has its own processes (semantics R16).
                    meant = (blind or known is not None) if facts is None else consumer.selector.matches(facts, parents)
                    state = report.state if meant else "gone"
                    if state == "gone" and known is None:
                        continue
                    if known is not None and meant:
                        # In or out by the breaker, it is what ``settle`` says of it.
                        point = Point(identity, report.addr, plan.file, plan.offset)
                        verdict = self.verdicts.of(point, consumer.probe)
                        left_out = verdict is not None and verdict.out and known.state != "gone"
                        if (state == "armed" and known.state in _HELD) or (state == "gone" and left_out):
                            continue
                    if known is not None and known.state == state and known.reason == report.reason:
                        continue
                    consumer.outages.end(key, time.monotonic_ns())
                    consumer.of_process.setdefault(key[:2], set()).add(key)
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
                        # Refused after all: calls since are not counted.
                        may_have_missed=bool(missed)
                        if state == "armed"
                        else state == "refused" and known is not None and known.state == "armed",
                        reason=report.reason,
                        message=report.message
                        or (_why_missed(missed, unheld.get(plan.file)) if state == "armed" else ""),
                    )
                    consumer.changed.add(key)
                    changed = True
                    consumer.coverage.end(key, since)
                    if state == "armed":
                        consumer.coverage.begin(key, target)
        if changed:
            self._on_change()

    def missed(self, pid: int, file: FileKey, cause: str) -> None:
        now = time.time_ns()
        cause, hook = _cause_and_hook(cause)
        facts = self._proc.facts(pid)
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
                consumer.coverage.begin((pid, target.start_time, plan.site, 0), target)
        self._on_change()

    def is_wanted(self, plan: SitePlan) -> bool:
        now = self._now
        if now.consumers and plan.file in now.loaders and now.loaders[plan.file].offset == plan.offset:
            return True
        if plan.offset in now.unwinders.get(plan.file, {}) and any(c.register.returns for c in now.consumers):
            return True
        return bool(now.of(plan))

    def sampled(self, plan: SitePlan, held_ns: int) -> None:
        for _, consumer in self._now.of(plan):
            consumer.ring.overhead_ns.append(held_ns)

    def exited(self, identity: ProcessId, status: int | None) -> None:
        self.stacks.gone(identity.pid)
        self._gone(identity)
        self.on_exit(identity, status)

    def _gone(self, identity: tuple[int, int]) -> None:
        self.meters.end(ProcessId(*identity))
        with self._lock:
            self._ancestors.pop(ProcessId(*identity), None)
            for consumer in self._now.consumers:  # the dictionary is the control thread's
                for key in consumer.of_process.pop(identity, ()):
                    state = consumer.targets.get(key)
                    if state is not None and state.state != "gone":
                        consumer.end(key, state)
        self._on_change()


def _tell_outages(consumer: Consumer, key: Key, target: TargetState, now_ns: int) -> None:
    target.covered = round(consumer.outages.covered(key, now_ns), 3)
    target.uncovered_ms = consumer.outages.uncovered_ns(key, now_ns) // 1_000_000
    consumer.changed.add(key)


def _cause_and_hook(cause: str) -> tuple[str, str]:
    cause, _, hook = cause.partition(":")
    return cause, hook or _HOOKS[cause]


def _why_missed(missed: str, unheld: str | None) -> str:
    return f"{missed}; it is not held before, since {unheld}" if missed and unheld else missed


def _same_terms(one: Register, other: Register) -> bool:
    return (one.fetches, one.where, one.max_hits, one.returns, one.aggregate) == (
        other.fetches,
        other.where,
        other.max_hits,
        other.returns,
        other.aggregate,
    )


def _request(addr: int, plan: SitePlan, mapping: FileMapping, mappings: list[FileMapping]) -> SiteRequest:
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
            if not other.is_of(plan.file) or other.writable or other.shared:
                continue
            at = other.addr(plan.slack_offset)
            # A file may be mapped twice: a slot is only of use near its site.
            if at is None or at + plan.slack_len > other.end:
                continue
            if not slack_addr or abs(at - addr) < abs(slack_addr - addr):
                slack_addr = at
    return SiteRequest(addr, plan, slack_addr=slack_addr, refusal=refusal)


def _counter(addr: int, plan: SitePlan) -> Counter | None:
    found = plan.semaphore
    return None if found is None else Counter(addr + found.distance, plan.file, found.offset)


def _refused_32_bit(pid: int, sites: list[SiteRequest]) -> list[SiteRequest]:
    """Returns the sites, refused in a process that runs 32-bit code: 64-bit code that it maps is data to it."""
    if not any(r.addr < 1 << 32 for r in sites) or not process.is_32_bit(pid):
        return sites
    return [replace(r, refusal=process.thirty_two_bit(pid)) for r in sites]


def _copy(fd: int) -> int:
    if fd >= 0:
        with contextlib.suppress(OSError):
            return os.dup(fd)
    return -1


def _opened(file: FileKey, opener: Callable[[], int]) -> int:
    """Returns the descriptor that the opener gives, if it is of that very file; else -1."""
    try:
        fd = opener()
    except (TraplineError, OSError):
        return -1
    with contextlib.suppress(TraplineError):
        if file_key_of(fd, str(file)) == file:
            return fd
    os.close(fd)
    return -1


def _forget_oldest(targets: dict[Key, TargetState]) -> None:
    gone = [k for k, t in targets.items() if t.state == "gone"]
    for key in gone[: max(0, len(gone) - _MAX_GONE)]:
        del targets[key]
