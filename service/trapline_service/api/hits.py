"""Recorded hits."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query

from trapline.errors import NotFound
from trapline.model import Hit, Model
from trapline_service.api.common import PageTokenInvalid, TheService, decode_token, encode_token
from trapline_service.api.errors import responses
from trapline_service.auth import Caller
from trapline_service.recorder import Order
from trapline_service.service import Service

router = APIRouter(prefix="/api/v1", tags=["hits"])

Limit = Annotated[int, Query(ge=1, le=10_000, description="How many, of the newest.")]
BeforeSeq = Annotated[int | None, Query(ge=0, description="Only hits with a smaller sequence number.")]
Older = Annotated[str, Query(description="`next_page_token` of a page: the hits before it.")]
OfHost = Annotated[str, Query(description="Of this host alone: id or name.")]


class HitPage(Model):
    items: list[Hit]
    """Newest last."""
    next_page_token: str | None = None
    """For the hits before these; null: there are none."""


@router.get(
    "/probes/{probe}/hits",
    operation_id="listProbeHits",
    summary="Recorded hits of a probe",
    responses=responses(404, 503),
)
async def list_probe_hits(
    _: Caller,
    service: TheService,
    probe: str,
    limit: Limit = 100,
    host: OfHost = "",
    before_seq: BeforeSeq = None,
    page_token: Older = "",
) -> HitPage:
    return await _query(service, service.probes.get(probe).id, host, limit, before_seq, page_token)


@router.get("/hits", operation_id="listHits", summary="Recorded hits of all probes", responses=responses(404, 503))
async def list_hits(
    _: Caller,
    service: TheService,
    probe: Annotated[str, Query(description="Of this probe alone: id or name, or the id of one that is gone.")] = "",
    host: OfHost = "",
    limit: Limit = 100,
    before_seq: BeforeSeq = None,
    page_token: Older = "",
) -> HitPage:
    id: str | None = None
    if probe:
        try:
            id = service.probes.get(probe).id
        except NotFound:
            # What a probe recorded outlives it, for as long as the retention says.
            if not probe.startswith("prb_"):
                raise
            id = probe
    return await _query(service, id, host, limit, before_seq, page_token)


async def _query(
    service: Service, probe: str | None, host: str, limit: int, before_seq: int | None, token: str
) -> HitPage:
    service.hub.flush()  # what came in since the last tick is history too
    found = await service.recorder.query(
        probe=probe,
        host=service.fleet.member(host).host.id if host else None,
        before=_order(token) if token else None,
        before_seq=before_seq,
        limit=limit,
    )
    return HitPage(items=found.hits, next_page_token=encode_token(found.before) if found.before else None)


def _order(token: str) -> Order:
    match decode_token(token):
        case [int(ns), str(probe), str(host), str(source), int(seq)] if abs(ns) < 2**63 and abs(seq) < 2**63:
            return ns, probe, host, source, seq
        case _:
            raise PageTokenInvalid("this page token is of another list", hint="leave it out to begin anew")
