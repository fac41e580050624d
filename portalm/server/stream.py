"""Server-sent events: chunks encoded once, errors inside a stream, an honest end."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import msgspec
from fastapi.responses import StreamingResponse

from portalm.errors import PortaLMError
from portalm.server.errors import error_object, status_of

logger = logging.getLogger(__name__)

_encode = msgspec.json.Encoder().encode


def event(body: Any) -> bytes:
    """One event."""
    return b"data: " + _encode(body) + b"\n\n"


async def _guarded(chunks: AsyncGenerator[Any, None]) -> AsyncIterator[bytes]:
    """Events of `chunks`, then [DONE]; an error becomes the last event."""
    try:
        async for chunk in chunks:
            yield event(chunk)
    except PortaLMError as error:
        yield event(error_object(status_of(error), str(error)))
    except Exception:
        logger.exception("a stream failed")
        yield event(error_object(500, "the server failed on this request"))
    finally:
        await chunks.aclose()
    yield b"data: [DONE]\n\n"


def event_stream(chunks: AsyncGenerator[Any, None]) -> StreamingResponse:
    """A response that sends each chunk as an event; a client that leaves closes `chunks`."""
    return StreamingResponse(
        _guarded(chunks),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
    )


def usage(num_prompt: int, num_generated: int, num_cached: int) -> dict[str, Any]:
    """OpenAI's usage object."""
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_generated,
        "total_tokens": num_prompt + num_generated,
        "prompt_tokens_details": {"cached_tokens": num_cached},
    }
