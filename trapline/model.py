"""The resources and the values they are made of: what the API shows, what the agent is asked for, what it reports.

All are pydantic models; unknown fields are refused in requests and ignored from newer peers. Times are aware UTC.
Names follow docs/architecture: a *probe* is the user's resource, a *target* is one (process, module, address) of it.
"""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


class Model(BaseModel):
    # In the API's schema what is sent always has all its fields, so that a generated client need not test for them.
    model_config = ConfigDict(
        extra="ignore", frozen=False, use_attribute_docstrings=True, json_schema_serialization_defaults_required=True
    )


# --- probes, as asked -----------------------------------------------------------------------------------------------


class ProbeKind(StrEnum):
    ENTRY = "u"
    RETURN = "ur"
    USDT = "usdt"


class PointKind(StrEnum):
    SYMBOL = "symbol"
    GLOB = "glob"
    REGEX = "regex"
    OFFSET = "offset"
    LINE = "line"
    TEXT = "text"


class Point(Model):
    """Where in the object: ``symbol[+offset]``, a glob or regex over symbols, a file offset, ``file:line``, quoted text."""

    kind: PointKind
    value: str = ""
    """The symbol, pattern, file name or text; empty for a bare file offset."""
    offset: int = Field(default=0, ge=0)
    """Bytes from the symbol's start, the file offset itself for ``OFFSET``, or the line number for ``LINE``."""


class Capture(Model):
    """One value of each hit."""

    text: str
    """The expression as canonical text: ``arg0``, ``str(arg1, 64)``, ``req.method``."""
    name: str
    """The column's name: ``size=arg0`` gives ``size``; by default the expression's text."""


class Aggregate(Model):
    """What a probe does with its hits in the place of sending them: ``hist(arg0) by (comm)``."""

    text: str
    """The clause as canonical text."""
    function: Literal["count", "sum", "min", "max", "avg", "hist", "lhist", "quantiles", "topk", "distinct"]
    value: str = ""
    """The expression that it is of; empty for ``count``."""
    parameters: list[int] = Field(default_factory=list)
    """Of ``lhist``: from, to, step; of ``topk``: how many."""
    by: list[str] = Field(default_factory=list)
    """The expressions that its rows are kept apart by."""


class ProbeSpec(Model):
    """A probe text taken apart (see ``trapline.spec`` for the grammar). ``text`` is canonical; the rest follows from it."""

    text: str
    name: str = ""
    kind: ProbeKind = ProbeKind.ENTRY
    object: str
    """An absolute path, a basename or soname, ``buildid=HEX``, or ``*``."""
    point: Point
    where: dict[str, str] = Field(default_factory=dict)
    """Selector: keys ``pid tree comm exe uid container cgroup host label``, values as patterns; all must match.
    ``tree`` is a pid and stands for that process and its descendants."""
    condition: str = ""
    captures: list[Capture] = Field(default_factory=list)
    aggregate: Annotated[Aggregate | None, BeforeValidator(lambda value: value or None)] = None


class ProbeLimits(Model):
    max_hits: Annotated[int, Field(ge=1)] | None = None
    """After so many hits the probe is completed and taken out."""
    overhead: Annotated[float, Field(gt=0, le=16)] | Literal["off"] | None = None
    """Share of one CPU's time that it may add to the time of the programs on a host: 0.05 is 5 %. Beyond it the probe is
    throttled, then taken out for a while. None: what the host's agent has set, 0.1 by default; ``off``: no such budget.
    The agent's budgets for a process and for the host hold in any case."""


class DesiredProbe(Model):
    """What the service wants of an agent."""

    id: str
    generation: int = 1
    spec: ProbeSpec
    limits: ProbeLimits = Field(default_factory=ProbeLimits)


# --- probes, as observed --------------------------------------------------------------------------------------------


class Phase(StrEnum):
    PENDING = "Pending"
    RESOLVING = "Resolving"
    ARMED = "Armed"
    PARTIAL = "Partial"
    NO_TARGETS = "NoTargets"
    COMPLETED = "Completed"
    EXPIRED = "Expired"
    ERROR = "Error"
    DELETING = "Deleting"


class TargetState(StrEnum):
    ARMED = "armed"
    THROTTLED = "throttled"
    """It cost more than its budget, and is armed for a part of the time: ``covered``."""
    TRIPPED = "tripped"
    """It cost more than its budget for long, is out, and will be tried again after a while."""
    REFUSED = "refused"
    """It cannot be done correctly there; ``reason`` and ``message`` say why."""
    GONE = "gone"


class Cause(StrEnum):
    """What found the mapping."""

    SCAN = "scan"
    MMAP = "mmap"
    FORK = "fork"
    EXEC = "exec"
    RECONCILE = "reconcile"


class Target(Model):
    """One (process, module, address) of a probe."""

    host: str = ""
    pid: int
    start_time: int = 0
    """Clock ticks after boot, proc_pid_stat(5) field 22: with the boot id it names the process for ever."""
    comm: str = ""
    module: str = ""
    symbol: str = ""
    offset: int = 0
    """File offset of the instruction in the module."""
    addr: int = 0
    """Virtual address in that process; 0 where it was refused."""
    state: TargetState
    engine: str = ""
    cause: Cause = Cause.SCAN
    hook: str = ""
    """Who told of the mapping; the host's facts list the hooks."""
    since: datetime | None = None
    may_have_missed: bool = False
    """True where calls may have run between the mapping and the arming."""
    reason: str = ""
    message: str = ""
    covered: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Share of the time since ``since`` in which it was armed; below 1 where it is throttled or tripped."""
    uncovered_ms: int = 0
    """Milliseconds in which it was not armed, since it was over its budget: what happened then nobody counted."""


class CoverageEntry(Model):
    """A stretch of time in which a target was armed; or a moment (``addr`` 0) at which it should have been and was not."""

    host: str = ""
    pid: int
    start_time: int = 0
    """Clock ticks after boot, proc_pid_stat(5) field 22."""
    comm: str = ""
    module: str = ""
    symbol: str = ""
    addr: int = 0
    cause: Cause = Cause.SCAN
    hook: str = ""
    """Who told of the mapping; the host's facts list the hooks."""
    armed_at: datetime
    disarmed_at: datetime | None = None
    """None: it is armed still."""
    may_have_missed: bool = False
    """True: calls may have run before ``armed_at``, for the reason in ``message``."""
    message: str = ""


class CoverageLog(Model):
    """A probe's coverage on one host, oldest first: what its counts can be relied on for."""

    host: str
    entries: list[CoverageEntry] = Field(default_factory=list)
    forgotten: int = 0
    """Entries that are no longer kept; they were older."""
    error: dict[str, Any] | None = None
    """An error's wire form where the host could not be asked."""


class Counters(Model):
    hits: int = 0
    filtered: int = 0
    limited: int = 0
    uncovered_ms: int = 0
    """Milliseconds in which targets were throttled or tripped and not armed, summed over them."""
    dropped: int = 0
    """hits = delivered + dropped, always (semantics H1)."""
    calls: int = 0
    """Of a return probe: calls that were seen to begin; 0 for other probes. What is neither a hit (or limited) nor
    unreturned is still in flight (semantics H7)."""
    unreturned: int = 0
    """Calls of a return probe whose return was not seen, and will not be: they were left by longjmp or a throw, their
    thread ended, the probe was taken out meanwhile, ..."""


class Condition(Model):
    type: str
    status: Literal["True", "False", "Unknown"] = "True"
    reason: str = ""
    message: str = ""
    host: str = ""
    at: datetime | None = None


class Coverage(Model):
    eligible: int = 0
    armed: int = 0


class ProbeStatus(Model):
    observed_generation: int = 0
    phase: Phase = Phase.PENDING
    coverage: Coverage = Field(default_factory=Coverage)
    counters: Counters = Field(default_factory=Counters)
    dropped_by_reason: dict[str, int] = Field(default_factory=dict)
    unreturned_by_reason: dict[str, int] = Field(default_factory=dict)
    overhead_ns: float | None = None
    """Median time that the engine itself held a thread, per hit, in ns; None before the first hit."""
    conditions: list[Condition] = Field(default_factory=list)


class Probe(Model):
    id: str
    name: str
    created_at: datetime
    created_by: str = ""
    expires_at: datetime | None = None
    labels: dict[str, str] = Field(default_factory=dict)
    generation: int = 1
    spec: ProbeSpec
    limits: ProbeLimits = Field(default_factory=ProbeLimits)
    status: ProbeStatus = Field(default_factory=ProbeStatus)


class ProbeCreate(Model):
    """Body of ``POST /probes`` and ``POST /probes:resolve``."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    probe: Annotated[str, Field(min_length=1, max_length=4096)]
    """The probe text, such as ``redis-server:processCommand {arg0}``."""
    name: Annotated[str, Field(max_length=128)] = ""
    ttl_s: Annotated[int, Field(ge=1, le=30 * 86400)] | None = 3600
    """Seconds until it expires; null keeps it until it is deleted."""
    labels: dict[str, str] = Field(default_factory=dict)
    limits: ProbeLimits = Field(default_factory=ProbeLimits)
    allow_offline: bool = False
    """True: accept it though no host that it asks for is online; it is armed when one comes."""


class ResolvedSite(Model):
    """One instruction that a probe would be put on, in one file."""

    module: str
    build_id: str = ""
    symbol: str = ""
    symbol_offset: int = 0
    demangled: str = ""
    """The symbol as the source language writes it (C++, Rust); empty where that is the same."""
    aliases: list[str] = Field(default_factory=list)
    """Other symbols of the same place: aliases, and functions that were folded together; a probe hits for all of them."""
    file: str = ""
    """Source file, where a line was asked for."""
    line: int = 0
    arguments: str = ""
    """Of a USDT probe: its arguments as the file describes them, ``8@%rdi -4@-20(%rbp)``."""
    offset: int
    instruction: str = ""
    step: str = ""
    """How the displaced instruction runs: ``emulated`` or ``boosted``."""
    refused: dict[str, Any] | None = None
    """An error's wire form where the site cannot be probed."""


class HostResolution(Model):
    """What a probe means on one host, before anything is armed."""

    host: str
    sites: list[ResolvedSite] = Field(default_factory=list)
    targets: list[Target] = Field(default_factory=list)
    """Processes that map one of the modules now; state ``refused`` with the reason where it could not be armed."""
    notes: list[str] = Field(default_factory=list)
    """What was left out, such as sites beyond the limit."""
    error: dict[str, Any] | None = None


class Resolution(Model):
    spec: ProbeSpec
    hosts: list[HostResolution] = Field(default_factory=list)


# --- hosts and what runs there ---------------------------------------------------------------------------------------


class EngineInfo(Model):
    name: str
    available: bool
    reason: str = ""
    """Why it is not available, or what it cannot do here."""
    features: list[str] = Field(default_factory=list)


class HookInfo(Model):
    """One way to learn of later mappings, and whether it works on this host (it was tried)."""

    name: str
    available: bool
    reason: str = ""


class HostFacts(Model):
    """What an agent says of its host."""

    name: str
    boot_id: str
    kernel: str = ""
    arch: str = ""
    os: str = ""
    cpus: int = 0
    agent_version: str = ""
    agent_user: str = ""
    engines: list[EngineInfo] = Field(default_factory=list)
    hooks: list[HookInfo] = Field(default_factory=list)


class Host(Model):
    id: str
    online: bool
    facts: HostFacts
    process_count: int = 0
    connected_at: datetime | None = None
    last_seen: datetime | None = None


class Process(Model):
    id: str
    """Host, boot id, pid and start time, joined; opaque."""
    host: str
    pid: int
    start_time: int
    ppid: int = 0
    comm: str = ""
    exe: str = ""
    cmdline: str = ""
    uid: int = 0
    user: str = ""
    threads: int = 1
    container: str = ""
    eligible: bool = True
    reason: str = ""
    """Why it is not eligible: ``Self``, ``KernelThread``, ``Zombie``, ``PermissionDenied``, ``TracedByOther``."""


class Module(Model):
    """A file that is mapped executable by some process of a host."""

    path: str
    build_id: str = ""
    dev: str = ""
    """``major:minor`` in hex, as in /proc/PID/maps."""
    inode: int = 0
    processes: int = 0


class Symbol(Model):
    name: str
    demangled: str = ""
    """As the source language writes it (C++, Rust); empty where that is the same."""
    module: str
    build_id: str = ""
    offset: int
    """File offset of its first instruction."""
    size: int = 0
    bind: str = ""
    """``global``, ``weak`` or ``local``."""


class SymbolPage(Model):
    """Answer to a symbol search: best matches first."""

    host: str
    module: str = ""
    total: int = 0
    symbols: list[Symbol] = Field(default_factory=list)
    note: str = ""
    """What was left out, in a sentence; empty where everything was searched."""
    error: dict[str, Any] | None = None


# --- hits, as people see them ----------------------------------------------------------------------------------------


class StackFrame(Model):
    """One frame of a stack, not named yet: ``hosts/{host}:symbolize`` does that."""

    path: str
    """Of the file that its code is in, in the mount namespace of a process that maps it; ``[vdso]``; ``[anon]`` for code
    without a file; empty where it is not known."""
    build_id: str = ""
    file: str = ""
    """``dev inode`` as /proc/PID/maps prints them."""
    offset: Annotated[int, Field(ge=0)]
    """In the file: of the instruction in the innermost frame and where a signal interrupted, else of a call's last byte."""


class Symbolize(Model):
    """A question for the names of frames."""

    frames: Annotated[list[StackFrame], Field(max_length=10_000)]


class FrameNames(Model):
    """Its answer."""

    names: list[list[str]]
    """For each frame the functions that are inlined there, innermost first, as ``name (inlined)``; then the function, or
    ``libc.so.6+0x9b0e3`` where there is no symbol."""
    sources: list[str] = Field(default_factory=list)
    """For each frame its place in the source, ``orders.c:42``; empty where there is no debug information."""


class Hit(Model):
    """One hit as JSON. ``ts_ns`` is a string since 64-bit nanoseconds exceed what JavaScript's numbers hold."""

    probe: str
    host: str
    seq: int
    ts: datetime
    ts_ns: str
    pid: int
    tid: int
    comm: str = ""
    site: str = ""
    args: dict[str, bool | int | float | str | None] = Field(default_factory=dict)
    """Captured values by name; None where ``status`` has the name. Integers beyond 2**53 either way are decimal strings,
    bytes are hex digits, and floating-point numbers that are none are ``nan``, ``inf`` and ``-inf``."""
    status: dict[str, str] = Field(default_factory=dict)
    """For values that are not ok: ``truncated``, ``null``, ``fault``, ..."""
    stacks: dict[str, list[StackFrame]] = Field(default_factory=dict)
    """The frames of the stacks among them, innermost first."""


# --- aggregates, as people see them -----------------------------------------------------------------------------------

AggregateValue = int | float | str | None
"""Integers beyond 2**53 are decimal strings, since JavaScript's numbers do not hold them."""


class AggregateBucket(Model):
    """A bucket of a histogram: values from ``low`` up to and without ``high``; null where there is no bound."""

    low: AggregateValue = None
    high: AggregateValue = None
    count: int


class AggregateItem(Model):
    """One of the most frequent values."""

    value: AggregateValue
    status: str = ""
    """``truncated`` where it was longer; else empty."""
    count: int
    """It occurred so often, or up to ``AggregateRow.error`` more."""


class AggregateRow(Model):
    key: list[AggregateValue] = Field(default_factory=list)
    """The values of the expressions after ``by``; null where ``key_status`` says why."""
    key_status: list[str] = Field(default_factory=list)
    """For each of them empty, or ``truncated``, ``null``, ``fault``, ..."""
    stacks: dict[str, list[int]] = Field(default_factory=dict)
    """Of those among them that are stacks the frames, innermost first: indices in ``AggregateTable.frames``."""
    count: int
    """Hits."""
    value: AggregateValue = None
    """Of count, sum, min, max, avg and distinct: the figure; null where no hit had a value."""
    buckets: list[AggregateBucket] = Field(default_factory=list)
    """Of a histogram, without gaps."""
    quantiles: dict[str, float] = Field(default_factory=dict)
    """Value by share: ``0`` the least, ``0.5`` the median, ``1`` the largest; within 1 %."""
    items: list[AggregateItem] = Field(default_factory=list)
    """Of topk, most frequent first."""
    error: int = 0
    """Of topk: no value occurred so much more often than its item says, or unseen."""
    bad: dict[str, int] = Field(default_factory=dict)
    """Hits whose value could not be had, by status: counted, and in no other figure."""


class AggregatePoint(Model):
    """What an aggregate says of a stretch of time."""

    start: datetime
    count: int
    """Hits in all rows, shown or not."""
    rows: list[AggregateRow] = Field(default_factory=list)
    other: AggregateRow | None = None


class AggregateTable(Model):
    """What a probe's aggregate says."""

    probe: str = ""
    aggregate: Aggregate
    count: int = 0
    """Hits in all rows, shown or not."""
    keys: int = 0
    """Rows that there are."""
    rows: list[AggregateRow] = Field(default_factory=list)
    """Most hits first."""
    other: AggregateRow | None = None
    """All keys that came when the table was full, in one row; null where there were none."""
    lost: int = 0
    """Hits that were counted on their host and are not in here; the probe's ``dropped_by_reason`` says where they went."""
    since: datetime | None = None
    """When the first of its hits may have been, at the earliest; null where there are none."""
    until: datetime | None = None
    series: list[AggregatePoint] = Field(default_factory=list)
    """Where it was asked for: the same by stretches of time, oldest first; those without a hit are left out."""
    frames: list[StackFrame] = Field(default_factory=list)
    """Those that the rows' stacks consist of, each once; ``hosts/{host}:symbolize`` names them."""
    hosts: list[str] = Field(default_factory=list)
    """Where its hits are from: who can name the frames."""


class Problem(Model):
    """RFC 9457, application/problem+json."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str = ""
    code: str = ""
    reason: str = ""
    hint: str = ""
    suggestions: list[str] = Field(default_factory=list)
    caret: str = ""
    errors: list[dict[str, Any]] = Field(default_factory=list)
