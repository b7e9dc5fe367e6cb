"""What the two WebSockets share: who may open them, and two directions that end together."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from fastapi import WebSocket, WebSocketDisconnect
from starlette.websockets import WebSocketDisconnected

from trapline.errors import AuthError
from trapline_service.api.errors import problem_of, problem_response
from trapline_service.auth import Principal, Tickets, Tokens, socket_principal

CLOSE_TIMEOUT_S = 2.0


async def admit(
    websocket: WebSocket, tokens: Tokens, tickets: Tickets | None, allowed_origins: list[str]
) -> Principal | None:
    """Checks who opens a socket; answers 401 or 403 with a problem, in place of accepting, and returns None."""
    try:
        return await socket_principal(websocket, tokens, tickets, allowed_origins)
    except AuthError as e:
        await websocket.send_denial_response(problem_response(problem_of(e)))
        return None


async def until_one_ends(*directions: Coroutine[Any, Any, None]) -> None:
    """Runs a socket's directions until one of them ends, and cancels the others; a lost socket is a normal end."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(direction) for direction in directions]
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                task.cancel()
    except* (WebSocketDisconnect, WebSocketDisconnected):
        pass


async def overdue(ended: asyncio.Event) -> None:
    """A direction that ends two seconds after the event: a peer that reads nothing must not keep its socket for that."""
    await ended.wait()
    await asyncio.sleep(CLOSE_TIMEOUT_S)


async def close(websocket: WebSocket, code: int, reason: str = "") -> None:
    """Closes a socket that may be closed already. Close reasons have 123 bytes at most (RFC 6455, section 5.5)."""
    try:
        await websocket.close(code, reason.encode()[:120].decode(errors="ignore"))
    except (WebSocketDisconnect, WebSocketDisconnected, RuntimeError):
        pass  # the peer was faster
