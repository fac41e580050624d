"""POST /v1/chat/completions."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response

from portalm.engine.input_processor import ProcessedInput
from portalm.outputs import Logprob
from portalm.sampling_params import SamplingParams
from portalm.server.answers import collect
from portalm.server.auth import salt_for, tenant_of
from portalm.server.protocol import ChatRequest
from portalm.server.state import ServerState, failure, new_id, state_of
from portalm.server.stream import event_stream, usage

router = APIRouter()


@router.post("/v1/chat/completions")
async def chat_completions(
    body: ChatRequest, request: Request, state: Annotated[ServerState, Depends(state_of)]
) -> Response:
    """The assistant's next message."""
    model = state.check_model(body.model)
    params = body.params()
    state.admit(params.n)
    chat_id = new_id("chatcmpl")
    prompt = state.client.tokenizer.render_chat(
        body.messages,
        add_generation_prompt=body.add_generation_prompt and not body.continue_final_message,
        continue_final_message=body.continue_final_message,
        template=state.own_template(body.chat_template),
        **body.template_variables(),
    )
    processed = await state.client.check(
        body.request_id or chat_id,
        prompt,
        params,
        priority=body.priority,
        cache_salt=salt_for(request, body.cache_salt),
        tenant=tenant_of(request),
        add_special_tokens=False,  # the template writes BOS itself
    )
    head = {"id": chat_id, "created": int(time.time()), "model": model}
    if body.stream:
        chunk_head = {**head, "object": "chat.completion.chunk"}
        return event_stream(_chunks(state, body, chunk_head, processed, params))
    answers = await collect(request, state, [processed], params)
    choices = [
        {
            "index": answer.index,
            "message": {"role": "assistant", "content": answer.text},
            "logprobs": _logprobs(answer.logprobs),
            "finish_reason": answer.finish_reason,
            "stop_reason": answer.stop_reason,
        }
        for output in answers.outputs
        for answer in output.outputs
    ]
    return JSONResponse(
        {**head, "object": "chat.completion", "choices": choices, "usage": answers.usage()}
    )


async def _chunks(
    state: ServerState,
    body: ChatRequest,
    head: dict[str, Any],
    processed: ProcessedInput,
    params: SamplingParams,
) -> AsyncGenerator[Any, None]:
    options = body.stream_options
    num_prompt, num_generated, num_cached = len(processed.prompt_token_ids), 0, 0
    is_begun = False
    async for _, delta in state.answers([processed], params):
        if (error := failure(delta)) is not None:
            raise error
        if not is_begun:  # not before: what fails in the queue is answered with a status
            is_begun = True
            for index in range(params.n):
                yield _chunk(head, index, {"role": "assistant", "content": ""})
        num_generated += len(delta.token_ids)
        if delta.final is not None:
            num_cached = delta.final.num_cached_tokens
        if not delta.text and delta.finish_reason is None and not delta.logprobs:
            continue  # half a character, or what may begin a stop string
        chunk = _chunk(head, delta.index, {"content": delta.text} if delta.text else {})
        [choice] = chunk["choices"]
        choice["logprobs"] = _logprobs(delta.logprobs)
        choice["finish_reason"] = delta.finish_reason
        choice["stop_reason"] = delta.stop_reason
        if options is not None and options.continuous_usage_stats:
            chunk["usage"] = usage(num_prompt, num_generated, num_cached)
        yield chunk
    if options is not None and options.include_usage:
        yield {**head, "choices": [], "usage": usage(num_prompt, num_generated, num_cached)}


def _chunk(head: dict[str, Any], index: int, delta: dict[str, str]) -> dict[str, Any]:
    choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
    return {**head, "choices": [choice]}


def _logprobs(entries: list[dict[int, Logprob]] | None) -> dict[str, Any] | None:
    if entries is None:
        return None
    content = []
    for entry in entries:
        drawn, *_ = entry.values()
        top = sorted(entry.values(), key=lambda one: one.rank)
        content.append({**_token(drawn), "top_logprobs": [_token(one) for one in top]})
    return {"content": content}


def _token(one: Logprob) -> dict[str, Any]:
    text = one.decoded_token or ""
    return {
        "token": text,
        "logprob": max(one.logprob, -9999.0),
        "bytes": list(text.encode("utf-8", errors="replace")),
    }
