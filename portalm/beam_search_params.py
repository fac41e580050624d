"""What a caller may ask of beam search: checked once, frozen, the same names as in vLLM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from portalm.errors import InvalidRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class BeamSearchParams:
    """How the likeliest continuations of a prompt are searched for."""

    beam_width: int
    """Beams that are followed, and continuations that are given."""
    max_tokens: int = 16
    """Most tokens of a continuation."""
    ignore_eos: bool = False
    """Go on after the model's end-of-sequence token."""
    length_penalty: float = 1.0
    """A continuation's score is its log probability over its length to this power: above 0
    favours long ones, below 0 short ones."""
    early_stopping: bool | Literal["never"] = False
    """True: end as soon as `beam_width` beams have ended. False: when those that go on are worse,
    by their length now. "never": when they cannot become better at any length."""

    def __post_init__(self) -> None:
        """Reject what cannot work, naming the field."""
        for name in ("beam_width", "max_tokens"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InvalidRequest(
                    f"{name} must be a whole number from 1, not {value!r}", param=name
                )
        penalty = self.length_penalty
        if isinstance(penalty, bool) or not isinstance(penalty, int | float) or abs(penalty) > 10:
            raise InvalidRequest(
                f"length_penalty must be a number from -10 to 10, not {penalty!r}",
                param="length_penalty",
            )
        if self.early_stopping not in (True, False, "never"):
            raise InvalidRequest(
                f"early_stopping must be true, false or 'never', not {self.early_stopping!r}",
                param="early_stopping",
            )
