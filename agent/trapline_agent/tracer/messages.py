"""What agent and tracer say to each other over their Unix socket.

A frame is u32 little-endian length, u8 kind, payload: kind 0 is a control message (msgpack of the structs below, tagged by
``t``), kind 1 a hit batch as ``trapline.protocol.hits`` encodes it or an aggregate frame as ``trapline.protocol.aggregates``
does. Both ends are of the same release: there is no version
negotiation beyond ``Ready.protocol``, which must be equal.
"""

from __future__ import annotations

import struct
from typing import Any

import msgspec

from trapline.errors import ProtocolError
from trapline_agent.plans import AggregatePlan, FetchPlan, FileKey, SitePlan

PROTOCOL = 1
FRAME = struct.Struct("<IB")
CONTROL, HITS = 0, 1
MAX_FRAME_BYTES = 32 * 1024 * 1024


class Message(msgspec.Struct, tag_field="t", omit_defaults=True, kw_only=True):
    pass


class Budgets(msgspec.Struct, frozen=True, kw_only=True):
    """What probes may add to the time of programs, each as a share of one CPU's time (``tracer.breaker``); 0: no budget."""

    probe: float = 0.1
    """Each probe, over all processes; a probe may have a budget of its own (``Register.overhead``)."""
    process: float = 0.25
    """Each process, over all probes in it."""
    host: float = 0.5
    """All probes together, the tracer's own work for them included."""
    burst_s: float = 3.0
    """Seconds of a CPU's time by which each may be exceeded for a while."""


DEFAULT_BUDGETS = Budgets()

# --- agent to tracer -------------------------------------------------------------------------------------------------


class Hello(Message, tag="hello"):
    """First frame. The lease starts: without ``Renew`` or another message for ``lease_s``, all sites are taken out."""

    agent_pid: int
    host: str
    lease_s: float = 30.0
    self_pids: list[int] = []
    """Processes that are never eligible: the agent, a service on this host (semantics P11)."""
    budgets: Budgets = DEFAULT_BUDGETS


class Renew(Message, tag="renew"):
    pass


class Register(Message, tag="register"):
    """Whole plan of a probe; sent again with more sites when more files are found (sites keep their numbers)."""

    id: int
    probe: str
    generation: int
    sites: list[str]
    """Labels: ``libc.so.6:malloc``."""
    plans: list[SitePlan]
    fetches: list[FetchPlan] = []
    where: dict[str, str] = {}
    """pid tree comm exe uid: all must match (shell patterns for comm and exe)."""
    max_hits: int = 0
    overhead: float | None = None
    """Its own budget, in the place of ``Budgets.probe``; 0: none."""
    returns: bool = False
    """The sites are entries of functions; a hit is a return from one."""
    aggregate: AggregatePlan | None = None
    """What becomes of hits in the place of rows: ``fetches`` are what it is grouped by, then what it is of."""


class Unregister(Message, tag="unregister"):
    """Replied to when no byte of it is left and no handler will run."""

    id: int
    probe: str


class Launch(Message, tag="launch"):
    """Starts a command as the tracer's child, held before its first instruction until ``Release``; replied to with its pid.

    It inherits the tracer's standard streams; it dies with the tracer.
    """

    id: int
    argv: list[str]
    env: dict[str, str] = {}
    cwd: str = "/"
    output: str = "inherit"
    """``inherit`` or ``null``, for its standard output and error."""


class Release(Message, tag="release"):
    id: int
    pid: int


class Signal(Message, tag="signal"):
    """Sends a signal to a launched command."""

    id: int
    pid: int
    signal: int


class Shutdown(Message, tag="shutdown"):
    """Take everything out, end launched commands with SIGTERM, reply, exit."""

    id: int


# --- tracer to agent -------------------------------------------------------------------------------------------------


class Ready(Message, tag="ready"):
    """First frame, after ``Hello``."""

    protocol: int
    pid: int
    source: str
    """Names this tracer process; hit sequences count within it."""
    engine: str
    available: bool
    reason: str = ""
    hooks: list[tuple[str, bool, str]] = []
    """(name, works here, why not)."""
    probes: list[str] = []
    """What is armed already, when an agent comes back within the lease."""


class Done(Message, tag="done"):
    """Reply to the request ``id``."""

    id: int
    pid: int = 0
    error: dict[str, Any] | None = None


class TargetState(msgspec.Struct, kw_only=True, omit_defaults=True):
    pid: int
    start_time: int
    comm: str
    site: int
    path: str
    offset: int
    addr: int = 0
    state: str
    """armed, throttled, tripped, refused, gone."""
    cause: str = "scan"
    hook: str = ""
    """Who told of the mapping."""
    since_ns: int = 0
    """CLOCK_REALTIME."""
    may_have_missed: bool = False
    reason: str = ""
    message: str = ""
    covered: float = 1.0
    """Share of the time since ``since_ns`` in which its breakpoint was in; below 1 where the breaker took it out."""
    uncovered_ms: int = 0
    """Milliseconds in which the breaker had taken it out, ever."""


class Targets(Message, tag="targets"):
    """Targets of a probe that are new or changed; the key is (pid, start_time, site, addr)."""

    probe: str
    targets: list[TargetState]


class CoverageEntry(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A stretch of time in which a target was armed; or a moment at which it should have been and was not (``addr`` 0)."""

    number: int
    """Counts up in a probe on a tracer; an entry comes again when it has ended."""
    pid: int
    start_time: int
    comm: str
    site: int
    path: str
    addr: int = 0
    cause: str = "scan"
    hook: str = ""
    begun_ns: int = 0
    """CLOCK_REALTIME."""
    ended_ns: int = 0
    """0: it is armed still."""
    may_have_missed: bool = False
    """True: calls may have run before it began, for the reason in ``message``."""
    message: str = ""


class Covered(Message, tag="covered"):
    """Entries of a probe's coverage log that are new or have ended."""

    probe: str
    entries: list[CoverageEntry]


class Stats(Message, tag="stats"):
    """Counters of a probe, whole, at most once a second and at its end."""

    probe: str
    hits: int
    filtered: int = 0
    limited: int = 0
    uncovered_ms: int = 0
    """Milliseconds in which its targets were not seen, since the breaker had taken them out: summed over targets."""
    drops: dict[str, int] = {}
    calls: int = 0
    """Of a return probe: calls that began."""
    unreturned: dict[str, int] = {}
    """Those of them that will not be seen to return, by reason."""
    overhead_ns: float = 0.0


class Completed(Message, tag="completed"):
    """The probe reached its limit and is out."""

    probe: str


class Mapped(Message, tag="mapped"):
    """A process mapped a file executable whose basename a probe names, but no plan knows this file."""

    pid: int
    path: str
    file: FileKey


class Exited(Message, tag="exited"):
    """A launched command ended; ``status`` as os.waitstatus_to_exitcode gives it."""

    pid: int
    status: int


class LeaseEnded(Message, tag="lease-ended"):
    """Everything was taken out since the agent had not been heard of."""


class Watch(Message, tag="watch"):
    """Agent to tracer: basenames whose mappings it wants to hear of in ``Mapped``; replaces the former set."""

    names: list[str]


class Spare(Message, tag="spare"):
    """Agent to tracer: further processes that are never eligible; replaces those of ``Hello``."""

    self_pids: list[int]


class Loaders(Message, tag="loaders"):
    """Agent to tracer: where the dynamic loaders of this host call ``_dl_debug_state`` (``site`` has no meaning there). In
    a process that is followed already, what dlopen maps is then armed before its code runs (semantics P3). And where
    longjmp begins (``unwinds``), which is armed where calls are awaited to return."""

    plans: list[SitePlan]


class FrameFile(Message, tag="frame-file"):
    """Tracer to agent: a process has a file whose unwind table is wanted; answered by ``FrameTable``."""

    file: FileKey
    path: str
    pid: int
    start: int
    """Of a mapping of it, by which it can be opened, and ``end`` behind it."""
    end: int


class FrameTable(Message, tag="frame-table"):
    """Agent to tracer: the unwind table of a file; before it is asked for, too."""

    file: FileKey
    build_id: str = ""
    table: bytes = b""
    """As ``unwind.table`` encodes it; empty where the file has none."""


ToTracer = (
    FrameTable | Loaders | Spare | Hello | Renew | Register | Unregister | Launch | Release | Signal | Shutdown | Watch
)
ToAgent = FrameFile | Ready | Done | Targets | Covered | Stats | Completed | Mapped | Exited | LeaseEnded

_MALFORMED = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What decoding raises; the last is of values that are nested too deep."""
_encoder = msgspec.msgpack.Encoder()
_to_tracer: msgspec.msgpack.Decoder[ToTracer] = msgspec.msgpack.Decoder(ToTracer)
_to_agent: msgspec.msgpack.Decoder[ToAgent] = msgspec.msgpack.Decoder(ToAgent)


def frame(message: Message) -> bytes:
    """Returns the control frame of a message."""
    payload = _encoder.encode(message)
    return FRAME.pack(len(payload), CONTROL) + payload


def hits_frame(batch: bytes) -> bytes:
    """Returns the frame of an encoded hit batch or aggregate."""
    return FRAME.pack(len(batch), HITS) + batch


def parse_to_tracer(payload: bytes) -> ToTracer:
    """Raises ProtocolError where the payload is not a message to the tracer."""
    try:
        return _to_tracer.decode(payload)
    except _MALFORMED as e:
        raise ProtocolError(f"malformed message to the tracer: {e}") from e


def parse_to_agent(payload: bytes) -> ToAgent:
    """Raises ProtocolError where the payload is not a message to the agent."""
    try:
        return _to_agent.decode(payload)
    except _MALFORMED as e:
        raise ProtocolError(f"malformed message from the tracer: {e}") from e
