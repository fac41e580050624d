"""What each row of logits is drawn with: SamplingParams of the batch as arrays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from portalm.backend import LogitBias, Penalties, SampleParams
from portalm.core.plan import StepPlan
from portalm.core.request import Request
from portalm.runner.input_batch import InputBatch, StepArrays, num_prompt_rows

ToDevice = Callable[[npt.NDArray[np.generic]], torch.Tensor]

_FORBIDDEN = float("-inf")


@dataclass(slots=True, kw_only=True)
class SampledRow:
    """What one row of logits is for."""

    index: int
    """Place in the plan."""
    request: Request
    position: int
    """Place of the drawn (or predicted) token in its request."""
    target: int
    """The prompt token whose logprob is wanted, or -1: a token is drawn."""


def sampled_rows(plan: StepPlan) -> list[SampledRow]:
    """The plan's rows of logits, in the order of `StepArrays.logits_rows`."""
    rows: list[SampledRow] = []
    for index, planned in enumerate(plan.requests):
        request, start = planned.request, planned.start
        rows.extend(
            SampledRow(
                index=index,
                request=request,
                position=start + i + 1,
                target=request.token_ids[start + i + 1],
            )
            for i in range(num_prompt_rows(planned))
        )
        if planned.draws_token:
            rows.append(
                SampledRow(
                    index=index, request=request, position=start + planned.num_tokens, target=-1
                )
            )
    return rows


class Sampler:
    """Builds `SampleParams` for a step, vectorised over its rows."""

    def __init__(self, vocab_size: int) -> None:
        """For logits of `vocab_size` columns."""
        self.vocab_size = vocab_size
        self._last_requests: list[Request] = []
        self._last: SampleParams | None = None
        """Of the last step, if nothing but the positions differs where the same requests draw."""

    def build(
        self, rows: list[SampledRow], arrays: StepArrays, batch: InputBatch, to_device: ToDevice
    ) -> SampleParams:
        """Parameters of [R] rows, padded as `arrays.logits_rows` is (pad rows are greedy)."""
        num_rows = len(arrays.logits_rows)
        requests = [row.request for row in rows]
        if self._last is not None and requests == self._last_requests and num_rows == len(rows):
            position = np.array([row.position for row in rows], np.int64)
            return replace(self._last, position=to_device(position))
        built = self._build(rows, arrays, batch, to_device)
        self._last_requests = requests
        is_lasting = num_rows == len(rows) and not any(
            row.target >= 0 or _depends_on_history(row.request) for row in rows
        )
        self._last = built if is_lasting else None
        return built

    def _build(
        self, rows: list[SampledRow], arrays: StepArrays, batch: InputBatch, to_device: ToDevice
    ) -> SampleParams:
        num_rows = len(arrays.logits_rows)
        params = [row.request.params for row in rows]

        def column(values: list[float] | list[int], dtype: type, fill: float) -> torch.Tensor:
            padded: npt.NDArray[np.generic] = np.full(num_rows, fill, dtype)
            padded[: len(values)] = values
            return to_device(padded)

        has_targets = any(row.target >= 0 for row in rows)
        return SampleParams(
            temperature=column([p.temperature for p in params], np.float32, 0.0),
            top_k=column([p.top_k for p in params], np.int32, 0),
            top_p=column([p.top_p for p in params], np.float32, 1.0),
            min_p=column([p.min_p for p in params], np.float32, 0.0),
            seed=column([row.request.seed for row in rows], np.int64, 0),
            position=column([row.position for row in rows], np.int64, 0),
            is_greedy=all(p.temperature == 0.0 for p in params),
            has_filters=any(p.top_k > 0 or p.top_p < 1.0 or p.min_p > 0.0 for p in params),
            penalties=self._penalties(rows, arrays, batch, to_device),
            bias=self._bias(rows, to_device),
            allowed=self._allowed(rows, num_rows, to_device),
            targets=column([row.target for row in rows], np.int32, -1) if has_targets else None,
            num_logprobs=_num_logprobs(rows),
        )

    def _penalties(
        self, rows: list[SampledRow], arrays: StepArrays, batch: InputBatch, to_device: ToDevice
    ) -> Penalties | None:
        if not any(row.target < 0 and row.request.params.has_penalties for row in rows):
            return None
        num_rows = len(arrays.logits_rows)
        presence = np.zeros(num_rows, np.float32)
        frequency = np.zeros(num_rows, np.float32)
        repetition = np.ones(num_rows, np.float32)
        num_prompt = np.zeros(num_rows, np.int32)
        num_known = np.zeros(num_rows, np.int32)
        for i, row in enumerate(rows):
            params = row.request.params
            if row.target < 0 and params.has_penalties:
                presence[i] = params.presence_penalty
                frequency[i] = params.frequency_penalty
                repetition[i] = params.repetition_penalty
                num_prompt[i] = row.request.num_prompt_tokens
                num_known[i] = row.position
        width = max(1, int(num_known.max()))
        batch_rows = np.zeros(num_rows, np.intp)
        batch_rows[: len(rows)] = [arrays.rows[row.index] for row in rows]
        known = batch.token_ids[batch_rows, :width]
        column = np.arange(width)
        is_prompt = column < num_prompt[:, None]
        is_output = ~is_prompt & (column < num_known[:, None])
        return Penalties(
            prompt_ids=to_device(np.where(is_prompt, known, -1).astype(np.int32)),
            output_ids=to_device(np.where(is_output, known, -1).astype(np.int32)),
            presence=to_device(presence),
            frequency=to_device(frequency),
            repetition=to_device(repetition),
        )

    def _bias(self, rows: list[SampledRow], to_device: ToDevice) -> LogitBias | None:
        """logit_bias, and -inf for stop tokens before min_tokens and the ends of bad words."""
        entries: list[tuple[int, int, float]] = []
        for i, row in enumerate(rows):
            if row.target >= 0:
                continue
            request, params = row.request, row.request.params
            entries.extend((i, token_id, value) for token_id, value in params.logit_bias.items())
            if row.position - request.num_prompt_tokens < params.min_tokens:
                entries.extend((i, token_id, _FORBIDDEN) for token_id in request.stop_ids)
            for word in request.bad_words_ids:
                split = len(request.token_ids) - len(word) + 1
                if split >= 0 and request.token_ids[split:] == list(word[:-1]):
                    entries.append((i, word[-1], _FORBIDDEN))
        if not entries:
            return None
        row_ids, token_ids, values = zip(*entries, strict=True)
        return LogitBias(
            rows=to_device(np.array(row_ids, np.int32)),
            token_ids=to_device(np.array(token_ids, np.int32)),
            values=to_device(np.array(values, np.float32)),
        )

    def _allowed(
        self, rows: list[SampledRow], num_rows: int, to_device: ToDevice
    ) -> torch.Tensor | None:
        restricted = [
            (i, row.request.params.allowed_token_ids)
            for i, row in enumerate(rows)
            if row.target < 0 and row.request.params.allowed_token_ids is not None
        ]
        if not restricted:
            return None
        mask = np.full((num_rows, -(-self.vocab_size // 32)), 0xFFFFFFFF, np.uint32)
        for i, token_ids in restricted:
            mask[i] = 0
            ids = np.array(token_ids, np.uint32)
            np.bitwise_or.at(mask[i], ids // 32, np.uint32(1) << (ids % 32))
        return to_device(mask.view(np.int32))


def _depends_on_history(request: Request) -> bool:
    """True if what a draw of `request` allows or costs changes from step to step."""
    params = request.params
    return bool(
        params.has_penalties
        or params.min_tokens
        or params.prompt_logprobs is not None
        or request.bad_words_ids
    )


def _num_logprobs(rows: list[SampledRow]) -> int | None:
    """The most that any row asks for; None if none does."""
    wanted = [n for row in rows if (n := num_logprobs_of(row)) is not None]
    return max(wanted) if wanted else None


def num_logprobs_of(row: SampledRow) -> int | None:
    """How many of the most likely tokens this row's request wants reported; None: no logprobs."""
    params = row.request.params
    return params.prompt_logprobs if row.target >= 0 else params.logprobs
