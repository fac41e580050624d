"""From hidden states to what a request asked for: one vector, or a score.

A prompt that is computed in chunks is pooled in chunks: of its states only the sum is kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from portalm.core.plan import PlannedRequest, StepPlan
from portalm.pooling_params import PoolingParams

_SHORTEST = 1e-12
"""Length below which a vector is not scaled up."""


@dataclass(frozen=True, slots=True)
class PooledPart:
    """The tokens of one request in a step whose hidden states count."""

    index: int
    """Place in the plan."""
    planned: PlannedRequest
    params: PoolingParams
    first: int
    """The first of them, from the request's first token in the step."""
    num_states: int
    is_last: bool
    """Its prompt is computed with this step."""


def pooled_parts(plan: StepPlan) -> list[PooledPart]:
    """One for each request of the plan that is pooled, in the plan's order."""
    if not plan.has_pooled:
        return []
    return [
        _part(index, planned, params)
        for index, planned in enumerate(plan.requests)
        if (params := planned.request.pooling) is not None
    ]


def state_rows(
    parts: list[PooledPart], query_start_loc: npt.NDArray[np.int32]
) -> npt.NDArray[np.int32]:
    """The step's tokens whose hidden states are wanted, int32 [P], in the order of `parts`."""
    firsts = [int(query_start_loc[part.index]) + part.first for part in parts]
    rows = [
        np.arange(first, first + part.num_states, dtype=np.int32)
        for first, part in zip(firsts, parts, strict=True)
    ]
    return np.concatenate(rows)


def _part(index: int, planned: PlannedRequest, params: PoolingParams) -> PooledPart:
    is_last = planned.start + planned.num_tokens == planned.request.num_prompt_tokens
    if params.pooling == "mean":
        first, count = 0, planned.num_tokens
    elif params.pooling == "last":
        first, count = planned.num_tokens - 1, int(is_last)
    else:  # the first token's: of a vector, or what a classifier reads
        first, count = 0, int(planned.start == 0)
    return PooledPart(index, planned, params, first, count, is_last)


class Pooler:
    """Sums of hidden states of the prompts that are not computed yet."""

    def __init__(self) -> None:
        """No prompt has begun."""
        self._sums: dict[str, npt.NDArray[np.float64]] = {}

    def forget(self, request_ids: list[str]) -> None:
        """These do not run any more; what they have is of no use."""
        for request_id in request_ids:
            self._sums.pop(request_id, None)

    def take(
        self, parts: list[PooledPart], states: npt.NDArray[np.float32]
    ) -> dict[int, npt.NDArray[np.float32]]:
        """Add a step's `states`, [P, N], to the sums; return the complete vectors by plan index."""
        done: dict[int, npt.NDArray[np.float32]] = {}
        start = 0
        for part in parts:
            request = part.planned.request
            request_id = request.request_id
            if part.planned.start == 0:
                self._sums.pop(request_id, None)  # of an earlier try
            total = self._sums.pop(request_id, None)
            if part.num_states:
                new = states[start : start + part.num_states].sum(axis=0, dtype=np.float64)
                total = new if total is None else total + new
                start += part.num_states
            if total is None:
                continue  # its first token's turn, or its last one's, is not now
            if part.is_last:
                count = request.num_prompt_tokens if part.params.pooling == "mean" else 1
                done[part.index] = _finish(total / count, part.params)
            else:
                self._sums[request_id] = total
        return done


def _finish(vector: npt.NDArray[np.float64], params: PoolingParams) -> npt.NDArray[np.float32]:
    """Cut to the wanted dimensions, then to length 1."""
    vector = vector[: params.dimensions]
    if params.normalize:
        vector = vector / max(float(np.linalg.norm(vector)), _SHORTEST)
    return vector.astype(np.float32)
