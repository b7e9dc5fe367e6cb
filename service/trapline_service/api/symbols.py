"""Symbol search, asked of the hosts themselves."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Query
from pydantic import ValidationError

from trapline.errors import ProtocolError, TraplineError
from trapline.model import Model, SymbolPage
from trapline_service.api.common import TheService
from trapline_service.api.errors import responses
from trapline_service.auth import Caller
from trapline_service.service import Service

router = APIRouter(prefix="/api/v1", tags=["symbols"])


class SymbolSearch(Model):
    items: list[SymbolPage]
    """One per host that was asked; with ``error`` where it could not answer."""


@router.get(
    "/symbols",
    operation_id="searchSymbols",
    summary="Functions by name, on one host or on all that are online",
    responses=responses(404, 409),
)
async def search_symbols(
    _: Caller,
    service: TheService,
    q: Annotated[str, Query(max_length=512, description="Part of the name, or a glob.")] = "",
    host: Annotated[str, Query(description="Id or name; empty: all that are online.")] = "",
    module: Annotated[str, Query(max_length=4096, description="Path, basename or soname; empty: all mapped.")] = "",
    limit: Annotated[int, Query(ge=1, le=1000, description="Symbols per host.")] = 50,
) -> SymbolSearch:
    hosts = [service.fleet.member(host).host.id] if host else service.fleet.online()
    params: dict[str, Any] = {"module": module, "q": q, "limit": limit}
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(_ask(service, id, params)) for id in hosts]
    return SymbolSearch(items=[task.result() for task in tasks])


async def _ask(service: Service, host: str, params: dict[str, Any]) -> SymbolPage:
    try:
        return SymbolPage.model_validate(await service.fleet.ask(host, "symbols", params) | {"host": host})
    except TraplineError as e:
        return SymbolPage(host=host, module=str(params["module"]), error=e.to_wire())
    except ValidationError:
        error = ProtocolError("the host gave an answer that cannot be read", hint="is its agent of the same release?")
        return SymbolPage(host=host, module=str(params["module"]), error=error.to_wire())
