"""A bound on request bodies: they are read before anybody knows who sends them."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from trapline.model import Problem
from trapline_service.api.errors import problem_response

MAX_BODY_BYTES = 1024 * 1024
_DETAIL = f"a request body has {MAX_BODY_BYTES} bytes at most"


class BodyLimit:
    """ASGI middleware: 413 for a body beyond the bound, by its declared length or, without one, by what comes."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "0")
        if not declared.isdigit() or int(declared) > MAX_BODY_BYTES:
            problem = Problem(
                title="Content Too Large",
                status=413,
                detail=_DETAIL,
                code="content-too-large",
                hint="a probe is a line of text: is this meant for another service?",
            )
            await problem_response(problem)(scope, receive, send)
            return
        received = 0

        async def bounded() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > MAX_BODY_BYTES:
                raise HTTPException(413, _DETAIL)
            return message

        await self._app(scope, bounded, send)
