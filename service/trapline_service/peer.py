"""Errors that an agent reports, read with the care that anything from a peer needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from trapline.errors import TraplineError


class _WireError(BaseModel):
    model_config = ConfigDict(extra="ignore")

    code: str = ""
    detail: str = "the agent gave no reason"
    hint: str = ""
    reason: str = ""
    suggestions: list[str] = []
    pointer: str = ""
    text: str = ""
    position: int | None = None


def peer_error(fields: Mapping[str, Any]) -> TraplineError:
    """Returns the error that an agent described with ``TraplineError.to_wire``; never raises."""
    try:
        return TraplineError.from_wire(_WireError.model_validate(fields).model_dump())
    except ValidationError:
        return TraplineError("the agent reported an error that cannot be read", hint="is it of the same release?")
