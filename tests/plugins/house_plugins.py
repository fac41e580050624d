"""A package with logits processors; tests install it by adding this folder to the path."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from portalm.logits_processor import Biases, LogitsProcessor, ProcessedRow


class NoRepeats(LogitsProcessor):
    """Forbids the last N tokens of the answer: {"last": N}."""

    @classmethod
    def check(cls, argument: Any) -> None:
        if not isinstance(argument, dict) or not isinstance(argument.get("last"), int):
            raise ValueError('its argument must be {"last": N}')

    def biases(self, rows: Sequence[ProcessedRow]) -> Biases:
        seen = [row.output_token_ids[-row.argument["last"] :] for row in rows]
        return Biases(
            np.repeat(np.arange(len(rows)), [len(ids) for ids in seen]),
            np.array([token_id for ids in seen for token_id in ids], int),
            np.full(sum(map(len, seen)), -np.inf),
        )


class Careless(LogitsProcessor):
    """Returns its argument as biases, however wrong."""

    @classmethod
    def check(cls, argument: Any) -> None:
        pass

    def biases(self, rows: Sequence[ProcessedRow]) -> Biases:
        return Biases(*(np.array(part) for part in rows[0].argument))


class Stranger:
    """A class that is no logits processor."""
