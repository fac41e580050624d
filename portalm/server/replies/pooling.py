"""Shared by the pooling endpoints: check many prompts, pool them, and wait for the results."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import Request

from portalm.engine.input_processor import NO_ANSWER, ProcessedInput, TextPair
from portalm.errors import InvalidRequest
from portalm.outputs import RequestOutput
from portalm.pooling_params import PoolingParams
from portalm.server.auth import salt_for, tenant_of
from portalm.server.replies.answers import collect
from portalm.server.schemas.pooling import PoolingFields
from portalm.server.state import ServerState


async def pool(
    request: Request,
    state: ServerState,
    body: PoolingFields,
    base_id: str,
    prompts: Sequence[str | list[int] | TextPair],
    params: PoolingParams,
    labels: Sequence[str],
) -> list[tuple[RequestOutput, bytes]]:
    """Pool prompts.

    Args:
        request: aborted if its client disconnects.
        state: state of the server.
        body: gives the request id, priority and cache salt.
        base_id: request id, if the body has none; the ids of several prompts are numbered.
        prompts: the prompts to pool.
        params: pooling parameters of all prompts.
        labels: for errors, the field of the body that holds each prompt, such as "input[2]".

    Returns:
        For each prompt its output and the float32 values of its vector or score, as bytes.

    Raises:
        InvalidRequest: a prompt is invalid; the text names it.
        RequestFailed: the engine failed on a prompt.
    """
    base_id = body.request_id or base_id
    inputs: list[ProcessedInput] = []
    for i, prompt in enumerate(prompts):
        try:
            one = await state.client.check_pooling(
                base_id if len(prompts) == 1 else f"{base_id}-{i}",
                prompt,
                params,
                priority=body.priority,
                cache_salt=salt_for(request, body.cache_salt),
                tenant=tenant_of(request),
            )
        except InvalidRequest as error:
            if error.param != "prompt":
                raise
            field = labels[i].partition("[")[0]
            raise InvalidRequest(f"{labels[i]}: {error}", param=field) from error
        inputs.append(one)
    answers = await collect(request, state, inputs, NO_ANSWER)
    return [(output, output.pooled or b"") for output in answers.outputs]


def usage(outputs: Sequence[RequestOutput]) -> dict[str, int]:
    """OpenAI's usage object for requests that generate no tokens."""
    num_tokens = sum(len(output.prompt_token_ids) for output in outputs)
    return {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
