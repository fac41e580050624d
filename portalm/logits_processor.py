"""Logits processors of others: what they may change, and where they are found."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from portalm.errors import ConfigError, InvalidRequest
from portalm.plugins import Plugins


class ProcessedRow(NamedTuple):
    """A row of logits that a processor was asked to change."""

    argument: Any
    """What the request gave it."""
    prompt_token_ids: Sequence[int]
    output_token_ids: Sequence[int]
    """Drawn before."""


class Biases(NamedTuple):
    """What is added to logits; -inf forbids a token. Entries of the same place add up."""

    rows: npt.NDArray[np.integer[Any]]
    """[N]: places in the rows that the processor was given."""
    token_ids: npt.NDArray[np.integer[Any]]
    """[N]"""
    values: npt.NDArray[np.floating[Any]]
    """[N]: finite, or -inf."""


class LogitsProcessor(ABC):
    """Changes the logits of the requests that name it; one object an engine, one call a step.

    It runs on the host and says what to add, so that it works on every device and in captured
    steps; it does not see the logits. It is applied where `logit_bias` is: behind the penalties,
    before the temperature. What it gives should follow from a row alone: then a request that is
    computed again (after preemption, in another engine) draws the same tokens.
    """

    def __init__(self, vocab_size: int) -> None:
        """For logits of `vocab_size` columns."""
        self.vocab_size = vocab_size

    @classmethod
    def check(cls, argument: Any) -> None:
        """Raise `ValueError`, saying why, for an argument that a request may not give.

        This takes none.
        """
        if argument is not None:
            raise ValueError("it takes no argument: give null")

    @abstractmethod
    def biases(self, rows: Sequence[ProcessedRow]) -> Biases:
        """What to add to the logits of these rows; whatever it raises ends their requests."""


LOGITS_PROCESSORS: Plugins[LogitsProcessor] = Plugins(
    LogitsProcessor,  # type: ignore[type-abstract]  # they are its subclasses
    kind="logits processor",
    group="portalm.logits_processors",
)


def check_logits_processors(asked: Mapping[str, Any]) -> None:
    """Raise `InvalidRequest` for a name that is not installed or an argument it does not take."""
    for name, argument in asked.items():
        try:
            processor = LOGITS_PROCESSORS.get(name)
            msgspec.msgpack.encode(argument)
            processor.check(argument)
        except ConfigError as error:
            raise InvalidRequest(str(error), param="logits_processors") from error
        except Exception as error:  # code of another package: it may raise anything
            raise InvalidRequest(
                f"logits_processors: {name} does not take {argument!r:.100}: {error}",
                param="logits_processors",
            ) from error
