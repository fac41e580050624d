"""Parameters of beam search: frozen, checked once, with the names of vLLM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from portalm.errors import InvalidRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class BeamSearchParams:
    """How to search for the most likely continuations of a prompt."""

    beam_width: int
    """Number of beams to extend at once, and of continuations to return; at least 1."""
    max_tokens: int = 16
    """Maximum number of tokens of a continuation, at least 1."""
    ignore_eos: bool = False
    """True: continue after the model's end-of-sequence token."""
    length_penalty: float = 1.0
    """A continuation's score is its log probability divided by its length to this power, -10 to 10:
    above 0 favors long continuations, below 0 short ones."""
    early_stopping: bool | Literal["never"] = False
    """When to stop once `beam_width` beams have ended. True: at once. False: when no running beam
    scores better at its current length. "never": when none can score better at any length."""

    def __post_init__(self) -> None:
        """Reject invalid values; the error names the field."""
        for name in ("beam_width", "max_tokens"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InvalidRequest(
                    f"{name} must be an integer of at least 1, not {value!r}", param=name
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
