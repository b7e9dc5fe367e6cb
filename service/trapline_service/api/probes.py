"""Probes: create, dry run, list, look at, take out."""

from __future__ import annotations

from fastapi import APIRouter, Response

from trapline.model import CoverageLog, Model, Probe, ProbeCreate, Resolution, Target
from trapline_service.api.common import PageSize, PageToken, TheService, page
from trapline_service.api.errors import responses
from trapline_service.auth import Caller

router = APIRouter(prefix="/api/v1", tags=["probes"])


class ProbePage(Model):
    items: list[Probe]
    next_page_token: str | None = None


class TargetList(Model):
    items: list[Target]


class CoverageLogs(Model):
    items: list[CoverageLog]
    """One per host that the probe is on; with ``error`` where it could not answer."""


@router.post(
    "/probes",
    operation_id="createProbe",
    summary="Put a probe on all hosts that it is for",
    status_code=201,
    responses={
        201: {"headers": {"Location": {"description": "The probe's URL.", "schema": {"type": "string"}}}},
        **responses(409, 503),
    },
)
async def create_probe(caller: Caller, service: TheService, body: ProbeCreate, response: Response) -> Probe:
    probe = await service.probes.create(body, by=caller.name)
    response.headers["Location"] = f"/api/v1/probes/{probe.id}"
    return probe


@router.post(
    "/probes:resolve",
    operation_id="resolveProbe",
    summary="What a probe would mean on each host; nothing is armed",
    responses=responses(503),
)
async def resolve_probe(_: Caller, service: TheService, body: ProbeCreate) -> Resolution:
    return await service.probes.resolve(body)


@router.get("/probes", operation_id="listProbes", summary="All probes, oldest first", responses=responses())
async def list_probes(
    _: Caller, service: TheService, page_size: PageSize = 1000, page_token: PageToken = ""
) -> ProbePage:
    items, token = page(service.probes.all(), lambda p: p.id, page_size, page_token)
    return ProbePage(items=items, next_page_token=token)


@router.get("/probes/{probe}", operation_id="getProbe", summary="One probe, by id or name", responses=responses(404))
async def get_probe(_: Caller, service: TheService, probe: str) -> Probe:
    return service.probes.get(probe)


@router.delete(
    "/probes/{probe}",
    operation_id="deleteProbe",
    summary="Take a probe out; it is gone when every online agent has confirmed",
    status_code=202,
    responses=responses(404, 503),
)
async def delete_probe(_: Caller, service: TheService, probe: str) -> Probe:
    return await service.probes.delete(probe)


@router.get(
    "/probes/{probe}/targets",
    operation_id="listTargets",
    summary="Where a probe is, and where it is not and why",
    responses=responses(404),
)
async def list_targets(_: Caller, service: TheService, probe: str) -> TargetList:
    return TargetList(items=service.probes.targets(probe))


@router.get(
    "/probes/{probe}/coverage",
    operation_id="getCoverage",
    summary="When a probe was armed in which process, who told of it, and whether calls may have been missed",
    responses=responses(404),
)
async def get_coverage(_: Caller, service: TheService, probe: str) -> CoverageLogs:
    return CoverageLogs(items=await service.probes.coverage(probe))
