"""Types that all modules of the kit share: levels, cases and the outcomes of a check."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

LEVELS = {
    "L0": "claims",
    "L1": "operations against the reference",
    "L2": "laws, bit for bit",
    "L3": "models",
    "L4": "serving",
}

Status = Literal["pass", "fail", "unsupported"]


class CheckFailed(Exception):
    """The backend broke a rule; the message has the numbers."""

    def __init__(
        self, message: str, *, nmse: float | None = None, bound: float | None = None
    ) -> None:
        super().__init__(message)
        self.nmse = nmse
        self.bound = bound


class NotClaimed(Exception):
    """The case needs something that the backend does not claim."""


class Case(Protocol):
    """One set of inputs of a check."""

    @property
    def name(self) -> str:
        """Unique within its check."""
        ...


@dataclass(frozen=True, slots=True)
class Named:
    """A case that consists of its name."""

    name: str
