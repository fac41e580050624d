"""HTTP statuses of errors, and OpenAI's error object."""

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

_CLIENT_DISCONNECTED = 499
"""nginx's status for a client that disconnected; HTTP itself defines none."""

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
"""Maximum length of an error text, in characters."""


def error_object(
    status: int, message: str, *, param: str | None = None, code: str | None = None
) -> dict[str, dict[str, str | None]]:
    """The body of an error response."""
    kind = _TYPES.get(status, "internal_server_error")
    if len(message) > _MAX_MESSAGE:  # texts may quote the request
        message = f"{message[:_MAX_MESSAGE]}..."
    error = {"message": message, "type": kind, "param": param, "code": code}
    return {"error": {name: _printable(value) for name, value in error.items()}}


def _printable(text: str | None) -> str | None:
    """`text` with lone surrogates, which cannot be sent, escaped."""
    return text and text.encode("utf-8", "backslashreplace").decode()


def error_response(
    status: int, message: str, *, param: str | None = None, code: str | None = None
) -> JSONResponse:
    """An error response, with Retry-After if the request may be retried."""
    headers = {"Retry-After": "1"} if status in (429, 503) else None
    return JSONResponse(
        error_object(status, message, param=param, code=code), status, headers=headers
    )


def status_of(error: Exception) -> int:
    """HTTP status of an error."""
    if isinstance(error, ModelUnknown | ResponseUnknown):
        return 404
    if isinstance(error, InvalidRequest):
        return 400
    if isinstance(error, Overloaded | StoreFull):
        return 429
    retriable = EngineDead | EngineNotReady | CompilersBusy | QueueTimeout | Draining
    return 503 if isinstance(error, retriable) else 500


def add_error_handlers(app: FastAPI) -> None:
    """Let `app` turn every error into a response with an error object."""

    @app.exception_handler(PortaLMError)
    async def known(request: Request, error: PortaLMError) -> JSONResponse:
        code = "model_not_found" if isinstance(error, ModelUnknown) else None
        param = error.param if isinstance(error, InvalidRequest) else None
        return error_response(status_of(error), str(error), param=param, code=code)

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> JSONResponse:
        errors = error.errors()
        # a union reports the errors of all its members: too_long is the most helpful
        first = next((e for e in errors if e["type"].endswith("too_long")), errors[0])
        where = [str(part) for part in first["loc"] if part != "body"]
        name = ".".join(where)
        if first["type"] == "extra_forbidden":
            message = f"unknown field {name!r}: this endpoint does not have it"
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
        return error_response(500, "the server failed on this request; the cause is in its log")

    @app.exception_handler(ClientDisconnect)
    async def disconnected(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=_CLIENT_DISCONNECTED)  # only counted, never read

    @app.exception_handler(HTTPException)
    async def plain(request: Request, error: HTTPException) -> JSONResponse:
        return error_response(error.status_code, str(error.detail))
