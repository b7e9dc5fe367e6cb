"""The agents' WebSocket: bytes between the socket and ``link.AgentLink``, and nothing else."""

from __future__ import annotations

import asyncio
import logging

from fastapi import APIRouter, WebSocket, WebSocketDisconnect

from trapline.errors import ProtocolError, TraplineError, Unavailable
from trapline_service.api.sockets import admit, close, overdue, until_one_ends
from trapline_service.link import AgentLink
from trapline_service.service import Service

log = logging.getLogger(__name__)
router = APIRouter()

HELLO_TIMEOUT_S = 10.0


@router.websocket("/api/v1/agents/link")
async def agent_link(websocket: WebSocket) -> None:
    service: Service = websocket.app.state.service
    if await admit(websocket, service.tokens, None, []) is None:
        return
    await websocket.accept()
    link = service.new_link()
    try:
        await until_one_ends(_receive(websocket, link), _send(websocket, link), overdue(link.ended))
    finally:
        await link.gone()


async def _receive(websocket: WebSocket, link: AgentLink) -> None:
    try:
        async with asyncio.timeout(HELLO_TIMEOUT_S):
            await _frame(websocket, link)
        while True:
            await _frame(websocket, link)
    except TimeoutError:
        link.end(ProtocolError(f"no `hello` within {HELLO_TIMEOUT_S:g} s"))
    except ProtocolError as e:
        log.warning("link of %s: %s", link.host or "an agent without a name", e)
        link.end(e)
    except TraplineError as e:
        link.end(Unavailable(str(e)))
    # The sender says why and closes, or is overdue.
    await asyncio.Event().wait()


async def _frame(websocket: WebSocket, link: AgentLink) -> None:
    message = await websocket.receive()
    if message["type"] == "websocket.disconnect":
        raise WebSocketDisconnect(message.get("code", 1005))
    text = message.get("text")
    if text is not None:
        await link.text(text)
    else:
        link.binary(message["bytes"])


async def _send(websocket: WebSocket, link: AgentLink) -> None:
    while frames := await link.take():
        for frame in frames:
            await websocket.send_text(frame)
    await close(websocket, link.close_code)
