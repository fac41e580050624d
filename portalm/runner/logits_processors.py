"""Runs the logits processors that requests name, each once per step over all of its rows."""

from __future__ import annotations

import logging

import numpy as np
import numpy.typing as npt

from portalm.logits_processor import LOGITS_PROCESSORS, Biases, LogitsProcessor, ProcessedRow
from portalm.runner.sampled_rows import SampledRow

logger = logging.getLogger(__name__)


class LogitsProcessors:
    """The processors that requests have named so far, created on first use."""

    def __init__(self, vocab_size: int) -> None:
        """Start without processors, for logits with `vocab_size` columns."""
        self._vocab_size = vocab_size
        self._made: dict[str, LogitsProcessor] = {}

    def biases(self, rows: list[SampledRow]) -> list[Biases]:
        """Run the processors of `rows`; a row whose processor fails gets a `fault`."""
        rows_of: dict[str, list[int]] = {}
        for i, row in enumerate(rows):
            if row.target < 0:
                for name in row.request.params.logits_processors:
                    rows_of.setdefault(name, []).append(i)
        found: list[Biases] = []
        for name, places in rows_of.items():
            try:
                found.append(self._run(name, rows, np.array(places, np.int32)))
            except Exception as error:  # code of another package may raise anything
                logger.exception("the logits processor %r failed", name)
                why = f"the logits processor {name!r} failed: {type(error).__name__}: {error}"
                for i in places:
                    rows[i].fault = why
        return found

    def _run(self, name: str, rows: list[SampledRow], places: npt.NDArray[np.int32]) -> Biases:
        processor = self._made.get(name)
        if processor is None:
            processor = self._made[name] = LOGITS_PROCESSORS.get(name)(self._vocab_size)
        given = [_processed(rows[i], name) for i in places]
        inner, token_ids, values = (np.asarray(part) for part in processor.biases(given))
        if not inner.shape == token_ids.shape == values.shape == (inner.size,):
            raise ValueError(
                "rows, token_ids and values must be one-dimensional and equally long; got shapes "
                f"{inner.shape}, {token_ids.shape} and {values.shape}"
            )
        _check_range("rows", inner, len(given))
        _check_range("token_ids", token_ids, self._vocab_size)
        values = values.astype(np.float32)
        if not (np.isfinite(values) | np.isneginf(values)).all():
            raise ValueError("values must be finite or -inf")
        return Biases(places[inner], token_ids.astype(np.int32), values)


def _processed(row: SampledRow, name: str) -> ProcessedRow:
    request, num_prompt = row.request, row.request.num_prompt_tokens
    return ProcessedRow(
        request.params.logits_processors[name],
        request.token_ids[:num_prompt],
        request.token_ids[num_prompt:],
    )


def _check_range(what: str, values: npt.NDArray[np.generic], end: int) -> None:
    if values.size and not np.issubdtype(values.dtype, np.integer):
        raise ValueError(f"{what} must be integers; got {values.dtype}")
    if values.size and not (values.min() >= 0 and values.max() < end):
        raise ValueError(f"{what} must be from 0 to {end - 1}")
