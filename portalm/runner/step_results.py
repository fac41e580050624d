"""From a step's output on the host to the outcomes of its requests."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable

import numpy as np

from portalm.core.plan import (
    Failed,
    Outcome,
    Pooled,
    Refused,
    Sampled,
    StepPlan,
    StepResult,
    TokenLogprobs,
)
from portalm.runner.pooler import PooledPart, Pooler
from portalm.runner.sampled_rows import SampledRow
from portalm.runner.sampler import num_logprobs_of
from portalm.runner.step_executor import StepInFlight


class DispatchedStep:
    """A planned step whose output is on its way to the host."""

    def __init__(
        self,
        plan: StepPlan,
        rows: list[SampledRow],
        parts: list[PooledPart],
        pooler: Pooler,
        in_flight: StepInFlight,
    ) -> None:
        """Keep what `result` needs to read the output.

        Args:
            plan: what the step computes.
            rows: its rows of logits.
            parts: its hidden states, in order.
            pooler: sums of hidden states; `result` of each step must be called in order.
            in_flight: the output.
        """
        self.plan = plan
        self._rows = rows
        self._parts = parts
        self._pooler = pooler
        self._in_flight = in_flight

    def result(self) -> StepResult:
        """Wait for the step and return its outcomes.

        Raises:
            BackendError: the device failed.
        """
        ids = self._in_flight.token_ids.result().tolist()
        outcomes: list[Outcome | None] = [None] * len(self.plan.requests)
        prompt_logprobs: dict[int, list[TokenLogprobs]] = {}
        # ids of pad rows come last
        for row, token_id, entry in zip(self._rows, ids, self._logprobs(ids), strict=False):
            if row.target < 0:
                outcomes[row.index] = outcome_of(row, token_id, entry)
            elif entry is not None:
                prompt_logprobs.setdefault(row.index, []).append(entry)
        if self._parts:
            self._add_pooled(outcomes)
        return StepResult(outcomes, prompt_logprobs)

    def _logprobs(self, ids: list[int]) -> Iterable[TokenLogprobs | None]:
        """Each row's logprobs; None where not requested."""
        if self._in_flight.logprobs is None:
            return itertools.repeat(None)
        logprobs, ranks, top_ids, top_logprobs = (x.result() for x in self._in_flight.logprobs)
        entries: list[TokenLogprobs | None] = []
        for i, row in enumerate(self._rows):
            wanted = num_logprobs_of(row)
            if wanted is None or (not math.isfinite(logprobs[i]) and ids[i] < 0):
                entries.append(None)
                continue
            top = zip(top_ids[i, :wanted].tolist(), top_logprobs[i, :wanted].tolist(), strict=True)
            entries.append(TokenLogprobs(ids[i], float(logprobs[i]), int(ranks[i]), list(top)))
        return entries

    def _add_pooled(self, outcomes: list[Outcome | None]) -> None:
        states = self._in_flight.states
        # none where the first token is pooled and this step has only later chunks
        found = np.empty((0, 0), np.float32) if states is None else states.result()
        for index, vector in self._pooler.add(self._parts, found).items():
            if np.isfinite(vector).all():
                outcomes[index] = Pooled(vector.tobytes())
            else:
                outcomes[index] = Failed(
                    "the model's hidden states contain NaN or infinity: they cannot be pooled"
                )


def outcome_of(row: SampledRow, token_id: int, entry: TokenLogprobs | None) -> Outcome:
    """The outcome of a row that samples a token; a token id of -1 means that none was sampled."""
    if token_id >= 0 and row.fault is None:
        return Sampled([token_id], None if entry is None else [entry])
    if row.refusal is not None and token_id < 0:
        return Refused(row.refusal)
    if row.fault is not None:
        return Failed(row.fault)
    return Failed(
        f"the model's logits after token {row.position - 1} contain NaN or only -inf: no token can "
        "be sampled"
    )
