"""Parameters of pooling: how a prompt becomes a vector, or a pair of texts a score."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NoReturn, get_args

from portalm.config import PoolingConfig, PoolingName
from portalm.errors import InvalidRequest

PoolingTask = Literal["embed", "score"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolingParams:
    """How to pool a prompt's hidden states; names as in vLLM."""

    pooling: PoolingName | None = None
    """Which hidden states make the vector: mean of all tokens, the first token's (cls), or the last
    token's. None: the model's own."""
    normalize: bool | None = None
    """True: scale the vector to length 1. None: the model's own."""
    dimensions: int | None = None
    """Number of leading elements to keep, at least 1, before normalization; for models trained for
    it (Kusupati et al., "Matryoshka representation learning", 2022). None: all."""
    task: PoolingTask = "embed"
    """embed: a vector of one text. score: a cross-encoder's score of a pair of texts."""
    truncate_prompt_tokens: int | None = None
    """Truncate the prompt to this many tokens, keeping its beginning and the special tokens at its
    end. -1: to the model's maximum. None: reject a prompt that is too long."""

    def __post_init__(self) -> None:
        """Reject invalid values; the error names the field."""
        if self.pooling is not None and self.pooling not in get_args(PoolingName):
            names = ", ".join(get_args(PoolingName))
            _refuse("pooling", f"must be one of {names}, not {self.pooling!r}")
        if self.normalize is not None and not isinstance(self.normalize, bool):
            _refuse("normalize", f"must be true or false, not {self.normalize!r}")
        if self.task not in get_args(PoolingTask):
            _refuse("task", f"must be one of {', '.join(get_args(PoolingTask))}, not {self.task!r}")
        _count("dimensions", self.dimensions)
        if self.truncate_prompt_tokens != -1:
            _count("truncate_prompt_tokens", self.truncate_prompt_tokens)
        if self.task == "score":
            for name in ("pooling", "normalize", "dimensions"):
                if getattr(self, name) is not None:
                    _refuse(
                        name, 'cannot be used with task "score", whose result is a single number'
                    )

    def resolved(self, model: PoolingConfig) -> PoolingParams:
        """Return a copy with the model's own pooling for fields that are None."""
        if self.task == "score":
            return self
        return replace(
            self,
            pooling=self.pooling or model.pooling,
            normalize=model.normalize if self.normalize is None else self.normalize,
        )

    @property
    def needs_all_states(self) -> bool:
        """Whether all hidden states are read, so that no token may come from the prefix cache."""
        return self.pooling != "last"


def _count(name: str, value: object) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        _refuse(name, f"must be an integer of at least 1, not {value!r}")


def _refuse(name: str, problem: str) -> NoReturn:
    raise InvalidRequest(f"{name} {problem}", param=name)
