"""Writing a response of the Responses API: its events, its output, and its final state."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

from portalm.engine.input_processor import ProcessedInput
from portalm.errors import PortaLMError
from portalm.sampling_params import SamplingParams
from portalm.server.chat_plan import ChatPlan
from portalm.server.replies.responses_output import Event, ResponseOutput
from portalm.server.responses_store import StoredResponse, StoreFull
from portalm.server.schemas.responses import ResponsesRequest
from portalm.server.state import ServerState, failure, new_id

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class ResponseRun:
    """A response while it is being written."""

    state: ServerState
    tenant: str
    plan: ChatPlan
    processed: ProcessedInput
    stored: StoredResponse
    is_stored: bool
    """Whether the response can be retrieved later."""
    error: PortaLMError | None = None
    """The error that ended it."""


async def write_response(run: ResponseRun) -> None:
    """Write a whole response; if it fails, `run.error` is set."""
    async with contextlib.aclosing(response_events(run)) as events:
        async for _ in events:
            pass


async def response_events(run: ResponseRun) -> AsyncGenerator[Event, None]:
    """Write a response, yielding the events that describe it."""
    number = 0
    response = run.stored.response
    async with contextlib.aclosing(_unnumbered_events(run)) as events:
        async for event in events:
            if "response" in event:
                event["response"] = {**response, "output": [*response["output"]]}
            yield {**event, "sequence_number": number}
            number += 1


async def _unnumbered_events(run: ResponseRun) -> AsyncGenerator[Event, None]:
    response, output = run.stored.response, ResponseOutput()
    response["output"] = output.items
    response["status"] = "in_progress"
    is_begun = False
    try:
        async with contextlib.aclosing(_write(run, output)) as events:
            async for event in events:
                is_begun = True
                yield event
        yield {"type": f"response.{response['status']}", "response": response}
    except Exception as error:
        if isinstance(error, PortaLMError):
            run.error = error
        else:
            logger.exception("a response failed")
            run.error = PortaLMError("the server failed on this request")
        output.finish("incomplete")
        response["status"] = "failed"
        response["error"] = {"code": "server_error", "message": str(run.error)}
        if not is_begun and not response["background"]:
            raise  # the reply is an error with a status
        yield {"type": "response.failed", "response": response}
    finally:
        if response["status"] == "in_progress":  # disconnected or cancelled
            output.finish("incomplete")
            response["status"] = "cancelled"
        response["completed_at"] = int(time.time())
        if run.is_stored and (is_begun or response["background"]):
            with contextlib.suppress(StoreFull):  # retrieving it later gives a 404
                run.state.responses.put(run.tenant, run.stored)


async def _write(run: ResponseRun, output: ResponseOutput) -> AsyncGenerator[Event, None]:
    """Fill a response with the model's answer, yielding the events of each change."""
    response, parser = run.stored.response, run.plan.new_parser()
    num_generated = num_reasoning = 0
    is_begun = False
    async for _, delta in run.state.answers([run.processed], run.plan.params):
        if (error := failure(delta)) is not None:
            raise error
        if not is_begun:  # not earlier: an error in the queue is replied to with a status
            is_begun = True
            yield {"type": "response.created", "response": response}
            yield {"type": "response.in_progress", "response": response}
        num_generated += len(delta.token_ids)
        pieces = parser.push(delta.text)
        if delta.finish_reason is not None:
            pieces += parser.finish()
        if parser.reasoning and not parser.content and not parser.calls:
            num_reasoning = num_generated
        for event in output.add(pieces):
            yield event
        if delta.final is None:
            continue
        is_whole = delta.finish_reason == "stop"
        for event in output.finish("completed" if is_whole else "incomplete"):
            yield event
        response["status"] = "completed" if is_whole else "incomplete"
        if delta.finish_reason == "length":
            response["incomplete_details"] = {"reason": "max_output_tokens"}
        num_prompt = len(delta.final.prompt_token_ids)
        response["usage"] = {
            "input_tokens": num_prompt,
            "input_tokens_details": {
                "cached_tokens": delta.final.num_cached_tokens,
                "cache_write_tokens": 0,
            },
            "output_tokens": num_generated,
            "output_tokens_details": {"reasoning_tokens": num_reasoning},
            "total_tokens": num_prompt + num_generated,
        }


def new_response(body: ResponsesRequest, params: SamplingParams, model: str) -> dict[str, Any]:
    """A response object without output, in progress."""
    form = body.text.format if body.text is not None else None
    reasoning = body.reasoning
    return {
        "id": new_id("resp"),
        "object": "response",
        "created_at": int(time.time()),
        "completed_at": None,
        "status": "in_progress",
        "background": bool(body.background),
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": None,
        "metadata": body.metadata or {},
        "model": model,
        "output": [],
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id,
        "reasoning": {"effort": reasoning.effort if reasoning else None, "summary": None},
        "service_tier": "default",
        "store": body.store is not False,
        "temperature": params.temperature,
        "text": {
            "format": form.model_dump(exclude_none=True, by_alias=True)
            if form
            else {"type": "text"}
        },
        "tool_choice": body.tool_choice or "auto",
        "tools": body.tools or [],
        "top_logprobs": 0,
        "top_p": params.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": body.user,
    }
