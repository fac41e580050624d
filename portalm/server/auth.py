"""API keys and the size of bodies: checked before anything else."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from portalm.server.errors import error_response

_OPEN_PATHS = ("/health", "/metrics", "/version", "/static/")

MAX_BODY_BYTES = 32 << 20


class Gate:
    """Refuses requests without a valid key and bodies that are too large."""

    def __init__(self, app: ASGIApp, api_keys: Sequence[str]) -> None:
        """Without keys everybody may come in."""
        self._app = app
        self._keys = [key.encode() for key in api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the request through, or answer 401 or 413."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        key = self._key(headers.get(b"authorization", b""))
        is_open = scope["path"] == "/" or scope["path"].startswith(_OPEN_PATHS)
        if self._keys and key is None and not is_open:
            response = error_response(
                401,
                "no valid API key: send it as Authorization: Bearer KEY",
                code="invalid_api_key",
            )
            await response(scope, receive, send)
            return
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > MAX_BODY_BYTES:
            response = error_response(
                413, f"the body has {int(length)} bytes, at most {MAX_BODY_BYTES} are taken"
            )
            await response(scope, receive, send)
            return
        if key is not None:
            scope.setdefault("state", {})["tenant"] = hashlib.sha256(key).hexdigest()[:16]
        await self._app(scope, _limited(receive), send)

    def _key(self, authorization: bytes) -> bytes | None:
        """The valid key that was given; None: there is none."""
        scheme, _, given = authorization.partition(b" ")
        # every key is compared, so that the time tells nothing
        matches = [key for key in self._keys if hmac.compare_digest(given.strip(), key)]
        return matches[0] if matches and scheme.lower() == b"bearer" else None


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
    """`receive` that ends a body without a length where it grows too large."""
    num_bytes = 0

    async def limited() -> Message:
        nonlocal num_bytes
        message = await receive()
        num_bytes += len(message.get("body", b""))
        if num_bytes > MAX_BODY_BYTES:
            return {"type": "http.disconnect"}
        return message

    return limited
