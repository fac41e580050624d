"""Collect whole answers, for requests that do not stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request

from portalm.engine.input_processor import ProcessedInput
from portalm.outputs import RequestOutput
from portalm.sampling_params import SamplingParams
from portalm.server.replies.presence import while_connected
from portalm.server.replies.stream import usage
from portalm.server.state import ServerState, failure


@dataclass(slots=True)
class Answers:
    """Outputs of one HTTP request, one per prompt."""

    outputs: list[RequestOutput] = field(default_factory=list)

    def num_cached(self) -> int:
        """Number of prompt tokens found in the prefix cache."""
        return sum(output.num_cached_tokens for output in self.outputs)

    def usage(self) -> dict[str, Any]:
        """OpenAI's usage object."""
        return usage(
            sum(len(output.prompt_token_ids) for output in self.outputs),
            sum(len(a.token_ids) for output in self.outputs for a in output.outputs),
            self.num_cached(),
        )


async def collect(
    request: Request, state: ServerState, inputs: Sequence[ProcessedInput], params: SamplingParams
) -> Answers:
    """Wait for all answers; abort them if the client disconnects.

    Raises:
        ClientDisconnect: the client disconnected.
        InvalidRequest: the engine refused the request.
        RequestFailed: the engine failed on the request.
    """
    found: dict[int, RequestOutput] = {}

    async def gather() -> None:
        async for i, delta in state.answers(inputs, params):
            if (error := failure(delta)) is not None:
                raise error
            if delta.final is not None:
                found[i] = delta.final

    await while_connected(request.receive, gather())
    return Answers([found[i] for i in sorted(found)])
