"""What probes' aggregates come to."""

from __future__ import annotations

import time
from datetime import datetime
from typing import Annotated

from fastapi import APIRouter, Query

from trapline.errors import NotFound, SpecError
from trapline.model import AggregateTable
from trapline_service.aggregates import BUCKET_S
from trapline_service.api.common import TheService
from trapline_service.api.errors import responses
from trapline_service.auth import Caller

router = APIRouter(prefix="/api/v1", tags=["aggregates"])

_MAX_POINTS = 1000


class RangeInvalid(SpecError):
    """A time, or a step, that there is no answer for."""

    code = "range-invalid"


Top = Annotated[int, Query(ge=1, le=10_000, description="How many rows, those with the most hits.")]
Since = Annotated[
    datetime | None,
    Query(description="Only hits from then on (RFC 3339), to ten seconds; without `until` up to now."),
]
Until = Annotated[datetime | None, Query(description="Only hits before then, to ten seconds.")]
Step = Annotated[
    int | None,
    Query(ge=BUCKET_S, description="With `since`: a series too, in steps of so many seconds, a multiple of ten."),
]


@router.get(
    "/probes/{probe}/aggregates",
    operation_id="getProbeAggregate",
    summary="What a probe's aggregate says so far, or of a time",
    responses=responses(404, 503),
)
async def get_probe_aggregate(
    _: Caller,
    service: TheService,
    probe: str,
    top: Top = 100,
    since: Since = None,
    until: Until = None,
    step: Step = None,
) -> AggregateTable:
    id = service.probes.get(probe).id
    if since is None:
        if until is not None or step is not None:
            raise RangeInvalid(
                "`until` and `step` go with `since`", hint="say from when on, such as since=2026-01-31T12:00:00Z"
            )
        found = service.aggregates.table(id, top)
    else:
        since_ns, until_ns = _ns(since), time.time_ns() if until is None else _ns(until)
        if until_ns <= since_ns:
            raise RangeInvalid("`until` is not after `since`")
        if step is not None and step % BUCKET_S:
            raise RangeInvalid(f"a step of {step} s is no multiple of {BUCKET_S} s")
        if step is not None and (until_ns - since_ns) / 1e9 / step > _MAX_POINTS:
            raise RangeInvalid(f"a series of more than {_MAX_POINTS} points", hint="take a larger step, or less time")
        found = await service.aggregates.between(id, since_ns, until_ns, step_s=step, top=top)
    if found is None:
        raise NotFound(
            f"probe `{probe}` has no aggregate",
            hint="its hits are at /hits; a probe with one is written `... -> count() by (comm)`",
        )
    return found


def _ns(at: datetime) -> int:
    if at.tzinfo is None:
        raise RangeInvalid("a time without a zone", hint="write it as 2026-01-31T12:00:00Z")
    return int(at.timestamp() * 1e9)
