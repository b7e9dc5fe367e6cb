"""Control messages between agent and service, a tagged union each way; JSON text frames on ``/api/v1/agents/link``.

Hit batches go over the same socket as binary frames: an 8-byte little-endian link sequence, then the batch as
``trapline.protocol.hits`` encoded it. The service acknowledges link sequences cumulatively; the agent keeps what is not
acknowledged, within a bound, and sends it again after a cut. The service drops what it has seen (same ``link_id``,
sequence not above the last one).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from trapline.errors import ProtocolError
from trapline.model import Counters, DesiredProbe, HostFacts, Model, Process, Target

PROTOCOL_VERSION = 1
MAX_TEXT_BYTES = 16 * 1024 * 1024
MAX_BINARY_BYTES = 4 * 1024 * 1024
LINK_SEQ_BYTES = 8


class Hello(Model):
    """Agent's first frame."""

    type: Literal["hello"] = "hello"
    protocol: int = PROTOCOL_VERSION
    instance_id: str
    """Names the agent's host for ever: kept in its state directory, ``hst_...``."""
    link_id: str
    """New at each start of the agent process; link sequences count up within it."""
    pid: int
    facts: HostFacts


class Processes(Model):
    type: Literal["processes"] = "processes"
    full: bool = False
    """True: this is all there is; what is not named is gone."""
    upsert: list[Process] = Field(default_factory=list)
    removed: list[str] = Field(default_factory=list)


class Observed(Model):
    """The state of one probe on this host; whole each time, sent when it changed (counters at most once a second)."""

    type: Literal["observed"] = "observed"
    probe: str
    generation: int
    resolved: bool = False
    """False while resolving."""
    removed: bool = False
    """True: its bytes are out and it is forgotten here."""
    completed: bool = False
    """True: it reached its limit and was taken out."""
    targets: list[Target] = Field(default_factory=list)
    counters: Counters = Field(default_factory=Counters)
    dropped_by_reason: dict[str, int] = Field(default_factory=dict)
    unreturned_by_reason: dict[str, int] = Field(default_factory=dict)
    overhead_ns: float | None = None
    error: dict[str, Any] | None = None


class Reply(Model):
    """Answer to ``Request``; exactly one of ``result`` and ``error`` is there."""

    type: Literal["reply"] = "reply"
    id: str
    result: dict[str, Any] | None = None
    error: dict[str, Any] | None = None


class Heartbeat(Model):
    type: Literal["heartbeat"] = "heartbeat"


class LinkDrops(Model):
    """Hits that the agent itself had to let go (its outbox was full), by probe."""

    type: Literal["link-drops"] = "link-drops"
    probe: str
    count: int
    stage: str = "agent-outbox"


class Welcome(Model):
    """Service's first frame, after a good ``Hello``."""

    type: Literal["welcome"] = "welcome"
    protocol: int = PROTOCOL_VERSION
    host: str
    heartbeat_s: float = 10.0
    service_pid: int
    service_boot_id: str
    """With ``service_pid`` lets an agent on the same host leave the service alone (semantics P11)."""
    last_link_seq: int = 0
    """The highest sequence of this ``link_id`` that was received."""


class Desired(Model):
    type: Literal["desired"] = "desired"
    full: bool = False
    """True: the whole set; probes that are not named are to be removed."""
    upsert: list[DesiredProbe] = Field(default_factory=list)
    remove: list[str] = Field(default_factory=list)


class Request(Model):
    """A question to the host. ``resolve`` takes ``{"spec": ProbeSpec}`` and gives a ``HostResolution``; ``symbols`` takes
    ``{"module": str, "q": str, "limit": int}`` (module may be empty: all that are mapped) and gives a ``SymbolPage``;
    ``modules`` takes ``{"pid": int}`` (0: of all processes) and gives ``{"modules": [Module]}``; ``coverage`` takes
    ``{"probe": str}`` and gives a ``CoverageLog``; ``symbolize`` takes a ``Symbolize`` and gives ``FrameNames``."""

    type: Literal["request"] = "request"
    id: str
    method: Literal["resolve", "symbols", "modules", "coverage", "symbolize"]
    params: dict[str, Any] = Field(default_factory=dict)


class Ack(Model):
    type: Literal["ack"] = "ack"
    link_seq: int


class LinkError(Model):
    """Sent before the service closes the link."""

    type: Literal["error"] = "error"
    error: dict[str, Any]


AgentMessage = Annotated[Hello | Processes | Observed | Reply | Heartbeat | LinkDrops, Field(discriminator="type")]
ServiceMessage = Annotated[Welcome | Desired | Request | Ack | Heartbeat | LinkError, Field(discriminator="type")]

_agent: TypeAdapter[Hello | Processes | Observed | Reply | Heartbeat | LinkDrops] = TypeAdapter(AgentMessage)
_service: TypeAdapter[Welcome | Desired | Request | Ack | Heartbeat | LinkError] = TypeAdapter(ServiceMessage)


def _why(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    return f"{'.'.join(str(p) for p in first['loc']) or 'message'}: {first['msg']}"


def parse_agent_message(text: str | bytes) -> Hello | Processes | Observed | Reply | Heartbeat | LinkDrops:
    """Reads what an agent sent. Raises ProtocolError on anything else."""
    try:
        return _agent.validate_json(text)
    except ValidationError as e:
        raise ProtocolError(f"malformed agent message: {_why(e)}") from e


def parse_service_message(text: str | bytes) -> Welcome | Desired | Request | Ack | Heartbeat | LinkError:
    """Reads what the service sent. Raises ProtocolError on anything else."""
    try:
        return _service.validate_json(text)
    except ValidationError as e:
        raise ProtocolError(f"malformed service message: {_why(e)}") from e


def encode(message: Model) -> str:
    """Returns the JSON text frame of a message."""
    return message.model_dump_json(exclude_none=True)
