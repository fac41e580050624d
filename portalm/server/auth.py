"""Who may come in, and with how much: checked before anything else."""

from __future__ import annotations

import hashlib

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from portalm.server.api_keys import ApiKeys
from portalm.server.errors import error_response

_OPEN_PATHS = ("/health", "/metrics", "/version", "/static/")

MAX_BODY_BYTES = 32 << 20


class Gate:
    """Refuses requests without a valid key and bodies that are too large."""

    def __init__(self, app: ASGIApp, api_keys: ApiKeys) -> None:
        """Without keys everybody may come in."""
        self._app = app
        self._keys = api_keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the request through, or answer 401 or 413."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        tenant = self._keys.tenant(headers.get(b"authorization", b""))
        is_open = scope["path"] == "/" or scope["path"].startswith(_OPEN_PATHS)
        if self._keys and tenant is None and not is_open:
            response = error_response(
                401,
                "no valid API key: send it as Authorization: Bearer KEY",
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
    """Who asks, by API key (not the key itself); empty where the server has no keys."""
    return getattr(request.state, "tenant", "")


def salt_for(request: Request, asked: str | None) -> str:
    """The prefix cache's salt: what one API key computed, another cannot find by its speed."""
    tenant = tenant_of(request)
    if not tenant:
        return asked or ""
    return hashlib.sha256(f"{tenant}:{asked or ''}".encode(errors="surrogatepass")).hexdigest()


def _limited(receive: Receive) -> Receive:
    """`receive` that raises a 413 where a body without a length grows too large."""
    num_bytes = 0

    async def limited() -> Message:
        nonlocal num_bytes
        message = await receive()
        num_bytes += len(message.get("body", b""))
        if num_bytes > MAX_BODY_BYTES:
            raise HTTPException(413, _too_large("is larger"))
        return message

    return limited


def _too_large(how: str) -> str:
    return f"the body {how}, at most {MAX_BODY_BYTES} bytes are taken"
