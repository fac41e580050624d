"""POST /v1/completions."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response

from portalm.engine.input_processor import ProcessedInput
from portalm.outputs import CompletionOutput, RequestOutput
from portalm.sampling_params import SamplingParams
from portalm.server.answers import collect
from portalm.server.auth import salt_for, tenant_of
from portalm.server.completion_stream import CompletionStream, answer_logprobs, as_asked, echoed
from portalm.server.protocol import CompletionRequest
from portalm.server.state import ServerState, new_id, state_of
from portalm.server.stream import event_stream
from portalm.server.text_logprobs import TextLogprobs, prompt_logprobs_object

router = APIRouter()


@router.post("/v1/completions")
async def completions(
    body: CompletionRequest, request: Request, state: Annotated[ServerState, Depends(state_of)]
) -> Response:
    """Continue one prompt or several."""
    model = state.check_model(body.model)
    params = body.params()
    prompts = body.prompts()
    state.admit(len(prompts) * params.n)
    completion_id = new_id("cmpl")
    base_id = body.request_id or completion_id
    inputs = [
        state.client.check(
            base_id if len(prompts) == 1 else f"{base_id}-{i}",
            _truncated(state, body, prompt),
            params,
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
    if body.stream:
        return event_stream(_chunks(state, body, head, inputs, params))
    answers = await collect(request, state, inputs, params)
    for output in answers.outputs:
        output.outputs = [as_asked(body, answer) for answer in output.outputs]
    usage = answers.usage()  # of all candidates
    choices = [
        _choice(state, body, params, inputs[i], output, answer, index=i * body.n + rank)
        for i, output in enumerate(answers.outputs)
        for rank, answer in enumerate(_best(output.outputs, body.n))
    ]
    return JSONResponse({**head, "choices": choices, "usage": usage})


def _truncated(state: ServerState, body: CompletionRequest, prompt: str | list[int]) -> Any:
    """The prompt, or its last tokens: as many as asked for, -1: as many as the answer leaves."""
    limit, ready = body.truncate_prompt_tokens, state.client.ready
    if limit is None or ready is None:
        return prompt
    if limit < 0:
        limit = max(1, ready.max_model_len - max(1, body.params().max_tokens or 1))
    token_ids = state.client.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    return token_ids[max(0, len(token_ids) - limit) :]


def _best(answers: Sequence[CompletionOutput], n: int) -> Sequence[CompletionOutput]:
    """The n likeliest, the best first; all of them, in their order, if there are no more."""
    if len(answers) <= n:
        return answers
    return sorted(answers, key=lambda one: one.cumulative_logprob or 0.0, reverse=True)[:n]


def _choice(
    state: ServerState,
    body: CompletionRequest,
    params: SamplingParams,
    one: ProcessedInput,
    output: RequestOutput,
    answer: CompletionOutput,
    *,
    index: int,
) -> dict[str, Any]:
    tokenizer = state.client.tokenizer
    text, logprobs = answer.text, None
    if body.echo:
        text = echoed(one, params, tokenizer) + text
    if (shape := answer_logprobs(body, one, params, tokenizer)) is not None:
        logprobs = shape.of(answer.token_ids, answer.logprobs or [])
        if body.echo:
            prompt = TextLogprobs(tokenizer, params, num_top=body.logprobs or 0)
            first = prompt.of(one.prompt_token_ids, output.prompt_logprobs or [])
            logprobs = {name: first[name] + values for name, values in logprobs.items()}
    choice = {
        "index": index,
        "text": text,
        "logprobs": logprobs,
        "finish_reason": answer.finish_reason,
        "stop_reason": answer.stop_reason,
    }
    if body.prompt_logprobs is not None:
        choice["prompt_logprobs"] = prompt_logprobs_object(
            output.prompt_logprobs, body.prompt_logprobs
        )
    if body.return_token_ids:
        choice["token_ids"] = answer.token_ids
        choice["prompt_token_ids"] = one.prompt_token_ids
    return choice


async def _chunks(
    state: ServerState,
    body: CompletionRequest,
    head: dict[str, Any],
    inputs: Sequence[ProcessedInput],
    params: SamplingParams,
) -> AsyncGenerator[Any, None]:
    stream = CompletionStream(body, head, inputs, params, state.client.tokenizer)
    for chunk in stream.opening():
        yield chunk
    async for i, delta in state.answers(inputs, params):
        for chunk in stream.chunks(i, delta):
            yield chunk
    for chunk in stream.closing():
        yield chunk
