"""Server-sent events: chunks encoded once, errors inside a stream, an honest end."""

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
    """One event; named after its own type, if it shall be."""
    name = b"event: " + body["type"].encode() + b"\n" if is_named else b""
    return name + b"data: " + _encode(body) + b"\n\n"


class EventStream(Response):
    """Sends each of `chunks` as an event, then the end; a client that leaves closes `chunks`.

    It begins with the first chunk: an error before that is an answer with a status of its own,
    one behind it becomes the last event.
    """

    media_type = "text/event-stream"

    def __init__(self, chunks: AsyncGenerator[Any, None], *, is_named: bool) -> None:
        """Nothing is asked of `chunks` before the response is sent."""
        self.background = None
        self.status_code = 200
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._chunks = chunks
        self._is_named = is_named

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it, as ASGI asks."""
        with contextlib.suppress(ClientDisconnect):  # nobody is there to be told
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
    """A response that sends each chunk as an event; a client that leaves closes `chunks`.

    Args:
        chunks: objects.
        is_named: they are events of the Responses API: each is named after its type, and the last
            one is the end; else data: [DONE] is.
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
