"""Server-sent events: encoding, errors inside a stream, and the final event."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncGenerator
from typing import Any

import msgspec
from fastapi.responses import Response
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from portalm.errors import PortaLMError
from portalm.server.errors import error_object, status_of
from portalm.server.replies.presence import while_connected

logger = logging.getLogger(__name__)

_encode = msgspec.json.Encoder().encode


def event(body: Any, *, is_named: bool = False) -> bytes:
    """Encode `body` as one event; if `is_named`, the event has the name of its type."""
    name = b"event: " + body["type"].encode() + b"\n" if is_named else b""
    return name + b"data: " + _encode(body) + b"\n\n"


class EventStream(Response):
    """Sends each of `chunks` as an event, then the final event. A disconnect closes `chunks`.

    The response starts with the first chunk: an error before it becomes an error response with
    its own status, a later error becomes the last event.
    """

    media_type = "text/event-stream"

    def __init__(self, chunks: AsyncGenerator[Any, None], *, is_named: bool) -> None:
        """Create the response; `chunks` is not read before it is sent."""
        self.background = None
        self.status_code = 200
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._chunks = chunks
        self._is_named = is_named

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response (the ASGI interface)."""
        with contextlib.suppress(ClientDisconnect):  # the client is gone
            await while_connected(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        async with contextlib.aclosing(self._chunks) as chunks:
            first = await anext(chunks, None)
            await send(
                {
                    "type": "http.response.start",
                    "status": self.status_code,
                    "headers": self.raw_headers,
                }
            )
            try:
                if first is not None:
                    await _send_body(send, event(first, is_named=self._is_named))
                async for chunk in chunks:
                    await _send_body(send, event(chunk, is_named=self._is_named))
            except PortaLMError as error:
                await _send_body(send, self._error_event(status_of(error), str(error)))
            except Exception:
                logger.exception("a stream failed")
                failed = self._error_event(500, "the server failed on this request")
                await _send_body(send, failed)
        end = b"" if self._is_named else b"data: [DONE]\n\n"
        await _send_body(send, end, more_body=False)

    def _error_event(self, status: int, message: str) -> bytes:
        body: dict[str, Any] = error_object(status, message)
        if self._is_named:
            body = {**body["error"], "type": "error", "sequence_number": 0}
        return event(body, is_named=self._is_named)


async def _send_body(send: Send, body: bytes, *, more_body: bool = True) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": more_body})


def event_stream(chunks: AsyncGenerator[Any, None], *, is_named: bool = False) -> EventStream:
    """A response that sends each chunk as an event. A disconnect closes `chunks`.

    Args:
        chunks: objects to encode as JSON.
        is_named: the chunks are events of the Responses API: each event has the name of its type,
            and nothing follows the last chunk. Otherwise `data: [DONE]` ends the stream.
    """
    return EventStream(chunks, is_named=is_named)


def usage(num_prompt: int, num_generated: int, num_cached: int) -> dict[str, Any]:
    """OpenAI's usage object."""
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_generated,
        "total_tokens": num_prompt + num_generated,
        "prompt_tokens_details": {"cached_tokens": num_cached},
    }
