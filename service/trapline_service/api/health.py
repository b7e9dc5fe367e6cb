"""Is it alive, and can it work? For load balancers and orchestrators; no token."""

from __future__ import annotations

from fastapi import APIRouter

import trapline
from trapline.model import Model
from trapline_service.api.common import TheService
from trapline_service.api.errors import responses

router = APIRouter(tags=["health"])


class Health(Model):
    status: str = "ok"
    version: str = trapline.__version__


class Readiness(Model):
    status: str = "ok"
    hosts_online: int
    subscribers: int
    unrecorded_hits: int
    """Hits that were passed on live and not recorded, since the store was too slow or away."""


@router.get("/healthz", operation_id="getHealth", summary="The process answers")
async def get_health() -> Health:
    return Health()


@router.get(
    "/readyz", operation_id="getReadiness", summary="The store answers too", responses={503: responses(503)[503]}
)
async def get_readiness(service: TheService) -> Readiness:
    await service.store.ping()
    return Readiness(
        hosts_online=len(service.fleet.online()),
        subscribers=service.hub.subscribers,
        unrecorded_hits=service.recorder.unrecorded,
    )
