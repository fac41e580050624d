"""POST /v1/completions."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response

from portalm.engine.input_processor import ProcessedInput
from portalm.outputs import CompletionOutput
from portalm.server.auth import salt_for, tenant_of
from portalm.server.replies.answers import collect
from portalm.server.replies.beam_search import search_beams
from portalm.server.replies.completion_choice import ChoiceShape
from portalm.server.replies.completion_stream import CompletionStream
from portalm.server.replies.stream import event_stream
from portalm.server.schemas.completions import CompletionRequest
from portalm.server.state import ServerState, new_id, state_of

router = APIRouter()


@router.post("/v1/completions")
async def completions(
    body: CompletionRequest, request: Request, state: Annotated[ServerState, Depends(state_of)]
) -> Response:
    """Continue one or more prompts."""
    model = state.check_model(body.model)
    params = body.params(state.sampling_defaults)
    beams = body.beams(params.n, params.max_tokens)
    prompts = body.prompts()
    completion_id = new_id("cmpl")
    base_id = body.request_id or completion_id
    inputs = [
        await state.client.check(
            base_id if len(prompts) == 1 else f"{base_id}-{i}",
            prompt,
            params,
            truncate_prompt_tokens=body.truncate_prompt_tokens,
            priority=body.priority,
            cache_salt=salt_for(request, body.cache_salt),
            tenant=tenant_of(request),
        )
        for i, prompt in enumerate(prompts)
    ]
    head = {
        "id": completion_id,
        "object": "text_completion",
        "created": int(time.time()),
        "model": model,
    }
    shape = ChoiceShape(body=body, params=params, tokenizer=state.client.tokenizer)
    if body.stream:
        return event_stream(_chunks(state, shape, head, inputs))
    if beams is None:
        answers = await collect(request, state, inputs, params)
    else:
        answers = await search_beams(request, state, inputs, replace(params, n=body.n), beams)
    for output in answers.outputs:
        output.outputs = [shape.without_forced_token(answer) for answer in output.outputs]
    usage = answers.usage()  # before all but the best n candidates are dropped
    choices = [
        {"index": i * body.n + rank, **shape.whole(inputs[i], output.prompt_logprobs, answer)}
        for i, output in enumerate(answers.outputs)
        for rank, answer in enumerate(_best(output.outputs, body.n))
    ]
    return JSONResponse({**head, "choices": choices, "usage": usage})


def _best(answers: Sequence[CompletionOutput], n: int) -> Sequence[CompletionOutput]:
    """The n most likely answers, best first; all in their order if there are at most n."""
    if len(answers) <= n:
        return answers
    return sorted(answers, key=lambda one: one.cumulative_logprob or 0.0, reverse=True)[:n]


async def _chunks(
    state: ServerState,
    shape: ChoiceShape,
    head: dict[str, Any],
    inputs: Sequence[ProcessedInput],
) -> AsyncGenerator[Any, None]:
    stream = CompletionStream(shape, head, inputs)
    async for i, delta in state.answers(inputs, shape.params):
        for chunk in stream.chunks(i, delta):
            yield chunk
    for chunk in stream.closing():
        yield chunk
