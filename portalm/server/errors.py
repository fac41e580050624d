"""Errors as OpenAI's error object."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from portalm.errors import (
    CompilersBusy,
    EngineDead,
    EngineNotReady,
    InvalidRequest,
    PortaLMError,
    QueueTimeout,
)
from portalm.server.responses_store import ResponseUnknown, StoreFull
from portalm.server.state import Draining, ModelUnknown, Overloaded

_CLIENT_LEFT = 499
"""As nginx counts it; HTTP has no status for an answer that nobody waits for."""

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}


_MAX_MESSAGE = 2000
"""Characters."""


def error_object(
    status: int, message: str, *, param: str | None = None, code: str | None = None
) -> dict[str, dict[str, str | None]]:
    """The body of an error response."""
    kind = _TYPES.get(status, "internal_server_error")
    if len(message) > _MAX_MESSAGE:  # it quotes what the client sent
        message = f"{message[:_MAX_MESSAGE]}..."
    error = {"message": message, "type": kind, "param": param, "code": code}
    return {"error": {name: _printable(value) for name, value in error.items()}}


def _printable(text: str | None) -> str | None:
    """`text` without halves of surrogate pairs, which cannot be sent."""
    return text and text.encode("utf-8", "backslashreplace").decode()


def error_response(
    status: int, message: str, *, param: str | None = None, code: str | None = None
) -> JSONResponse:
    """An error response; one that may be tried again says when."""
    headers = {"Retry-After": "1"} if status in (429, 503) else None
    return JSONResponse(
        error_object(status, message, param=param, code=code), status, headers=headers
    )


def status_of(error: Exception) -> int:
    """The HTTP status that says what kind of error it is."""
    if isinstance(error, ModelUnknown | ResponseUnknown):
        return 404
    if isinstance(error, InvalidRequest):
        return 400
    if isinstance(error, Overloaded | StoreFull):
        return 429
    later = EngineDead | EngineNotReady | CompilersBusy | QueueTimeout | Draining
    return 503 if isinstance(error, later) else 500


def add_error_handlers(app: FastAPI) -> None:
    """Every error of `app` becomes an error object."""

    @app.exception_handler(PortaLMError)
    async def known(request: Request, error: PortaLMError) -> JSONResponse:
        code = "model_not_found" if isinstance(error, ModelUnknown) else None
        param = error.param if isinstance(error, InvalidRequest) else None
        return error_response(status_of(error), str(error), param=param, code=code)

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> JSONResponse:
        errors = error.errors()
        # of what may have several shapes, the errors of all come: too long says most
        first = next((e for e in errors if e["type"].endswith("too_long")), errors[0])
        where = [str(part) for part in first["loc"] if part != "body"]
        name = ".".join(where)
        if first["type"] == "extra_forbidden":
            message = f"unknown field {name!r}: this endpoint does not know it"
        elif first["type"] == "json_invalid":
            message = "the body is not valid JSON"
        else:
            message = f"{name or 'the body'}: {first['msg']}"
        return error_response(400, message, param=where[0] if where else None)

    @app.exception_handler(RecursionError)
    async def too_deep(request: Request, error: RecursionError) -> JSONResponse:
        return error_response(400, "the body is nested too deeply")

    @app.exception_handler(Exception)
    async def unknown(request: Request, error: Exception) -> JSONResponse:
        return error_response(500, "the server failed on this request; its log says how")

    @app.exception_handler(ClientDisconnect)
    async def left(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=_CLIENT_LEFT)  # nobody reads it: it is counted

    @app.exception_handler(HTTPException)
    async def plain(request: Request, error: HTTPException) -> JSONResponse:
        return error_response(error.status_code, str(error.detail))
