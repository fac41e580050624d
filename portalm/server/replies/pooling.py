"""What the endpoints that pool share: many prompts checked, pooled, and waited for."""

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
    """Each prompt, and the float32 numbers that came of it, in order.

    Args:
        request: aborted if its client leaves.
        state: the server's.
        body: whose fields say for whom and how urgent.
        base_id: of the engine's requests; several are numbered.
        prompts: what to pool.
        params: for all of them.
        labels: what the caller calls each prompt: its field, with its place in a list.

    Raises:
        InvalidRequest: a prompt cannot be answered; it says which.
        RequestFailed: the engine failed on one.
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
    """OpenAI's usage object: nothing is generated."""
    num_tokens = sum(len(output.prompt_token_ids) for output in outputs)
    return {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
