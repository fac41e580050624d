"""What each row of logits is drawn with: SamplingParams of the batch as arrays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from portalm.backend import LogitBias, Penalties, SampleParams
from portalm.core.request import Request
from portalm.logits_processor import Biases
from portalm.runner.input_batch import InputBatch, StepArrays
from portalm.runner.logits_processors import LogitsProcessors
from portalm.runner.sampled_rows import SampledRow
from portalm.runner.token_masks import TokenMasks

ToDevice = Callable[[npt.NDArray[np.generic]], torch.Tensor]

_FORBIDDEN = float("-inf")


class Sampler:
    """Builds `SampleParams` for a step, vectorised over its rows."""

    def __init__(self, vocab_size: int) -> None:
        """For logits of `vocab_size` columns."""
        self._masks = TokenMasks(vocab_size)
        self._processors = LogitsProcessors(vocab_size)
        self._last_requests: list[Request] = []
        self._last: SampleParams | None = None
        """Of the last step, if nothing but the positions differs where the same requests draw."""

    def forget(self, request_ids: list[str]) -> None:
        """These requests do not run any more."""
        self._masks.forget(request_ids)

    def build(
        self, rows: list[SampledRow], arrays: StepArrays, batch: InputBatch, to_device: ToDevice
    ) -> SampleParams:
        """Parameters of [R] rows, padded as `arrays.logits_rows` is (pad rows are greedy)."""
        num_rows = len(arrays.logits_rows)
        requests = [row.request for row in rows]
        if (
            self._last is not None
            and requests == self._last_requests
            and num_rows == len(self._last.position)
        ):
            position = np.zeros(num_rows, np.int64)
            position[: len(rows)] = [row.position for row in rows]
            return replace(self._last, position=to_device(position))
        built = self._build(rows, arrays, batch, to_device)
        self._last_requests = requests
        is_lasting = not any(row.target >= 0 or _depends_on_history(row.request) for row in rows)
        self._last = built if is_lasting else None
        return built

    def every_kind(self, num_rows: int, to_device: ToDevice) -> SampleParams:
        """Parameters of [R] rows that need all that sampling may need at once."""
        one = np.ones(num_rows, np.float32)
        ids = np.zeros((num_rows, 1), np.int32)
        return SampleParams(
            temperature=to_device(one),
            top_k=to_device(np.full(num_rows, 2, np.int32)),
            top_p=to_device(one / 2),
            min_p=to_device(one / 2),
            seed=to_device(np.zeros(num_rows, np.int64)),
            position=to_device(np.zeros(num_rows, np.int64)),
            is_greedy=False,
            has_filters=True,
            penalties=Penalties(
                prompt_ids=to_device(ids),
                output_ids=to_device(ids),
                presence=to_device(one),
                frequency=to_device(one),
                repetition=to_device(one),
            ),
            allowed=to_device(self._masks.everything(num_rows)),
            targets=to_device(np.full(num_rows, -1, np.int32)),
            num_logprobs=1,
        )

    def _build(
        self, rows: list[SampledRow], arrays: StepArrays, batch: InputBatch, to_device: ToDevice
    ) -> SampleParams:
        num_rows = len(arrays.logits_rows)
        params = [row.request.params for row in rows]

        def column(values: list[float] | list[int], dtype: type, fill: float) -> torch.Tensor:
            padded: npt.NDArray[np.generic] = np.full(num_rows, fill, dtype)
            padded[: len(values)] = values
            return to_device(padded)

        mask = self._masks.build(rows, num_rows)
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
            allowed=None if mask is None else to_device(mask),
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
        """logit_bias, -inf for stop tokens before min_tokens and ends of bad words, processors'."""
        entries: list[tuple[int, int, float]] = []
        for i, row in enumerate(rows):
            if row.target >= 0:
                continue
            params = row.request.params
            entries.extend((i, token_id, value) for token_id, value in params.logit_bias.items())
            if row.request.grammar is None:  # else they are in its mask, unless it has ended
                entries.extend((i, token_id, _FORBIDDEN) for token_id in row.forbidden_ids)
        parts = self._processors.biases(rows)
        if entries:
            row_ids, token_ids, values = zip(*entries, strict=True)
            own = Biases(np.array(row_ids), np.array(token_ids), np.array(values))
            parts.insert(0, own)
        if not parts:
            return None
        row_array, id_array, value_array = (np.concatenate(x) for x in zip(*parts, strict=True))
        return LogitBias(
            rows=to_device(row_array.astype(np.int32)),
            token_ids=to_device(id_array.astype(np.int32)),
            values=to_device(value_array.astype(np.float32)),
        )


def _depends_on_history(request: Request) -> bool:
    """True if what a draw of `request` allows or costs changes from step to step."""
    params = request.params
    return bool(
        params.has_penalties
        or params.min_tokens
        or params.prompt_logprobs is not None
        or request.bad_words_ids
        or params.logits_processors
        or request.grammar is not None
    )


def _num_logprobs(rows: list[SampledRow]) -> int | None:
    """The most that any row asks for; None if none does."""
    wanted = [n for row in rows if (n := num_logprobs_of(row)) is not None]
    return max(wanted) if wanted else None


def num_logprobs_of(row: SampledRow) -> int | None:
    """How many of the most likely tokens this row's request wants reported; None: no logprobs."""
    params = row.request.params
    return params.prompt_logprobs if row.target >= 0 else params.logprobs
