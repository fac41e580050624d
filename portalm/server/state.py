"""What the endpoints share."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

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
    """A request for a model that this server does not serve."""


class Overloaded(PortaLMError):
    """More requests wait than the server lets in."""


class Draining(PortaLMError):
    """The server shuts down and takes no more requests."""


@dataclass(slots=True)
class ServerState:
    """One served model."""

    client: EngineClient
    metrics: Metrics
    model_names: Sequence[str]
    """The first is the one that answers carry."""
    api_keys: ApiKeys = field(default_factory=ApiKeys)
    """Without any: everybody who can connect."""
    allowed_origins: Sequence[str] = ()
    """Web pages of these origins may ask; without any, no other page may."""
    max_num_queued_reqs: int | None = None
    """Answers that may wait; None: any number."""
    max_num_queued_tokens: int | None = None
    """Prompt tokens that may wait; None: any number."""
    queue_timeout_s: float | None = None
    """How long a request may wait until it runs; None: for ever."""
    trust_request_chat_template: bool = False
    """Requests may bring a chat template."""
    answer_format: AnswerFormat = field(default_factory=AnswerFormat)
    """How the model writes tool calls and reasoning."""
    responses: ResponseStore = field(default_factory=ResponseStore)
    """Those that can be asked for later."""
    observers: Sequence[RequestObserver] = ()
    """Told of every request that ends."""
    is_draining: bool = False
    created: int = field(default_factory=lambda: int(time.time()))

    def check_model(self, name: str | None, task: Task | None = "generate") -> str:
        """The name to answer with.

        Raises:
            ModelUnknown: another model is asked for.
            InvalidRequest: this one does not do `task` (None: whatever it does).
        """
        if name is not None and name not in self.model_names:
            raise ModelUnknown(
                f"model {name!r} is not served here; served: {', '.join(self.model_names)}",
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
            raise Draining("the server is shutting down and takes no more requests")
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
                    f"{num_queued} {what} wait already, {num_more} more are above the limit of "
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
        """(index of the input, delta) of all inputs as they come; closing it aborts them all.

        Raises:
            Overloaded: too many wait, `QueueTimeout`: these did for too long, `Draining`.
        """
        num_tokens = sum(len(one.prompt_token_ids) for one in inputs)
        self.admit(sum(len(one.requests) for one in inputs), num_tokens)
        index_of = {one.request_id: i for i, one in enumerate(inputs)}
        watches = {
            one.request_id: RequestWatch(self.metrics, self.observers, one, params)
            for one in inputs
        }
        asked = self.client.generate(inputs, params, queue_timeout_s=self.queue_timeout_s)
        try:
            async with contextlib.aclosing(asked) as deltas:
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
