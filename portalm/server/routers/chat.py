"""POST /v1/chat/completions."""

from __future__ import annotations

import time
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response

from portalm.server.auth import salt_for, tenant_of
from portalm.server.chat_plan import plan_chat
from portalm.server.replies.answers import collect
from portalm.server.replies.beam_search import search_beams
from portalm.server.replies.chat import ChatShape, chat_chunks
from portalm.server.replies.stream import event_stream
from portalm.server.schemas.chat import ChatRequest
from portalm.server.state import ServerState, new_id, state_of

router = APIRouter()


@router.post("/v1/chat/completions")
async def chat_completions(
    body: ChatRequest, request: Request, state: Annotated[ServerState, Depends(state_of)]
) -> Response:
    """Generate the assistant's next message."""
    model = state.check_model(body.model)
    params, tools = body.params(state.sampling_defaults), body.tool_use()
    beams = body.beams(params.n, params.max_tokens)
    chat_id = new_id("chatcmpl")
    plan = plan_chat(
        state.client.tokenizer,
        state.choose_template(body.chat_template, has_tools=bool(tools.tools)),
        state.answer_format,
        body.as_conversation(tools),
        params,
        tools,
    )
    processed = await state.client.check(
        body.request_id or chat_id,
        plan.prompt,
        plan.params,
        truncate_prompt_tokens=body.truncate_prompt_tokens,
        priority=body.priority,
        cache_salt=salt_for(request, body.cache_salt),
        tenant=tenant_of(request),
        add_special_tokens=False,  # the template writes BOS itself
    )
    head = {"id": chat_id, "created": int(time.time()), "model": model}
    shape = ChatShape(body=body, plan=plan, processed=processed, tokenizer=state.client.tokenizer)
    if body.stream:
        chunk_head = {**head, "object": "chat.completion.chunk"}
        return event_stream(chat_chunks(state, shape, chunk_head))
    if beams is None:
        answers = await collect(request, state, [processed], plan.params)
    else:
        answers = await search_beams(request, state, [processed], plan.params, beams)
    [output] = answers.outputs
    return JSONResponse(
        {
            **head,
            "object": "chat.completion",
            "choices": [shape.choice(answer) for answer in output.outputs],
            "usage": answers.usage(),
            **shape.prompt_part(output.prompt_logprobs),
        }
    )
