"""Logits processors from other packages: their interface, and how they are found."""

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
    """A row of logits for a processor to change."""

    argument: Any
    """The request's argument for the processor."""
    prompt_token_ids: Sequence[int]
    output_token_ids: Sequence[int]
    """Tokens generated so far."""


class Biases(NamedTuple):
    """Values to add to logits; -inf forbids a token. Entries for the same element add up."""

    rows: npt.NDArray[np.integer[Any]]
    """[N]: indices into the rows passed to the processor."""
    token_ids: npt.NDArray[np.integer[Any]]
    """[N]: columns of the logits."""
    values: npt.NDArray[np.floating[Any]]
    """[N]: finite, or -inf."""


class LogitsProcessor(ABC):
    """Changes the logits of the requests that name it. One object per engine, one call per step.

    It runs on the host and returns values to add, so that it works on every device and in captured
    steps; it does not see the logits. Its values are added together with `logit_bias`: after the
    penalties, before the temperature. They should depend on the row alone: then a request that is
    computed again (after preemption, or by a restarted engine) samples the same tokens.
    """

    def __init__(self, vocab_size: int) -> None:
        """Prepare for logits with `vocab_size` columns."""
        self.vocab_size = vocab_size

    @classmethod
    def check(cls, argument: Any) -> None:
        """Raise `ValueError` with the reason if a request's argument is invalid.

        By default, only None is valid.
        """
        if argument is not None:
            raise ValueError("it takes no argument: pass null")

    @abstractmethod
    def biases(self, rows: Sequence[ProcessedRow]) -> Biases:
        """Return the values to add to the logits of `rows`. An exception fails their requests."""


LOGITS_PROCESSORS: Plugins[LogitsProcessor] = Plugins(
    LogitsProcessor,  # type: ignore[type-abstract]  # subclasses are concrete
    kind="logits processor",
    group="portalm.logits_processors",
)


def check_logits_processors(arguments: Mapping[str, Any]) -> None:
    """Raise `InvalidRequest` for a processor that is not installed, or an invalid argument."""
    for name, argument in arguments.items():
        try:
            processor = LOGITS_PROCESSORS.get(name)
            msgspec.msgpack.encode(argument)
            processor.check(argument)
        except ConfigError as error:
            raise InvalidRequest(str(error), param="logits_processors") from error
        except Exception as error:  # code of another package: it may raise anything
            raise InvalidRequest(
                f"logits_processors: {name} does not accept {argument!r:.100}: {error}",
                param="logits_processors",
            ) from error
