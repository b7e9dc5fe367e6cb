"""Messages of ``/api/v1/stream``, the WebSocket for people and programs: many subscriptions on one socket.

Subprotocol ``trapline.v1.json``: all frames are JSON text. Subprotocol ``trapline.v1.binary``: control frames are the same
JSON text; hit batches are binary frames: u32 little-endian subscription number (from ``subscribed``), u32 zero, then the
batch as ``trapline.protocol.hits`` encoded it on its host (so that its columns stay 8-byte aligned).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from trapline.errors import ProtocolError
from trapline.model import AggregateTable, Hit, Host, Model, Probe

JSON_SUBPROTOCOL = "trapline.v1.json"
BINARY_SUBPROTOCOL = "trapline.v1.binary"
BINARY_PREFIX_BYTES = 8


class StreamModel(Model):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class StreamFilter(StreamModel):
    probes: list[str] | None = None
    """Probe ids or names; None: all."""
    hosts: list[str] | None = None


class Subscribe(StreamModel):
    type: Literal["subscribe"] = "subscribe"
    id: Annotated[str, Field(min_length=1, max_length=64)]
    """The client's own name for the subscription."""
    topic: Literal["hits", "probes", "hosts", "aggregates"]
    filter: StreamFilter = Field(default_factory=StreamFilter)
    on_slow: Literal["drop-oldest", "disconnect"] = "drop-oldest"


class Unsubscribe(StreamModel):
    type: Literal["unsubscribe"] = "unsubscribe"
    id: str


class Pause(StreamModel):
    type: Literal["pause"] = "pause"
    id: str


class Resume(StreamModel):
    type: Literal["resume"] = "resume"
    id: str


class Subscribed(Model):
    type: Literal["subscribed"] = "subscribed"
    id: str
    number: int
    """Stands for ``id`` in binary frames."""


class HitItems(Model):
    type: Literal["batch"] = "batch"
    id: str
    items: list[Hit]


class Status(Model):
    """A probe, host or aggregate as it is now; topics ``probes``, ``hosts`` and ``aggregates``. All are sent once after
    ``subscribed``, and whole each time: who is slow gets the latest. Of an aggregate the 100 rows with the most hits."""

    type: Literal["status"] = "status"
    id: str
    probe: Probe | None = None
    host: Host | None = None
    aggregate: AggregateTable | None = None
    removed: str | None = None
    """The id of what is gone."""


class Gap(Model):
    """Hits that this subscription will not get. ``count`` of them; sequence range where it is known."""

    type: Literal["gap"] = "gap"
    id: str
    probe: str
    host: str
    count: int
    seq_from: int | None = None
    seq_to: int | None = None
    stage: str
    """Where they were lost: ``tracer-ring``, ``agent-outbox``, ``subscriber-queue``, ``paused``."""


class StreamError(Model):
    type: Literal["error"] = "error"
    id: str = ""
    error: dict[str, Any]


class Bye(Model):
    type: Literal["bye"] = "bye"
    reason: str
    retry_after: float = 1.0


ClientMessage = Annotated[Subscribe | Unsubscribe | Pause | Resume, Field(discriminator="type")]
ServerMessage = Annotated[Subscribed | HitItems | Status | Gap | StreamError | Bye, Field(discriminator="type")]
_client: TypeAdapter[Subscribe | Unsubscribe | Pause | Resume] = TypeAdapter(ClientMessage)
_server: TypeAdapter[Subscribed | HitItems | Status | Gap | StreamError | Bye] = TypeAdapter(ServerMessage)


def parse_client_message(text: str | bytes) -> Subscribe | Unsubscribe | Pause | Resume:
    """Reads what a subscriber sent. Raises ProtocolError on anything else."""
    try:
        return _client.validate_json(text)
    except ValidationError as e:
        first = e.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(p) for p in first["loc"]) or "message"
        raise ProtocolError(f"malformed stream message: {where}: {first['msg']}") from e


def parse_server_message(text: str | bytes) -> Subscribed | HitItems | Status | Gap | StreamError | Bye:
    """Reads what the service sent. Raises ProtocolError on anything else."""
    try:
        return _server.validate_json(text)
    except ValidationError as e:
        raise ProtocolError(f"malformed stream message: {e.errors(include_url=False)[0]['msg']}") from e
