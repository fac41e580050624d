"""Queue of answer deltas for one caller, with bounded length for slow readers."""

from __future__ import annotations

import asyncio
from collections import deque

from portalm.engine.output_processor import AnswerDelta
from portalm.errors import PortaLMError

_MAX_DELTAS = 64
"""Deltas queued one by one; later ones of an answer are merged into one."""


class Inbox:
    """Deltas of some requests, in order. All methods belong to one event loop.

    A slow reader costs memory for the text of its answers, not for one delta per token.
    """

    __slots__ = ("_deltas", "_error", "_merged", "_waiter")

    def __init__(self) -> None:
        """Start empty."""
        self._deltas: deque[AnswerDelta] = deque()
        self._merged: dict[tuple[str, int], AnswerDelta] = {}
        """The queued delta that later ones are merged into, by request id and answer index."""
        self._waiter: asyncio.Future[None] | None = None
        self._error: PortaLMError | None = None

    def put(self, delta: AnswerDelta) -> None:
        """Queue a delta."""
        answer = (delta.request_id, delta.index)
        # even if the queue is short again: deltas of an answer stay in order
        if (waiting := self._merged.get(answer)) is not None:
            waiting.merge(delta)
            if waiting.is_last:  # after the deltas of the request's other answers
                self._deltas.remove(waiting)
                self._deltas.append(waiting)
            return
        if len(self._deltas) >= _MAX_DELTAS:
            self._merged[answer] = delta
        self._deltas.append(delta)
        self._wake()

    def fail(self, error: PortaLMError) -> None:
        """End the queue: `get` raises `error` after the queued deltas."""
        if self._error is None:
            self._error = error
        self._wake()

    async def get(self) -> AnswerDelta:
        """Wait for the next delta. Raises the error of `fail` once the queue is empty."""
        while not self._deltas:
            if self._error is not None:
                raise self._error
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        delta = self._deltas.popleft()
        if self._merged:
            answer = (delta.request_id, delta.index)
            if self._merged.get(answer) is delta:
                del self._merged[answer]
        return delta

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
