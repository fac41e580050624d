"""API keys and body sizes, checked before a request is processed."""

from __future__ import annotations

import hashlib

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from portalm.server.api_keys import ApiKeys
from portalm.server.errors import error_response

_OPEN_PATHS = ("/health", "/metrics", "/version", "/static/")

MAX_BODY_BYTES = 32 << 20
"""Maximum size of a request's body."""


class Gate:
    """ASGI middleware that refuses requests without a valid key, and bodies that are too large."""

    def __init__(self, app: ASGIApp, api_keys: ApiKeys) -> None:
        """Wrap `app`. Without keys no key is required."""
        self._app = app
        self._keys = api_keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request to the application, or respond with 401 or 413."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        tenant = self._keys.tenant(headers.get(b"authorization", b""))
        is_open = scope["path"] == "/" or scope["path"].startswith(_OPEN_PATHS)
        if self._keys and tenant is None and not is_open:
            response = error_response(
                401,
                "missing or invalid API key: send the header Authorization: Bearer KEY",
                code="invalid_api_key",
            )
            await response(scope, receive, send)
            return
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > MAX_BODY_BYTES:
            response = error_response(413, _too_large(f"has {int(length)} bytes"))
            await response(scope, receive, send)
            return
        if tenant is not None:
            scope.setdefault("state", {})["tenant"] = tenant
        await self._app(scope, _limited(receive), send)


def tenant_of(request: Request) -> str:
    """Id of the tenant, derived from its API key; empty if the server has no keys."""
    return getattr(request.state, "tenant", "")


def salt_for(request: Request, cache_salt: str | None) -> str:
    """Salt of the prefix cache, so that no tenant can detect another's prompts by their speed."""
    tenant = tenant_of(request)
    if not tenant:
        return cache_salt or ""
    return hashlib.sha256(f"{tenant}:{cache_salt or ''}".encode(errors="surrogatepass")).hexdigest()


def _limited(receive: Receive) -> Receive:
    """`receive`, raising a 413 when a body without Content-Length becomes too large."""
    num_bytes = 0

    async def limited() -> Message:
        nonlocal num_bytes
        message = await receive()
        num_bytes += len(message.get("body", b""))
        if num_bytes > MAX_BODY_BYTES:
            raise HTTPException(413, _too_large("is too large"))
        return message

    return limited


def _too_large(how: str) -> str:
    return f"the body {how}; the limit is {MAX_BODY_BYTES} bytes"
