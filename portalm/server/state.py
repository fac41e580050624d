"""State that the endpoints share: the served model, its limits, and admission."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request

from portalm.config import Task
from portalm.engine.client import EngineClient
from portalm.engine.input_processor import ProcessedInput
from portalm.engine.output_processor import AnswerDelta
from portalm.errors import InvalidRequest, PortaLMError, RequestFailed
from portalm.sampling_params import SamplingParams
from portalm.server.api_keys import ApiKeys
from portalm.server.chat_plan import AnswerFormat
from portalm.server.observability.metrics import Metrics
from portalm.server.observability.watch import RequestObserver, RequestWatch
from portalm.server.responses_store import ResponseStore
from portalm.text.chat_template import ChatTemplate


class ModelUnknown(InvalidRequest):
    """The request names a model that this server does not serve."""


class Overloaded(PortaLMError):
    """The queue is full."""


class Draining(PortaLMError):
    """The server is shutting down and accepts no new requests."""


@dataclass(slots=True)
class ServerState:
    """A served model, and how it is served."""

    client: EngineClient
    metrics: Metrics
    model_names: Sequence[str]
    """Names of the model; replies use the first, unless the request names another."""
    api_keys: ApiKeys = field(default_factory=ApiKeys)
    """Valid API keys; without any, no key is required."""
    allowed_origins: Sequence[str] = ()
    """Origins whose web pages may call the server (CORS)."""
    max_num_queued_reqs: int | None = None
    """Maximum number of answers in the queue; None: no limit."""
    max_num_queued_tokens: int | None = None
    """Maximum number of prompt tokens in the queue; None: no limit."""
    queue_timeout_s: float | None = None
    """Maximum time of a request in the queue; None: no limit."""
    trust_request_chat_template: bool = False
    """Whether requests may bring a chat template."""
    answer_format: AnswerFormat = field(default_factory=AnswerFormat)
    """How the model writes tool calls and reasoning."""
    responses: ResponseStore = field(default_factory=ResponseStore)
    """Responses of the Responses API that can be retrieved later."""
    observers: Sequence[RequestObserver] = ()
    """Called at the start and end of every request."""
    is_draining: bool = False
    """Whether the server is shutting down."""
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def sampling_defaults(self) -> Mapping[str, Any]:
        """The model's own values of sampling parameters that a request does not set, by name."""
        ready = self.client.ready
        return {} if ready is None else ready.sampling_defaults

    def check_model(self, name: str | None, task: Task | None = "generate") -> str:
        """Check the model of a request, and return the model name for its reply.

        Args:
            name: model named in the request; None: the served one.
            task: what the endpoint needs the model for; None: any task.

        Raises:
            ModelUnknown: the request names another model.
            InvalidRequest: the model does not support `task`.
        """
        if name is not None and name not in self.model_names:
            raise ModelUnknown(
                f"model {name!r} is not served here; served models: {', '.join(self.model_names)}",
                param="model",
            )
        if task is not None:
            self.client.check_task(task)
        return name or self.model_names[0]

    def admit(self, num_answers: int, num_tokens: int) -> None:
        """Check that an HTTP request may join the queue; called once, just before it does.

        The caller must send the request to the engine without awaiting in between: then the
        limits hold exactly. An empty queue takes a request of any size, which could otherwise
        never run.

        Args:
            num_answers: answers that the request asks for, over all its prompts.
            num_tokens: tokens of all its prompts.

        Raises:
            Draining: the server is shutting down.
            Overloaded: the queue would grow beyond its limits.
        """
        if self.is_draining:
            raise Draining("the server is shutting down and accepts no new requests")
        for what, num_queued, num_more, limit in (
            ("requests", self.client.num_queued, num_answers, self.max_num_queued_reqs),
            (
                "prompt tokens",
                self.client.num_queued_tokens,
                num_tokens,
                self.max_num_queued_tokens,
            ),
        ):
            if limit is not None and num_queued and num_queued + num_more > limit:
                raise Overloaded(
                    f"{num_queued} {what} are waiting; {num_more} more would exceed the limit of "
                    f"{limit}: try again later"
                )

    def choose_template(
        self, template: str | None = None, *, has_tools: bool = False
    ) -> ChatTemplate:
        """The chat template of a request: its own, if the server accepts those, or the model's.

        Args:
            template: Jinja text, or the name of one of the model's templates; None: the default.
            has_tools: the conversation has tools.

        Raises:
            InvalidRequest: requests may not bring a template, or the model has none.
        """
        if template is not None and not self.trust_request_chat_template:
            raise InvalidRequest(
                "chat_template is not accepted in requests: a template is a program. Start the "
                "server with --trust-request-chat-template to accept it",
                param="chat_template",
            )
        return self.client.tokenizer.choose_template(template, has_tools=has_tools)

    async def answers(
        self, inputs: Sequence[ProcessedInput], params: SamplingParams
    ) -> AsyncIterator[tuple[int, AnswerDelta]]:
        """Admit requests, send them to the engine and yield (index of the input, delta).

        Closing the iterator aborts the requests that have not ended.

        Raises:
            Draining: the server is shutting down.
            Overloaded: the queue is full.
            QueueTimeout: the requests waited in the queue for too long.
        """
        num_tokens = sum(len(one.prompt_token_ids) for one in inputs)
        self.admit(sum(len(one.requests) for one in inputs), num_tokens)
        index_of = {one.request_id: i for i, one in enumerate(inputs)}
        watches = {
            one.request_id: RequestWatch(self.metrics, self.observers, one, params)
            for one in inputs
        }
        generating = self.client.generate(inputs, params, queue_timeout_s=self.queue_timeout_s)
        try:
            async with contextlib.aclosing(generating) as deltas:
                async for delta in deltas:
                    watches[delta.request_id].saw(delta)
                    if delta.is_last:
                        watches.pop(delta.request_id).ended()
                    yield index_of[delta.request_id], delta
        except Exception as error:
            for watch in watches.values():
                watch.failed(error)
            raise
        finally:
            for watch in watches.values():
                watch.ended()


def failure(delta: AnswerDelta) -> PortaLMError | None:
    """The error that ended an answer, caused by the request or the engine; None: no error."""
    if delta.error is None:
        return None
    return InvalidRequest(delta.error) if delta.is_refused else RequestFailed(delta.error)


def state_of(request: Request) -> ServerState:
    """State of the server (a FastAPI dependency)."""
    state: ServerState = request.app.state.portalm
    return state


def new_id(prefix: str) -> str:
    """A new unique id in the form of OpenAI's."""
    return f"{prefix}-{uuid.uuid4().hex}"
