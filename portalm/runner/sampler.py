"""How each row of logits is sampled: the SamplingParams of a step's requests as arrays."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from portalm.core.request import Request
from portalm.logits_processor import Biases
from portalm.runner.input_batch import InputBatch, StepArrays
from portalm.runner.logits_processors import LogitsProcessors
from portalm.runner.sampled_rows import SampledRow
from portalm.runner.step_executor import Arrays, SampleArrays
from portalm.runner.token_masks import TokenMasks

_FORBIDDEN = float("-inf")


class Sampler:
    """Builds the `SampleArrays` of a step, vectorized over its rows."""

    def __init__(self, vocab_size: int) -> None:
        """Create a sampler for logits with `vocab_size` columns."""
        self._masks = TokenMasks(vocab_size)
        self._processors = LogitsProcessors(vocab_size)
        self._last_requests: list[Request] = []
        self._last: SampleArrays | None = None
        """Arrays of the last step, if they stay the same while the same requests are sampled."""

    def forget(self, request_ids: list[str]) -> None:
        """Drop the state of requests that no longer run."""
        self._masks.forget(request_ids)

    def build(self, rows: list[SampledRow], arrays: StepArrays, batch: InputBatch) -> SampleArrays:
        """Parameters of [R] rows, padded like `arrays.logits_rows` (pad rows are greedy)."""
        num_rows = len(arrays.logits_rows)
        requests = [row.request for row in rows]
        if (
            self._last is not None
            and requests == self._last_requests
            and num_rows == len(self._last.rows["seed"])
        ):
            return self._last
        built = self._build(rows, arrays, batch)
        self._last_requests = requests
        is_lasting = not any(row.target >= 0 or _depends_on_history(row.request) for row in rows)
        self._last = built if is_lasting else None
        return built

    def every_kind(self, num_rows: int) -> SampleArrays:
        """Parameters of [R] rows that use every kind of sampling at once."""
        one = np.ones(num_rows, np.float32)
        ids = np.zeros((num_rows, 1), np.int32)
        return SampleArrays(
            rows={
                "temperature": one,
                "top_k": np.full(num_rows, 2, np.int32),
                "top_p": one / 2,
                "min_p": one / 2,
                "seed": np.zeros(num_rows, np.int64),
                "allowed": self._masks.everything(num_rows),
                "targets": np.full(num_rows, -1, np.int32),
            },
            penalties={
                "prompt_ids": ids,
                "output_ids": ids,
                "presence": one,
                "frequency": one,
                "repetition": one,
            },
            is_greedy=False,
            has_filters=True,
            num_logprobs=1,
        )

    def _build(self, rows: list[SampledRow], arrays: StepArrays, batch: InputBatch) -> SampleArrays:
        num_rows = len(arrays.logits_rows)
        params = [row.request.params for row in rows]

        def column(
            values: list[float] | list[int], dtype: type, fill: float
        ) -> npt.NDArray[np.generic]:
            padded: npt.NDArray[np.generic] = np.full(num_rows, fill, dtype)
            padded[: len(values)] = values
            return padded

        columns: Arrays = {
            "temperature": column([p.temperature for p in params], np.float32, 0.0),
            "top_k": column([p.top_k for p in params], np.int32, 0),
            "top_p": column([p.top_p for p in params], np.float32, 1.0),
            "min_p": column([p.min_p for p in params], np.float32, 0.0),
            "seed": column([row.request.seed for row in rows], np.int64, 0),
        }
        mask = self._masks.build(rows, num_rows)
        if mask is not None:
            columns["allowed"] = mask
        if any(row.target >= 0 for row in rows):
            columns["targets"] = column([row.target for row in rows], np.int32, -1)
        return SampleArrays(
            rows=columns,
            penalties=self._penalties(rows, arrays, batch),
            bias=self._bias(rows),
            is_greedy=all(p.temperature == 0.0 for p in params),
            has_filters=any(p.top_k > 0 or p.top_p < 1.0 or p.min_p > 0.0 for p in params),
            num_logprobs=_num_logprobs(rows),
        )

    def _penalties(self, rows: list[SampledRow], arrays: StepArrays, batch: InputBatch) -> Arrays:
        """Fields of `Penalties`; empty where no row has any."""
        if not any(row.target < 0 and row.request.params.has_penalties for row in rows):
            return {}
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
        return {
            "prompt_ids": np.where(is_prompt, known, -1).astype(np.int32),
            "output_ids": np.where(is_output, known, -1).astype(np.int32),
            "presence": presence,
            "frequency": frequency,
            "repetition": repetition,
        }

    def _bias(self, rows: list[SampledRow]) -> Arrays:
        """Fields of `LogitBias`; empty where no row has any.

        Entries come from logit_bias, from forbidden tokens (-inf) and from logits processors.
        """
        entries: list[tuple[int, int, float]] = []
        for i, row in enumerate(rows):
            if row.target >= 0:
                continue
            params = row.request.params
            entries.extend((i, token_id, value) for token_id, value in params.logit_bias.items())
            if row.request.grammar is None:  # else the mask forbids them, unless the grammar ends
                entries.extend((i, token_id, _FORBIDDEN) for token_id in row.forbidden_ids)
        parts = self._processors.biases(rows)
        if entries:
            row_ids, token_ids, values = zip(*entries, strict=True)
            own = Biases(np.array(row_ids), np.array(token_ids), np.array(values))
            parts.insert(0, own)
        if not parts:
            return {}
        row_array, id_array, value_array = (np.concatenate(x) for x in zip(*parts, strict=True))
        return {
            "rows": row_array.astype(np.int32),
            "token_ids": id_array.astype(np.int32),
            "values": value_array.astype(np.float32),
        }


def positions_of(rows: list[SampledRow], num_rows: int) -> npt.NDArray[np.int64]:
    """Position of each sampled token in its request: [num_rows], 0 for pad rows."""
    positions = np.zeros(num_rows, np.int64)
    positions[: len(rows)] = [row.position for row in rows]
    return positions


def _depends_on_history(request: Request) -> bool:
    """True if the sampling arrays of `request` change from step to step."""
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
    """The largest number of logprobs that a row requests; None if no row does."""
    wanted = [n for row in rows if (n := num_logprobs_of(row)) is not None]
    return max(wanted) if wanted else None


def num_logprobs_of(row: SampledRow) -> int | None:
    """Number of most likely tokens to report for this row; None: no logprobs."""
    params = row.request.params
    return params.prompt_logprobs if row.target >= 0 else params.logprobs
