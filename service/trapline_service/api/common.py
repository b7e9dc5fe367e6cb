"""What the resources share: the service they translate for, and pages of lists."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Callable, Sequence
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Query, Request

from trapline.errors import SpecError
from trapline_service.service import Service

T = TypeVar("T")


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


TheService = Annotated[Service, Depends(_service)]
PageSize = Annotated[int, Query(ge=1, le=1000, description="How many items a page has at most.")]
PageToken = Annotated[str, Query(description="`next_page_token` of the page before; opaque.")]


class PageTokenInvalid(SpecError):
    """A page token that this API did not give."""

    code = "page-token-invalid"


def encode_token(value: Any) -> str:
    """Returns a JSON value as an opaque token."""
    return base64.urlsafe_b64encode(json.dumps(value, separators=(",", ":")).encode()).decode().rstrip("=")


def decode_token(token: str) -> Any:
    """Returns what ``encode_token`` was given. Raises PageTokenInvalid."""
    try:
        return json.loads(base64.urlsafe_b64decode(token + "=" * (-len(token) % 4)))
    except (binascii.Error, ValueError, RecursionError):
        raise PageTokenInvalid(
            "this page token is not one of ours", hint="leave it out to begin with the first page"
        ) from None


def page(items: Sequence[T], key: Callable[[T], str], size: int, token: str) -> tuple[list[T], str | None]:
    """Returns the items after the one that a token names, and the next token; ``items`` are in the order of ``key``."""
    rest = list(items)
    if token:
        after = decode_token(token)
        if not isinstance(after, str):
            raise PageTokenInvalid("this page token is of another list", hint="leave it out to begin anew")
        rest = [item for item in rest if key(item) > after]
    shown = rest[:size]
    return shown, encode_token(key(shown[-1])) if len(rest) > size else None
