"""Cancel work when the client disconnects."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.types import Receive

T = TypeVar("T")


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Run `work` and return its result; cancel it at once if the client disconnects.

    Args:
        receive: ASGI's `receive`, after the whole body was received.
        work: the coroutine that the client waits for.

    Raises:
        ClientDisconnect: the client disconnected.
    """
    disconnecting = asyncio.create_task(_disconnected(receive))
    working = asyncio.create_task(work)
    try:
        await asyncio.wait({disconnecting, working}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in (disconnecting, working):
            if not task.done():
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
    if working.cancelled():
        raise ClientDisconnect
    return working.result()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
