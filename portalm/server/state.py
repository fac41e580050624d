"""What the endpoints share."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from fastapi import Request

from portalm.engine.client import EngineClient
from portalm.engine.input_processor import ProcessedInput
from portalm.engine.output_processor import AnswerDelta
from portalm.errors import InvalidRequest, PortaLMError, RequestFailed
from portalm.sampling_params import SamplingParams
from portalm.server.metrics import Metrics
from portalm.server.watch import RequestObserver, RequestWatch


class ModelUnknown(InvalidRequest):
    """A request for a model that this server does not serve."""


class Overloaded(PortaLMError):
    """More requests wait than the server lets in."""


@dataclass(slots=True)
class ServerState:
    """One served model."""

    client: EngineClient
    metrics: Metrics
    model_names: Sequence[str]
    """The first is the one that answers carry."""
    api_keys: Sequence[str] = ()
    max_num_queued_reqs: int | None = None
    observers: Sequence[RequestObserver] = ()
    """Told of every request that ends."""
    is_draining: bool = False
    created: int = field(default_factory=lambda: int(time.time()))

    def check_model(self, name: str | None) -> str:
        """The name to answer with. Raises `ModelUnknown`."""
        if name is not None and name not in self.model_names:
            raise ModelUnknown(
                f"model {name!r} is not served here; served: {', '.join(self.model_names)}",
                param="model",
            )
        return name or self.model_names[0]

    def admit(self, num_requests: int) -> None:
        """Raise `Overloaded` if so many more requests are not let in."""
        limit = self.max_num_queued_reqs
        if limit is not None and self.client.stats.num_waiting + num_requests > limit:
            raise Overloaded(
                f"{self.client.stats.num_waiting} requests wait already, the limit is {limit}: "
                f"try again later"
            )

    async def answers(
        self, inputs: Sequence[ProcessedInput], params: SamplingParams
    ) -> AsyncIterator[tuple[int, AnswerDelta]]:
        """(index of the input, delta) of all inputs as they come; closing it aborts them all."""
        queue: asyncio.Queue[tuple[int, AnswerDelta | BaseException | None]] = asyncio.Queue()

        async def pump(index: int, processed: ProcessedInput) -> None:
            watch = RequestWatch(self.metrics, self.observers, processed, params)
            try:
                async for delta in self.client.generate(processed, params):
                    watch.saw(delta)
                    queue.put_nowait((index, delta))
            except Exception as error:
                watch.failed(error)
                queue.put_nowait((index, error))
            else:
                queue.put_nowait((index, None))
            finally:
                watch.ended()

        tasks = [asyncio.create_task(pump(i, one)) for i, one in enumerate(inputs)]
        num_open = len(tasks)
        try:
            while num_open:
                index, news = await queue.get()
                if news is None:
                    num_open -= 1
                elif isinstance(news, BaseException):
                    raise news
                else:
                    yield index, news
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def failure(delta: AnswerDelta) -> PortaLMError | None:
    """The error that ended an answer: the request's own, or the engine's; None: there was none."""
    if delta.error is None:
        return None
    return InvalidRequest(delta.error) if delta.is_refused else RequestFailed(delta.error)


def state_of(request: Request) -> ServerState:
    """The server's state (a FastAPI dependency)."""
    state: ServerState = request.app.state.portalm
    return state


def new_id(prefix: str) -> str:
    """An id like OpenAI's."""
    return f"{prefix}-{uuid.uuid4().hex}"
