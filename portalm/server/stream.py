"""Server-sent events: chunks encoded once, errors inside a stream, an honest end."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncGenerator
from typing import Any

import msgspec
from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

from portalm.errors import PortaLMError
from portalm.server.errors import error_object, status_of
from portalm.server.presence import while_connected

logger = logging.getLogger(__name__)

_encode = msgspec.json.Encoder().encode


def event(body: Any) -> bytes:
    """One event."""
    return b"data: " + _encode(body) + b"\n\n"


class EventStream(Response):
    """Sends each of `chunks` as an event, then [DONE]; a client that leaves closes `chunks`.

    It begins with the first chunk: an error before that is an answer with a status of its own,
    one behind it becomes the last event.
    """

    media_type = "text/event-stream"

    def __init__(self, chunks: AsyncGenerator[Any, None]) -> None:
        """Nothing is asked of `chunks` before the response is sent."""
        self.background = None
        self.status_code = 200
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._chunks = chunks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it, as ASGI asks."""
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
                    await _send_body(send, event(first))
                async for chunk in chunks:
                    await _send_body(send, event(chunk))
            except PortaLMError as error:
                await _send_body(send, event(error_object(status_of(error), str(error))))
            except Exception:
                logger.exception("a stream failed")
                failed = error_object(500, "the server failed on this request")
                await _send_body(send, event(failed))
        await _send_body(send, b"data: [DONE]\n\n", more_body=False)


async def _send_body(send: Send, body: bytes, *, more_body: bool = True) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": more_body})


def event_stream(chunks: AsyncGenerator[Any, None]) -> EventStream:
    """A response that sends each chunk as an event; a client that leaves closes `chunks`."""
    return EventStream(chunks)


def usage(num_prompt: int, num_generated: int, num_cached: int) -> dict[str, Any]:
    """OpenAI's usage object."""
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_generated,
        "total_tokens": num_prompt + num_generated,
        "prompt_tokens_details": {"cached_tokens": num_cached},
    }
