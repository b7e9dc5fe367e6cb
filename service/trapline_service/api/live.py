"""The WebSocket for people and programs: many subscriptions on one socket, each message typed by ``protocol.stream``."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, WebSocket, WebSocketDisconnect

from trapline.errors import ProtocolError, TraplineError
from trapline.protocol.stream import (
    BINARY_SUBPROTOCOL,
    JSON_SUBPROTOCOL,
    Pause,
    Resume,
    Subscribe,
    parse_client_message,
)
from trapline_service import aggregates, fleet, probes
from trapline_service.api.sockets import admit, close, overdue, until_one_ends
from trapline_service.hub import Subscriber
from trapline_service.service import Service

router = APIRouter()

MAX_MESSAGE_CHARS = 64 * 1024
_CLOSE_GOING_AWAY = 1001


@router.websocket("/api/v1/stream")
async def stream(websocket: WebSocket) -> None:
    service: Service = websocket.app.state.service
    if await admit(websocket, service.tokens, service.tickets, service.settings.allowed_origins) is None:
        return
    offered = websocket.scope["subprotocols"]
    chosen = next((p for p in offered if p in (JSON_SUBPROTOCOL, BINARY_SUBPROTOCOL)), None)
    # A client that names no subprotocol, such as websocat, gets JSON.
    await websocket.accept(chosen)
    subscriber = service.new_subscriber(binary=chosen == BINARY_SUBPROTOCOL)
    service.hub.join(subscriber)
    try:
        await until_one_ends(
            _receive(websocket, service, subscriber), _send(websocket, subscriber), overdue(subscriber.ended)
        )
    finally:
        service.hub.leave(subscriber)


async def _send(websocket: WebSocket, subscriber: Subscriber) -> None:
    while frames := await subscriber.take():
        for frame in frames:
            if isinstance(frame, str):
                await websocket.send_text(frame)
            else:
                await websocket.send_bytes(frame)
    await close(websocket, _CLOSE_GOING_AWAY)


async def _receive(websocket: WebSocket, service: Service, subscriber: Subscriber) -> None:
    while True:
        message = await websocket.receive()
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(message.get("code", 1005))
        id = ""
        try:
            text = message.get("text")
            if text is None:
                raise ProtocolError("a client sends JSON text frames, not binary ones")
            if len(text) > MAX_MESSAGE_CHARS:
                raise ProtocolError(f"a message of {len(text)} characters; {MAX_MESSAGE_CHARS} are the most")
            request = parse_client_message(text)
            id = request.id
            if isinstance(request, Subscribe):
                _subscribe(service, subscriber, request)
            elif isinstance(request, Pause):
                service.hub.flush()  # what came before the request is not paused
                subscriber.pause(id)
            elif isinstance(request, Resume):
                service.hub.flush()
                subscriber.resume(id)
            else:
                subscriber.unsubscribe(id)
        except TraplineError as e:
            subscriber.refuse(e, id)
        if subscriber.closed:
            # The sender says good-bye and closes, or is overdue.
            await asyncio.Event().wait()


def _subscribe(service: Service, subscriber: Subscriber, request: Subscribe) -> None:
    service.hub.flush()  # what came before the request is not for it
    subscription = subscriber.subscribe(request)
    if request.topic == "probes":
        for probe in service.probes.all():
            if subscriber.concerns(subscription, probe.id):
                subscriber.tell(subscription, probe.id, probes.status_fields(probe))
    elif request.topic == "hosts":
        for host in service.fleet.hosts():
            if subscriber.concerns(subscription, host.id):
                subscriber.tell(subscription, host.id, fleet.status_fields(host))
    elif request.topic == "aggregates":
        for probe in service.probes.all():
            if probe.spec.aggregate is not None and subscriber.concerns(subscription, probe.id):
                table = service.aggregates.table(probe.id, aggregates.LIVE_ROWS)
                if table is not None:
                    subscriber.tell(subscription, probe.id, aggregates.status_fields(table))
