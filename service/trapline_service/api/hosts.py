"""Hosts, their processes, and the files these map."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query
from pydantic import ValidationError

from trapline.errors import ProtocolError
from trapline.model import FrameNames, Host, Model, Module, Process, Symbolize
from trapline_service.api.common import PageSize, PageToken, TheService, page
from trapline_service.api.errors import responses
from trapline_service.auth import Caller

router = APIRouter(prefix="/api/v1", tags=["hosts"])


class HostPage(Model):
    items: list[Host]
    next_page_token: str | None = None


class ProcessPage(Model):
    items: list[Process]
    next_page_token: str | None = None


class ModuleList(Model):
    items: list[Module]


class _Modules(Model):
    modules: list[Module]


@router.get("/hosts", operation_id="listHosts", summary="All hosts, online or not", responses=responses())
async def list_hosts(_: Caller, service: TheService, page_size: PageSize = 100, page_token: PageToken = "") -> HostPage:
    items, token = page(service.fleet.hosts(), lambda h: h.id, page_size, page_token)
    return HostPage(items=items, next_page_token=token)


@router.get("/hosts/{host}", operation_id="getHost", summary="One host, by id or name", responses=responses(404, 409))
async def get_host(_: Caller, service: TheService, host: str) -> Host:
    return service.fleet.member(host).host


@router.get(
    "/hosts/{host}/processes",
    operation_id="listProcesses",
    summary="What runs on a host, as its agent last reported; what can be probed first",
    responses=responses(404, 409),
)
async def list_processes(
    _: Caller,
    service: TheService,
    host: str,
    filter: Annotated[str, Query(description="Text in comm, exe or command line, or a pid.")] = "",
    page_size: PageSize = 1000,
    page_token: PageToken = "",
) -> ProcessPage:
    wanted = filter.lower()
    found = [p for p in service.fleet.member(host).processes.values() if not wanted or _fits(p, wanted)]
    items, token = page(sorted(found, key=_process_key), _process_key, page_size, page_token)
    return ProcessPage(items=items, next_page_token=token)


def _process_key(process: Process) -> str:
    # What can be probed comes first: kernel threads alone would fill the first page.
    return f"{0 if process.eligible else 1} {process.pid:020d} {process.id}"


def _fits(process: Process, wanted: str) -> bool:
    texts = (process.comm, process.exe, process.cmdline)
    return str(process.pid) == wanted or any(wanted in text.lower() for text in texts)


@router.get(
    "/hosts/{host}/modules",
    operation_id="listModules",
    summary="Files that are mapped executable on a host",
    responses=responses(404, 409, 502, 503),
)
async def list_modules(
    _: Caller,
    service: TheService,
    host: str,
    pid: Annotated[int, Query(ge=0, description="Of this process alone; 0: of all.")] = 0,
) -> ModuleList:
    answer = await service.fleet.ask(host, "modules", {"pid": pid})
    try:
        return ModuleList(items=_Modules.model_validate(answer).modules)
    except ValidationError as e:
        raise ProtocolError(f"host {host} gave an answer that cannot be read: {e.error_count()} errors") from e


@router.post(
    "/hosts/{host}:symbolize",
    operation_id="symbolize",
    summary="The functions of stacks' frames, as the host's files have them now",
    responses=responses(404, 409, 502, 503),
)
async def symbolize(_: Caller, service: TheService, host: str, question: Symbolize) -> FrameNames:
    answer = await service.fleet.ask(host, "symbolize", question.model_dump(mode="json"))
    try:
        found = FrameNames.model_validate(answer)
    except ValidationError as e:
        raise ProtocolError(f"host {host} gave an answer that cannot be read: {e.error_count()} errors") from e
    if len(found.names) != len(question.frames):
        raise ProtocolError(f"host {host} named {len(found.names)} of {len(question.frames)} frames")
    return found
