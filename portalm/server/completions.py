"""POST /v1/completions."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response

from portalm.engine.input_processor import ProcessedInput
from portalm.errors import InvalidRequest
from portalm.outputs import Logprob
from portalm.sampling_params import SamplingParams
from portalm.server.answers import collect
from portalm.server.auth import salt_for, tenant_of
from portalm.server.protocol import CompletionRequest
from portalm.server.state import ServerState, failure, new_id, off_loop, state_of
from portalm.server.stream import event_stream, usage

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
    if body.echo and params.logprobs is not None:
        raise InvalidRequest(
            "echo with logprobs is not supported: ask for prompt_logprobs", param="echo"
        )

    def check() -> list[ProcessedInput]:
        return [
            state.client.check(
                base_id if len(prompts) == 1 else f"{base_id}-{i}",
                prompt,
                params,
                priority=body.priority,
                cache_salt=salt_for(request, body.cache_salt),
                tenant=tenant_of(request),
            )
            for i, prompt in enumerate(prompts)
        ]

    inputs = await off_loop(sum(map(len, prompts)), check)
    head = {
        "id": completion_id,
        "object": "text_completion",
        "created": int(time.time()),
        "model": model,
    }
    if body.stream:
        return event_stream(_chunks(state, body, head, inputs, params))
    answers = await collect(request, state, inputs, params)
    choices = [
        {
            "index": i * params.n + answer.index,
            "text": (_echo(state, inputs[i]) if body.echo else "") + answer.text,
            "logprobs": _logprobs(answer.logprobs, 0),
            "finish_reason": answer.finish_reason,
            "stop_reason": answer.stop_reason,
            **({"prompt_logprobs": output.prompt_logprobs} if output.prompt_logprobs else {}),
        }
        for i, output in enumerate(answers.outputs)
        for answer in output.outputs
    ]
    return JSONResponse(_plain({**head, "choices": choices, "usage": answers.usage()}))


async def _chunks(
    state: ServerState,
    body: CompletionRequest,
    head: dict[str, Any],
    inputs: Sequence[ProcessedInput],
    params: SamplingParams,
) -> AsyncGenerator[Any, None]:
    options = body.stream_options
    num_prompt = sum(len(one.prompt_token_ids) for one in inputs)
    num_generated = num_cached = 0
    offsets: dict[int, int] = {}
    if body.echo:
        for i, one in enumerate(inputs):
            for index in range(params.n):
                yield {**head, "choices": [_choice(i * params.n + index, _echo(state, one))]}
    async for i, delta in state.answers(inputs, params):
        if (error := failure(delta)) is not None:
            raise error
        num_generated += len(delta.token_ids)
        index = i * params.n + delta.index
        if delta.final is not None:
            num_cached += delta.final.num_cached_tokens
        if not delta.text and delta.finish_reason is None and not delta.logprobs:
            continue  # half a character, or what may begin a stop string
        chunk = {
            **head,
            "choices": [
                {
                    "index": index,
                    "text": delta.text,
                    "logprobs": _plain(_logprobs(delta.logprobs, offsets.get(index, 0))),
                    "finish_reason": delta.finish_reason,
                    "stop_reason": delta.stop_reason,
                }
            ],
        }
        offsets[index] = offsets.get(index, 0) + len(delta.text)
        if options is not None and options.continuous_usage_stats:
            chunk["usage"] = usage(num_prompt, num_generated, num_cached)
        yield chunk
    if options is not None and options.include_usage:
        yield {
            **head,
            "choices": [],
            "usage": usage(num_prompt, num_generated, num_cached),
        }


def _choice(index: int, text: str) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": None}


def _echo(state: ServerState, one: ProcessedInput) -> str:
    return (
        one.prompt
        if one.prompt is not None
        else state.client.tokenizer.decode(one.prompt_token_ids)
    )


def _logprobs(entries: list[dict[int, Logprob]] | None, offset: int) -> dict[str, Any] | None:
    """OpenAI's older shape: parallel lists."""
    if entries is None:
        return None
    drawn = [next(iter(entry.values())) for entry in entries]
    texts = [one.decoded_token or "" for one in drawn]
    offsets = []
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    return {
        "tokens": texts,
        "token_logprobs": [one.logprob for one in drawn],
        "top_logprobs": [
            {one.decoded_token or "": one.logprob for one in entry.values()} for entry in entries
        ],
        "text_offset": offsets,
    }


def _plain(value: Any) -> Any:
    """JSON's own types: dataclasses as objects, infinite numbers as the least float."""
    if isinstance(value, Logprob):
        value = {
            "logprob": value.logprob,
            "rank": value.rank,
            "decoded_token": value.decoded_token,
        }
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return max(value, -9999.0) if isinstance(value, float) else value
