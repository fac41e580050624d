"""API keys and the size of bodies: checked before anything else."""

from __future__ import annotations

import hmac
from collections.abc import Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from portalm.server.errors import error_response

_OPEN_PATHS = ("/health", "/metrics", "/version")

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
        if not self._may_enter(scope["path"], headers.get(b"authorization", b"")):
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
        await self._app(scope, _limited(receive), send)

    def _may_enter(self, path: str, authorization: bytes) -> bool:
        if not self._keys or path.startswith(_OPEN_PATHS):
            return True
        scheme, _, given = authorization.partition(b" ")
        # every key is compared, so that the time tells nothing
        matches = [hmac.compare_digest(given.strip(), key) for key in self._keys]
        return scheme.lower() == b"bearer" and any(matches)


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
