"""The application: FastAPI around a ``Service``."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.responses import HTMLResponse

import trapline
from trapline.model import Problem
from trapline.protocol.messages import AgentMessage, ServiceMessage
from trapline.protocol.stream import ClientMessage, ServerMessage
from trapline_service import dashboard
from trapline_service.api import access, agents, aggregates, errors, health, hits, hosts, limits, live, probes, symbols
from trapline_service.config import Settings
from trapline_service.reference import reference_page
from trapline_service.service import Service
from trapline_service.store.base import Store
from trapline_service.store.sqlite import sqlite_store

DATABASE = "trapline.db"
_DESCRIPTION = """Uprobes as a service: dynamic tracing of running programs over HTTP, live in the browser.

Errors are `application/problem+json` (RFC 9457) with a stable `code`. Lists are paged by opaque tokens.

Live data comes over the WebSocket `/api/v1/stream`, subprotocol `trapline.v1.json` or `trapline.v1.binary`; its messages
are declared below as webhooks: `streamClient` is what a client may send, `streamServer` what it gets.
"""
_TAGS = [
    {"name": "probes", "description": "What is to be traced, and how that goes."},
    {"name": "hits", "description": "Recorded hits."},
    {"name": "aggregates", "description": "What hits add up to, where a probe counts them at the source."},
    {"name": "hosts", "description": "Hosts and what runs there."},
    {"name": "symbols", "description": "Functions by name."},
    {"name": "access", "description": "Tokens and tickets."},
    {"name": "health", "description": "For load balancers."},
    {"name": "sockets", "description": "Messages of the two WebSockets."},
]


def create_app(settings: Settings | None = None, store: Store | None = None) -> FastAPI:
    """Returns the application; its lifespan runs the service, which is at ``app.state.service`` while it does.

    Args:
        settings: None: from the environment.
        store: None: the SQLite file in the state directory. The lifespan opens and closes it, and raises where it cannot.
    """
    settings = settings or Settings()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with Service(settings, store or sqlite_store(settings.state_dir / DATABASE)) as service:
            app.state.service = service
            yield

    app = FastAPI(
        title="Trapline",
        version=trapline.__version__,
        description=_DESCRIPTION,
        license_info={"name": "GPL-2.0-or-later", "identifier": "GPL-2.0-or-later"},
        openapi_tags=_TAGS,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    app.add_middleware(limits.BodyLimit)
    app.add_middleware(dashboard.SecurityHeaders)
    errors.install(app)
    for module in (access, hosts, symbols, probes, hits, aggregates, health, agents, live):
        app.include_router(module.router)
    _declare_messages(app)
    app.openapi = lambda: _schema(app)  # type: ignore[method-assign]

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(reference_page(app.openapi()))

    # Last of all, since it answers to every path.
    dashboard.install(app)
    return app


def _declare_messages(app: FastAPI) -> None:
    """Puts the WebSockets' messages into the schema, so that clients can be generated from it."""

    @app.webhooks.post(
        "stream-client", operation_id="streamClient", tags=["sockets"], summary="A client's messages on /api/v1/stream"
    )
    def stream_client(body: ClientMessage) -> None: ...

    @app.webhooks.post(
        "stream-server",
        operation_id="streamServer",
        tags=["sockets"],
        summary="The service's messages on /api/v1/stream",
        response_model=ServerMessage,
    )
    def stream_server() -> None: ...

    @app.webhooks.post(
        "link-agent",
        operation_id="linkAgent",
        tags=["sockets"],
        summary="An agent's messages on /api/v1/agents/link",
        response_model=AgentMessage,
    )
    def link_agent() -> None: ...

    @app.webhooks.post(
        "link-service",
        operation_id="linkService",
        tags=["sockets"],
        summary="The service's messages on /api/v1/agents/link",
        response_model=ServiceMessage,
    )
    def link_service() -> None: ...


def _schema(app: FastAPI) -> dict[str, Any]:
    if app.openapi_schema is None:
        schema = get_openapi(
            title=app.title,
            version=app.version,
            description=app.description,
            license_info=app.license_info,
            tags=app.openapi_tags,
            routes=app.routes,
            webhooks=app.webhooks.routes,
        )
        problem = Problem.model_json_schema(mode="serialization", ref_template="#/components/schemas/{model}")
        schemas = schema["components"]["schemas"]
        schemas["Problem"] = problem
        # A webhook's own validation error means nothing here: these messages never cross HTTP.
        del schema["webhooks"]["stream-client"]["post"]["responses"]["422"]
        for name in ("HTTPValidationError", "ValidationError"):
            schemas.pop(name, None)
        app.openapi_schema = schema
    return app.openapi_schema
