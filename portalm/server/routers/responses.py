"""The Responses API: POST /v1/responses, and retrieving, cancelling and deleting responses."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import JSONResponse, Response

from portalm.errors import InvalidRequest
from portalm.server.auth import salt_for, tenant_of
from portalm.server.chat_plan import plan_chat
from portalm.server.replies.presence import while_connected
from portalm.server.replies.responses import (
    ResponseRun,
    new_response,
    response_events,
    write_response,
)
from portalm.server.replies.stream import event_stream
from portalm.server.responses_store import StoredResponse
from portalm.server.schemas.responses import ResponsesRequest
from portalm.server.schemas.responses_input import as_items
from portalm.server.state import Draining, Overloaded, ServerState, state_of

router = APIRouter()
State = Annotated[ServerState, Depends(state_of)]


@router.post("/v1/responses")
async def create_response(body: ResponsesRequest, request: Request, state: State) -> Response:
    """Create a response: streamed, returned whole, or written in the background."""
    body.check()
    model = state.check_model(body.model)
    params, tools = body.params(state.sampling_defaults), body.tool_use()
    tenant = tenant_of(request)
    items: list[dict[str, Any]] = []
    if body.previous_response_id is not None:
        before = state.responses.get(
            tenant, body.previous_response_id, param="previous_response_id"
        )
        if before.is_running:
            raise InvalidRequest(
                f"response {body.previous_response_id!r} is still in progress: wait until it has "
                "ended",
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
    response = new_response(body, plan.params, model)
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
    run = ResponseRun(state, tenant, plan, processed, stored, is_stored=body.store is not False)
    if body.background:
        return await _start(run, is_streamed=bool(body.stream))
    if body.stream:
        return event_stream(response_events(run), is_named=True)
    await while_connected(request.receive, write_response(run))
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
    """Retrieve a response in its current state, or stream its events."""
    stored = state.responses.get(tenant_of(request), response_id)
    if not stream:
        return JSONResponse(stored.response)
    if not stored.events:
        raise InvalidRequest(
            "only a response created with background and stream can be streamed later",
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
    """List the input items of a response, one page at a time."""
    stored = state.responses.get(tenant_of(request), response_id)
    data = [
        {"id": f"item_{i}", "status": "completed", **item} for i, item in enumerate(stored.items)
    ]
    if order == "desc":
        data.reverse()
    if after is not None:
        ids = [item["id"] for item in data]
        if after not in ids:
            raise InvalidRequest(f"the response has no input item with id {after!r}", param="after")
        data = data[ids.index(after) + 1 :]
    page = data[:limit]
    ends = {"first_id": page[0]["id"], "last_id": page[-1]["id"]} if page else {}
    return {"object": "list", "data": page, "has_more": len(data) > limit, **ends}


@router.post("/v1/responses/{response_id}/cancel")
async def cancel_response(response_id: str, request: Request, state: State) -> Response:
    """Cancel a response that is being written in the background."""
    stored = state.responses.get(tenant_of(request), response_id)
    if stored.task is None:
        raise InvalidRequest(
            "only a response created with background can be cancelled; to end another one, close "
            "its connection",
            param="response_id",
        )
    if stored.is_running:
        stored.task.cancel()
        await asyncio.wait({stored.task})
    return JSONResponse(stored.response)


@router.delete("/v1/responses/{response_id}")
async def delete_response(response_id: str, request: Request, state: State) -> dict[str, Any]:
    """Delete a stored response."""
    state.responses.delete(tenant_of(request), response_id)
    return {"id": response_id, "object": "response", "deleted": True}


async def _start(run: ResponseRun, *, is_streamed: bool) -> Response:
    """Start writing a response in the background.

    Raises:
        Draining, Overloaded: the request was not admitted; the response is not stored.
    """
    stored = run.stored
    stored.response["status"] = "queued"

    async def write() -> None:
        async with contextlib.aclosing(response_events(run)) as events:
            async for event in events:
                if is_streamed:
                    stored.events.append(event)
                    stored.notify()

    run.state.responses.put(run.tenant, stored)
    answer = JSONResponse(stored.response)
    stored.task = asyncio.create_task(write())
    stored.task.add_done_callback(lambda _: stored.notify())
    await asyncio.sleep(0)  # the task's first turn ends with the request admitted or refused
    if isinstance(run.error, Draining | Overloaded):
        run.state.responses.delete(run.tenant, stored.response["id"])
        raise run.error
    return event_stream(stored.follow(), is_named=True) if is_streamed else answer
