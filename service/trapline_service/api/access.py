"""Who the caller is, and tickets for a browser's WebSocket."""

from __future__ import annotations

from fastapi import APIRouter

from trapline.model import Model
from trapline_service.api.common import TheService
from trapline_service.api.errors import responses
from trapline_service.auth import Caller

router = APIRouter(prefix="/api/v1", tags=["access"])


class Me(Model):
    name: str
    role: str


class StreamTicket(Model):
    ticket: str
    """For ``/api/v1/stream?ticket=``; good once."""
    expires_in_s: float


@router.get("/me", operation_id="getMe", summary="Who this token speaks for", responses=responses())
async def get_me(caller: Caller) -> Me:
    return Me(name=caller.name, role=caller.role)


@router.post(
    "/stream-tickets",
    operation_id="createStreamTicket",
    summary="A ticket with which a browser opens /api/v1/stream",
    status_code=201,
    responses=responses(),
)
async def create_stream_ticket(caller: Caller, service: TheService) -> StreamTicket:
    return StreamTicket(ticket=service.tickets.issue(caller), expires_in_s=service.tickets.ttl_s)
