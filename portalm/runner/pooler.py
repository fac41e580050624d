"""Pools hidden states into a request's output: a vector, or the scores of a classifier.

A prompt that is computed in chunks is pooled in chunks: only the sum of its states is kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from portalm.core.plan import PlannedRequest, StepPlan
from portalm.pooling_params import PoolingParams

_SHORTEST = 1e-12
"""Lower bound of the norm that a vector is divided by."""


@dataclass(frozen=True, slots=True)
class PooledPart:
    """One request's tokens in a step whose hidden states are pooled."""

    index: int
    """Index in the plan."""
    planned: PlannedRequest
    params: PoolingParams
    first: int
    """Index of the first of them among the request's tokens in the step."""
    num_states: int
    is_last: bool
    """This step computes the last token of the prompt."""


def pooled_parts(plan: StepPlan) -> list[PooledPart]:
    """One part for each pooled request of the plan, in plan order."""
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
    """Tokens of the step whose hidden states are needed, int32 [P], in the order of `parts`."""
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
    else:  # the first token, for "cls" vectors and for classifiers
        first, count = 0, int(planned.start == 0)
    return PooledPart(index, planned, params, first, count, is_last)


class Pooler:
    """Running sums of the hidden states of prompts that are computed in chunks."""

    def __init__(self) -> None:
        """Start without sums."""
        self._sums: dict[str, npt.NDArray[np.float64]] = {}

    def forget(self, request_ids: list[str]) -> None:
        """Drop the sums of requests that no longer run."""
        for request_id in request_ids:
            self._sums.pop(request_id, None)

    def add(
        self, parts: list[PooledPart], states: npt.NDArray[np.float32]
    ) -> dict[int, npt.NDArray[np.float32]]:
        """Add a step's `states`, [P, N], to the sums; return the complete vectors by plan index."""
        done: dict[int, npt.NDArray[np.float32]] = {}
        start = 0
        for part in parts:
            request = part.planned.request
            request_id = request.request_id
            if part.planned.start == 0:
                self._sums.pop(request_id, None)  # left from before a preemption
            total = self._sums.pop(request_id, None)
            if part.num_states:
                new = states[start : start + part.num_states].sum(axis=0, dtype=np.float64)
                total = new if total is None else total + new
                start += part.num_states
            if total is None:
                continue  # this chunk does not have the token whose state is pooled
            if part.is_last:
                count = request.num_prompt_tokens if part.params.pooling == "mean" else 1
                done[part.index] = _finish(total / count, part.params)
            else:
                self._sums[request_id] = total
        return done


def _finish(vector: npt.NDArray[np.float64], params: PoolingParams) -> npt.NDArray[np.float32]:
    """Truncate to the requested dimensions, then normalize to length 1 if requested."""
    vector = vector[: params.dimensions]
    if params.normalize:
        vector = vector / max(float(np.linalg.norm(vector)), _SHORTEST)
    return vector.astype(np.float32)
