"""Errors as RFC 9457 problems: the one place that knows which code is which HTTP status."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from trapline.errors import TraplineError
from trapline.model import Problem
from trapline_service.probes import ProbeRefused

MEDIA_TYPE = "application/problem+json"
STATUS = {
    "spec-invalid": 422,
    "not-found": 404,
    "ambiguous": 422,
    "no-debug-info": 422,
    "resolve-failed": 422,
    "unsupported": 422,
    "permission-denied": 422,
    "target-gone": 422,
    "engine-failed": 422,
    "conflict": 409,
    "unavailable": 503,
    "unauthorized": 401,
    "origin-refused": 403,
    "protocol-error": 502,
    "page-token-invalid": 422,
    "range-invalid": 422,
    "error": 500,
}
"""Status by ``TraplineError.code``. 401 and 403 speak of this API alone: what a *host* does not permit is 422."""
_HTTP_CODES = {400: "request-invalid", 404: "not-found", 405: "method-not-allowed", 413: "content-too-large"}
"""For what FastAPI itself refuses. Not http.HTTPStatus' phrases, which change from one Python to the next."""
_RETRY_AFTER_S = 2


def problem_response(problem: Problem) -> Response:
    """Returns a problem as a response, with the headers that its status asks for."""
    headers = {}
    if problem.status == 401:
        headers["WWW-Authenticate"] = 'Bearer realm="trapline"'
    if problem.status == 503:
        headers["Retry-After"] = str(_RETRY_AFTER_S)
    return Response(problem.model_dump_json(), problem.status, headers, MEDIA_TYPE)


def problem_of(error: TraplineError, status: int | None = None) -> Problem:
    """Returns an error as a problem; ``status`` overrides the one of its code."""
    status = status or STATUS.get(error.code, 500)
    errors: list[dict[str, Any]] = []
    if error.pointer:
        errors.append({"pointer": error.pointer, "detail": error.detail})
    return Problem(
        type=f"urn:trapline:error:{error.code}",
        title=error.code.replace("-", " ").capitalize(),
        status=status,
        detail=error.detail,
        code=error.code,
        reason=error.reason,
        hint=error.hint,
        suggestions=error.suggestions,
        caret=error.caret(),
        errors=errors,
    )


def _invalid(error: RequestValidationError) -> Problem:
    errors = []
    for each in error.errors():
        where, *path = each["loc"]
        pointer = "".join(f"/{str(p).replace('~', '~0').replace('/', '~1')}" for p in path)
        found: dict[str, Any] = {"detail": each["msg"]}
        if where == "body":
            found["pointer"] = pointer
        else:
            found["parameter"] = pointer.removeprefix("/")
        errors.append(found)
    first = errors[0]
    place = first.get("pointer") or first.get("parameter") or "the body"
    return Problem(
        type="urn:trapline:error:request-invalid",
        title="Request invalid",
        status=422,
        detail=f"the request cannot be read: {place}: {first['detail']}",
        code="request-invalid",
        hint="see /docs for what it takes",
        errors=errors,
    )


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Returns the ``responses`` of an operation that may fail so; 401 and 422 come with every one."""
    return {
        status: {
            "description": HTTPStatus(status).phrase,
            "content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}},
        }
        for status in sorted({401, 422, *statuses})
    }


def install(app: FastAPI) -> None:
    """Makes every error that leaves the application a problem."""

    @app.exception_handler(TraplineError)
    async def _ours(_request: Request, error: TraplineError) -> Response:
        return problem_response(problem_of(error))

    @app.exception_handler(ProbeRefused)
    async def _refused(_request: Request, refused: ProbeRefused) -> Response:
        return problem_response(problem_of(refused.error, 422))

    @app.exception_handler(RequestValidationError)
    async def _validation(_request: Request, error: RequestValidationError) -> Response:
        return problem_response(_invalid(error))

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> Response:
        code = _HTTP_CODES.get(error.status_code, f"http-{error.status_code}")
        response = problem_response(
            Problem(
                type="about:blank",
                title=code.replace("-", " ").capitalize(),
                status=error.status_code,
                detail=f"{request.method} {request.url.path}: {error.detail}",
                code=code,
                hint="see /docs for what there is",
            )
        )
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def _bug(request: Request, error: Exception) -> Response:
        # Starlette raises it again after this, and the server logs it with its trace.
        return problem_response(
            Problem(
                type="urn:trapline:error:internal",
                title="Internal error",
                status=500,
                detail=f"{request.method} {request.url.path} failed: {type(error).__name__}",
                code="internal",
                hint="the service's log has the trace; please report it",
            )
        )
