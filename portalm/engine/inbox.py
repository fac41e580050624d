"""Where the answers of one caller arrive: emptied by the caller, however slowly."""

from __future__ import annotations

import asyncio
from collections import deque

from portalm.engine.output_processor import AnswerDelta
from portalm.errors import PortaLMError

_MAX_DELTAS = 64
"""That wait one by one; behind them, what comes for an answer is put together."""


class Inbox:
    """Deltas of some requests, in order. All methods belong to one event loop.

    A caller that takes nothing costs the text of its answers, not a delta for each token.
    """

    __slots__ = ("_deltas", "_error", "_joined", "_waiter")

    def __init__(self) -> None:
        """Nothing came yet."""
        self._deltas: deque[AnswerDelta] = deque()
        self._joined: dict[tuple[str, int], AnswerDelta] = {}
        """By request and answer: the waiting delta that takes up what comes next."""
        self._waiter: asyncio.Future[None] | None = None
        self._error: PortaLMError | None = None

    def put(self, delta: AnswerDelta) -> None:
        """One more."""
        answer = (delta.request_id, delta.index)
        # also where there is room again: what comes later must not stand before it
        if (waiting := self._joined.get(answer)) is not None:
            waiting.take_up(delta)
            if waiting.is_last:  # of its request: the other answers' stand before it
                self._deltas.remove(waiting)
                self._deltas.append(waiting)
            return
        if len(self._deltas) >= _MAX_DELTAS:
            self._joined[answer] = delta
        self._deltas.append(delta)
        self._wake()

    def fail(self, error: PortaLMError) -> None:
        """No more will come: `get` raises `error` behind what came before."""
        if self._error is None:
            self._error = error
        self._wake()

    async def get(self) -> AnswerDelta:
        """The next one; waits for it. Raises what `fail` was told."""
        while not self._deltas:
            if self._error is not None:
                raise self._error
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        delta = self._deltas.popleft()
        if self._joined:
            answer = (delta.request_id, delta.index)
            if self._joined.get(answer) is delta:
                del self._joined[answer]
        return delta

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
