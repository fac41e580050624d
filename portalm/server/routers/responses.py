"""The Responses API: POST /v1/responses, and what becomes of a response later."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import JSONResponse, Response

from portalm.engine.input_processor import ProcessedInput
from portalm.errors import InvalidRequest, PortaLMError
from portalm.server.auth import salt_for, tenant_of
from portalm.server.chat_plan import ChatPlan, plan_chat
from portalm.server.replies.presence import while_connected
from portalm.server.replies.responses_output import Event, ResponseOutput
from portalm.server.replies.stream import event_stream
from portalm.server.responses_store import StoredResponse, StoreFull
from portalm.server.schemas.responses import ResponsesRequest
from portalm.server.schemas.responses_input import as_items
from portalm.server.state import Draining, Overloaded, ServerState, failure, new_id, state_of

logger = logging.getLogger(__name__)
router = APIRouter()
State = Annotated[ServerState, Depends(state_of)]


@dataclass(slots=True)
class _Run:
    """A response that is being written."""

    state: ServerState
    tenant: str
    plan: ChatPlan
    processed: ProcessedInput
    stored: StoredResponse
    is_stored: bool
    error: PortaLMError | None = None
    """What ended it."""


@router.post("/v1/responses")
async def create_response(body: ResponsesRequest, request: Request, state: State) -> Response:
    """The model's answer to some items, streamed, waited for, or left to be asked for later."""
    body.check()
    model = state.check_model(body.model)
    params, tools = body.params(), body.tool_use()
    tenant = tenant_of(request)
    items: list[dict[str, Any]] = []
    if body.previous_response_id is not None:
        before = state.responses.get(
            tenant, body.previous_response_id, param="previous_response_id"
        )
        if before.is_running:
            raise InvalidRequest(
                f"response {body.previous_response_id!r} is not whole yet",
                param="previous_response_id",
            )
        items = [*before.items, *before.response["output"]]
    num_earlier = len(items)
    items += as_items(body.input)
    template = state.choose_template(has_tools=bool(tools.tools))
    plan = plan_chat(
        state.client.tokenizer,
        template,
        state.answer_format,
        body.as_conversation(items, tools, template.text),
        params,
        tools,
    )
    response = _response(body, model)
    processed = await state.client.check(
        body.request_id or response["id"],
        plan.prompt,
        plan.params,
        priority=body.priority,
        cache_salt=salt_for(request, body.cache_salt),
        tenant=tenant,
        add_special_tokens=False,  # the template writes BOS itself
    )
    stored = StoredResponse(response, items, num_earlier)
    run = _Run(state, tenant, plan, processed, stored, is_stored=body.store is not False)
    if body.background:
        return await _start(run, is_streamed=bool(body.stream))
    if body.stream:
        return event_stream(_events(run), is_named=True)
    await while_connected(request.receive, _exhaust(run))
    if run.error is not None:
        raise run.error
    return JSONResponse(response)


@router.get("/v1/responses/{response_id}")
async def show_response(
    response_id: str,
    request: Request,
    state: State,
    stream: bool = False,
    starting_after: int = -1,
) -> Response:
    """A response, as far as it has come; as a stream, if it was asked for as one."""
    stored = state.responses.get(tenant_of(request), response_id)
    if not stream:
        return JSONResponse(stored.response)
    if not stored.events:
        raise InvalidRequest(
            "only a response that was sent with background and stream can be streamed later",
            param="stream",
        )
    return event_stream(stored.follow(after=starting_after), is_named=True)


@router.get("/v1/responses/{response_id}/input_items")
async def list_input_items(
    response_id: str,
    request: Request,
    state: State,
    order: Literal["asc", "desc"] = "desc",
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> dict[str, Any]:
    """What a response answers, a page at a time."""
    stored = state.responses.get(tenant_of(request), response_id)
    data = [
        {"id": f"item_{i}", "status": "completed", **item} for i, item in enumerate(stored.items)
    ]
    if order == "desc":
        data.reverse()
    if after is not None:
        ids = [item["id"] for item in data]
        if after not in ids:
            raise InvalidRequest(f"the response has no input item {after!r}", param="after")
        data = data[ids.index(after) + 1 :]
    page = data[:limit]
    ends = {"first_id": page[0]["id"], "last_id": page[-1]["id"]} if page else {}
    return {"object": "list", "data": page, "has_more": len(data) > limit, **ends}


@router.post("/v1/responses/{response_id}/cancel")
async def cancel_response(response_id: str, request: Request, state: State) -> Response:
    """End a response that goes on in the background."""
    stored = state.responses.get(tenant_of(request), response_id)
    if stored.task is None:
        raise InvalidRequest(
            "only a response that was sent with background can be cancelled: to end another one, "
            "close its connection",
            param="response_id",
        )
    if stored.is_running:
        stored.task.cancel()
        await asyncio.wait({stored.task})
    return JSONResponse(stored.response)


@router.delete("/v1/responses/{response_id}")
async def delete_response(response_id: str, request: Request, state: State) -> dict[str, Any]:
    """Forget a response."""
    state.responses.delete(tenant_of(request), response_id)
    return {"id": response_id, "object": "response", "deleted": True}


# -- writing one ------------------------------------------------------------------------------


async def _start(run: _Run, *, is_streamed: bool) -> Response:
    """Write a response in the background.

    Raises:
        Draining, Overloaded: it was not admitted, and is not stored.
    """
    stored = run.stored
    stored.response["status"] = "queued"

    async def write() -> None:
        async with contextlib.aclosing(_events(run)) as events:
            async for event in events:
                if is_streamed:
                    stored.events.append(event)
                    stored.tell()

    run.state.responses.put(run.tenant, stored)
    answer = JSONResponse(stored.response)
    stored.task = asyncio.create_task(write())
    stored.task.add_done_callback(lambda _: stored.tell())
    await asyncio.sleep(0)  # the task's first turn ends with the request admitted or refused
    if isinstance(run.error, Draining | Overloaded):
        run.state.responses.delete(run.tenant, stored.response["id"])
        raise run.error
    return event_stream(stored.follow(), is_named=True) if is_streamed else answer


async def _exhaust(run: _Run) -> None:
    async with contextlib.aclosing(_events(run)) as events:
        async for _ in events:
            pass


async def _events(run: _Run) -> AsyncGenerator[Event, None]:
    """Write a response; tell of it, event by event."""
    number = 0
    response = run.stored.response
    async with contextlib.aclosing(_unnumbered_events(run)) as events:
        async for event in events:
            if "response" in event:
                event["response"] = {**response, "output": [*response["output"]]}
            yield {**event, "sequence_number": number}
            number += 1


async def _unnumbered_events(run: _Run) -> AsyncGenerator[Event, None]:
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
            raise  # it is answered with a status
        yield {"type": "response.failed", "response": response}
    finally:
        if response["status"] == "in_progress":  # the client left, or cancelled it
            output.finish("incomplete")
            response["status"] = "cancelled"
        response["completed_at"] = int(time.time())
        if run.is_stored and (is_begun or response["background"]):
            with contextlib.suppress(StoreFull):  # who asks for it is told
                run.state.responses.put(run.tenant, run.stored)


async def _write(run: _Run, output: ResponseOutput) -> AsyncGenerator[Event, None]:
    """Fill a response with the answer; what that changes."""
    response, parser = run.stored.response, run.plan.new_parser()
    num_generated = num_reasoning = 0
    is_begun = False
    async for _, delta in run.state.answers([run.processed], run.plan.params):
        if (error := failure(delta)) is not None:
            raise error
        if not is_begun:  # not before: what fails in the queue is answered with a status
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


def _response(body: ResponsesRequest, model: str) -> dict[str, Any]:
    """A response object without output."""
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
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "text": {
            "format": form.model_dump(exclude_none=True, by_alias=True)
            if form
            else {"type": "text"}
        },
        "tool_choice": body.tool_choice or "auto",
        "tools": body.tools or [],
        "top_logprobs": 0,
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": body.user,
    }
