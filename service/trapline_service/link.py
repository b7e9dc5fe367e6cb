"""An agent's link, without its socket: frames in, frames out.

A frame is read whole before anything is done about it, so that a malformed one changes nothing. What it cannot read it
answers with a ``LinkError``, and the socket is closed with 4400.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections import deque
from pathlib import Path

from trapline.errors import Conflict, ProtocolError, TraplineError, Unavailable
from trapline.model import Model
from trapline.protocol import aggregates
from trapline.protocol import messages as m
from trapline_service.aggregates import Aggregates
from trapline_service.fleet import Fleet
from trapline_service.frames import HitFrame, LinkPosition
from trapline_service.hub import Hub
from trapline_service.ledger import Ledger
from trapline_service.probes import Probes

log = logging.getLogger(__name__)

CLOSE_MALFORMED = 4400
CLOSE_REPLACED = 4409
CLOSE_AWAY = 1013
_ACK_BATCHES = 64
_ACK_S = 0.05
_MAX_QUEUE_BYTES = 32 * 1024 * 1024
_MAX_LINK_SEQ = 2**63 - 1
_MAX_DROPS = 2**53


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""  # another system than Linux: no agent can be on it


class Links:
    """What all links share: where their frames go, and how far each host's link had come."""

    def __init__(self, fleet: Fleet, probes: Probes, ledger: Ledger, hub: Hub, aggregates: Aggregates) -> None:
        self.fleet = fleet
        self.probes = probes
        self.ledger = ledger
        self.hub = hub
        self.aggregates = aggregates
        self.positions: dict[str, LinkPosition] = {}
        self.boot_id = _boot_id()


class AgentLink:
    """One agent's link, from hello to its end. An ``AgentPort`` of the fleet. Belongs to one event loop.

    Attributes:
        host: the host's id; empty before hello.
        close_code: WebSocket close code, once it has ended.
        ended: set when it has.
    """

    def __init__(self, shared: Links) -> None:
        self._shared = shared
        self.host = ""
        self.close_code = 0
        self.ended = asyncio.Event()
        self._link_id = ""
        self._outgoing: deque[str] = deque()
        self._outgoing_bytes = 0
        self._wake = asyncio.Event()
        self._received = 0
        self._acked = 0
        self._ack_timer: asyncio.TimerHandle | None = None

    # --- what goes out ---

    def send(self, message: Model) -> None:
        if self.close_code:
            return
        text = m.encode(message)
        self._outgoing.append(text)
        self._outgoing_bytes += len(text)
        if self._outgoing_bytes > _MAX_QUEUE_BYTES:
            self._outgoing.clear()
            self.end(Unavailable("this agent does not read what it is sent"))
        self._wake.set()

    def end(self, error: TraplineError) -> None:
        if self.close_code:
            return
        self.send(m.LinkError(error=error.to_wire()))
        if isinstance(error, ProtocolError):
            self.close_code = CLOSE_MALFORMED
        elif isinstance(error, Conflict):
            self.close_code = CLOSE_REPLACED
        else:
            self.close_code = CLOSE_AWAY
        if self._ack_timer is not None:
            self._ack_timer.cancel()
            self._ack_timer = None
        self.ended.set()
        self._wake.set()

    async def take(self) -> list[str]:
        """Waits for text frames to send and returns them; empty when the link has ended and the last was taken."""
        while not self._outgoing and not self.close_code:
            self._wake.clear()
            await self._wake.wait()
        frames = list(self._outgoing)
        self._outgoing.clear()
        self._outgoing_bytes = 0
        return frames

    # --- what comes in ---

    async def text(self, frame: str) -> None:
        """Takes a text frame. Raises ProtocolError where it is malformed or out of place."""
        if len(frame) > m.MAX_TEXT_BYTES:
            raise ProtocolError(f"text frame of {len(frame)} characters")
        message = m.parse_agent_message(frame)
        if isinstance(message, m.Hello):
            await self._hello(message)
            return
        if not self.host:
            raise ProtocolError(f"`{message.type}` before `hello`")
        shared = self._shared
        shared.fleet.heard(self.host)
        if isinstance(message, m.Processes):
            shared.fleet.update_processes(self.host, message)
        elif isinstance(message, m.Observed):
            shared.probes.observe(self.host, message)
        elif isinstance(message, m.Reply):
            shared.fleet.answered(self.host, message)
        elif isinstance(message, m.LinkDrops):
            self._drops(message)

    async def _hello(self, hello: m.Hello) -> None:
        if self.host:
            raise ProtocolError("a second `hello`")
        if hello.protocol != m.PROTOCOL_VERSION:
            raise ProtocolError(
                f"the agent speaks protocol {hello.protocol}, this service {m.PROTOCOL_VERSION}",
                hint="upgrade the older one",
            )
        if not 0 < len(hello.instance_id) <= 64 or not 0 < len(hello.link_id) <= 64:
            raise ProtocolError("an instance id and a link id have 1 to 64 characters")
        shared = self._shared
        position = shared.positions.get(hello.instance_id)
        self.host = hello.instance_id
        self._link_id = hello.link_id
        self._received = position.link_seq if position is not None and position.link_id == hello.link_id else 0
        self._acked = self._received
        # First of all the welcome: from `connect` on anybody may send to this link.
        self.send(
            m.Welcome(
                host=self.host,
                heartbeat_s=shared.fleet.heartbeat_s,
                service_pid=os.getpid(),
                service_boot_id=shared.boot_id,
                last_link_seq=self._received,
            )
        )
        shared.fleet.connect(hello, self)
        self.send(shared.probes.desired_of(self.host))
        await shared.fleet.save(self.host)

    def _drops(self, message: m.LinkDrops) -> None:
        if not 0 < message.count <= _MAX_DROPS:
            raise ProtocolError(f"{message.count} drops")
        shared = self._shared
        if shared.ledger.knows(message.probe):
            shared.hub.publish(shared.ledger.link_drops(message.probe, self.host, message.stage, message.count))
            shared.probes.booked(message.probe)

    def binary(self, frame: bytes) -> None:
        """Takes a hit batch or an aggregate frame. Raises ProtocolError where it is malformed, out of place, or another
        host's."""
        if not self.host:
            raise ProtocolError("a hit batch before `hello`")
        if len(frame) > m.MAX_BINARY_BYTES:
            raise ProtocolError(f"hit batch of {len(frame)} bytes; {m.MAX_BINARY_BYTES} are the most")
        if len(frame) < m.LINK_SEQ_BYTES:
            raise ProtocolError(f"binary frame of {len(frame)} bytes is shorter than its link sequence")
        seq = int.from_bytes(frame[: m.LINK_SEQ_BYTES], "little")
        if not 0 < seq <= _MAX_LINK_SEQ:
            raise ProtocolError(f"link sequence {seq}")
        shared = self._shared
        position = LinkPosition(self.host, self._link_id, seq)
        body = frame[m.LINK_SEQ_BYTES :]
        # Read whole before anything is done about it.
        what = aggregates.decode(body) if aggregates.is_delta(body) else HitFrame(body, position)
        header: aggregates.Numbered = what if isinstance(what, aggregates.Delta) else what.header
        if header.host != self.host:
            raise ProtocolError(f"a hit batch of host {header.host} on the link of {self.host}")
        shared.fleet.heard(self.host)
        if seq > self._received:
            self._received = seq
            shared.positions[self.host] = position
            # Late hits of a probe that is gone are nobody's any more.
            if shared.ledger.knows(header.probe):
                self._take(what)
        self._acknowledge()

    def _take(self, what: HitFrame | aggregates.Delta) -> None:
        shared = self._shared
        if isinstance(what, aggregates.Delta):
            if not shared.aggregates.take(what):
                return  # it has been added before
            shared.hub.publish(shared.ledger.batch(what))
            shared.probes.booked(what.probe)
        else:
            shared.hub.publish([*shared.ledger.batch(what.header), what])
            shared.probes.booked(what.header.probe)

    def _acknowledge(self) -> None:
        if self._received - self._acked >= _ACK_BATCHES:
            self._ack_now()
        elif self._ack_timer is None:
            self._ack_timer = asyncio.get_running_loop().call_later(_ACK_S, self._ack_now)

    def _ack_now(self) -> None:
        if self._ack_timer is not None:
            self._ack_timer.cancel()
            self._ack_timer = None
        self._acked = self._received
        self.send(m.Ack(link_seq=self._received))

    async def gone(self) -> None:
        """The socket is closed, whoever closed it."""
        if self._ack_timer is not None:
            self._ack_timer.cancel()
            self._ack_timer = None
        if not self.close_code:
            self.close_code = CLOSE_AWAY
        self._wake.set()
        if self.host:
            self._shared.fleet.disconnect(self.host, self)
            await self._shared.fleet.save(self.host)
