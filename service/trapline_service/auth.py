"""Who may speak: the admin token, and the tickets with which a browser opens its WebSocket.

A token is 256 random bits, so a plain SHA-256 at rest is right (slow hashes protect guessable passwords). It is looked
up by its first characters and compared in constant time. The token itself is returned once, when it is made.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import secrets
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, NoReturn
from urllib.parse import urlsplit

from fastapi import Depends, Request, WebSocket
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from trapline.errors import AuthError
from trapline.ids import new_id
from trapline_service.config import TOKEN_PATTERN
from trapline_service.store.base import Store, TokenRecord

log = logging.getLogger(__name__)

ADMIN = "admin"
_PREFIX_CHARS = 12
_MAX_TICKETS = 4096
_HINT = "send `Authorization: Bearer TOKEN` with the token that the service printed at its first start"


@dataclass(frozen=True)
class Principal:
    """Who a token speaks for."""

    name: str
    role: str


class OriginRefused(AuthError):
    """A page of another site wanted to open a WebSocket."""

    code = "origin-refused"


def new_token() -> str:
    """Returns a new token: ``tlp_`` and 256 random bits in base64url."""
    return "tlp_" + secrets.token_urlsafe(32)


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


class Tokens:
    """Tokens in the store."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def prepare(self, given: str | None) -> str | None:
        """Makes sure that there is an admin token.

        Args:
            given: the one to accept from now on in place of the stored one; None: whatever is stored.

        Returns:
            The token when one was made, for its owner to see this once; None when one was there or was given.
        """
        if given is not None:
            try:
                await self.check(given)
            except AuthError:
                await self._keep(given)
            return None
        if await self._store.has_tokens():
            return None
        token = new_token()
        await self._keep(token)
        return token

    async def _keep(self, token: str) -> None:
        record = TokenRecord(new_id("tok"), ADMIN, ADMIN, token[:_PREFIX_CHARS], _digest(token), datetime.now(UTC))
        await self._store.put_token(record)

    async def check(self, token: str) -> Principal:
        """Raises AuthError for a token that is not known."""
        if TOKEN_PATTERN.match(token):
            digest = _digest(token)
            for record in await self._store.tokens(token[:_PREFIX_CHARS]):
                if hmac.compare_digest(record.digest, digest):
                    return Principal(record.name, record.role)
        raise AuthError("this token is not known here", hint=_HINT)


class Tickets:
    """Short-lived, single-use stand-ins for a token, for the one place where a browser cannot send a header.

    They are kept in memory alone: after a restart a browser asks for a new one, as it does after each lost socket.
    """

    def __init__(self, ttl_s: float) -> None:
        """``ttl_s``: seconds for which a ticket can be redeemed."""
        self.ttl_s = ttl_s
        self._open: dict[str, tuple[Principal, float]] = {}

    def issue(self, principal: Principal) -> str:
        now = time.monotonic()
        while self._open:
            # Insertion order is expiry order.
            oldest, (_, expires) = next(iter(self._open.items()))
            if expires > now and len(self._open) < _MAX_TICKETS:
                break
            del self._open[oldest]
        ticket = "tlt_" + secrets.token_urlsafe(32)
        self._open[ticket] = (principal, now + self.ttl_s)
        return ticket

    def redeem(self, ticket: str) -> Principal:
        """Raises AuthError for a ticket that is unknown, used or expired."""
        principal, expires = self._open.pop(ticket, (None, 0.0))
        if principal is None or expires < time.monotonic():
            raise AuthError(
                "this stream ticket is unknown, used or expired", hint="get a new one: POST /api/v1/stream-tickets"
            )
        return principal


_bearer = HTTPBearer(
    auto_error=False, scheme_name="token", description="The token that the service printed at its first start."
)


async def require_token(
    request: Request, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]
) -> Principal:
    """FastAPI dependency: who asks. Raises AuthError."""
    tokens: Tokens = request.app.state.service.tokens
    if credentials is None:
        _no_credential()
    return await tokens.check(credentials.credentials)


Caller = Annotated[Principal, Depends(require_token)]


def _no_credential() -> NoReturn:
    raise AuthError("this needs a token", hint=_HINT)


async def socket_principal(
    websocket: WebSocket, tokens: Tokens, tickets: Tickets | None, allowed_origins: list[str]
) -> Principal:
    """Says who opens a WebSocket, before it is accepted.

    Args:
        websocket: not accepted yet.
        tokens: to check a bearer header.
        tickets: to redeem ``?ticket=``; None where tickets are no credential.
        allowed_origins: origins beside the service's own.

    Raises:
        AuthError: no credential, or a wrong one.
        OriginRefused: a browser, on a page of another origin.
    """
    origin = websocket.headers.get("origin")
    # Programs send no Origin, browsers always do and cannot change it (RFC 6455, section 10.2).
    own = websocket.headers.get("host", "").lower()
    if origin is not None and origin not in allowed_origins and urlsplit(origin).netloc.lower() != own:
        raise OriginRefused(
            f"pages of {origin} may not open this WebSocket", hint="add the origin to TRAPLINE_ALLOWED_ORIGINS"
        )
    scheme, _, token = websocket.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return await tokens.check(token.strip())
    ticket = websocket.query_params.get("ticket")
    if tickets is not None and ticket is not None:
        return tickets.redeem(ticket)
    _no_credential()
