"""The built dashboard, and what every response says to a browser about safety."""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import FileResponse, PlainTextResponse, Response
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

STATIC = Path(__file__).parent / "static"
_HASHED = "assets/"
"""Vite puts files there whose names change with their content."""
_NOT_BUILT = """Trapline's service is running, but its dashboard was not built.

Build it once, in the checkout:

    make web            (or: cd web && npm ci && npm run build)

then reload this page. The wheel carries it built. The API is at /api/v1, its reference at /docs.
"""
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; object-src 'none'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


class SecurityHeaders:
    """ASGI middleware: ``HEADERS`` on every response, and no caching of what the API says."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        api = scope["path"].startswith("/api/")

        async def add(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(HEADERS)
                if api:
                    headers["Cache-Control"] = "no-store"
            await send(message)

        await self._app(scope, receive, add)


def install(app: FastAPI, static: Path = STATIC) -> None:
    """Serves the dashboard from a folder: its files by name, ``index.html`` for every other page of the application."""

    @app.get("/{path:path}", include_in_schema=False)
    def dashboard(path: str) -> Response:
        if path.startswith(("api/", "docs/")):
            raise HTTPException(404, "there is no such thing here")
        index = static / "index.html"
        if not index.is_file():
            if path:
                raise HTTPException(404, "there is no such thing here, and the dashboard was not built")
            return PlainTextResponse(_NOT_BUILT, 503)
        root = static.resolve()
        file = (static / path).resolve()
        if path and file.is_relative_to(root) and file.is_file():
            lasting = path.startswith(_HASHED)
            cache = "public, max-age=31536000, immutable" if lasting else "no-cache"
            return FileResponse(file, headers={"Cache-Control": cache})
        if path.startswith(_HASHED) or "." in path.rsplit("/", 1)[-1]:
            raise HTTPException(404, "there is no such file")
        return FileResponse(index, headers={"Cache-Control": "no-cache"})
