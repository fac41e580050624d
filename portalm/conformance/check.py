"""A check: a named rule of one level, run on a backend for each of its cases."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from portalm.conformance.subject import Subject

LEVELS = {
    "L0": "claims",
    "L1": "operations against the reference",
    "L2": "laws, bit for bit",
    "L3": "models",
    "L4": "serving",
}

Status = Literal["pass", "fail", "unsupported"]


class CheckFailed(Exception):
    """The backend broke a rule; the text has the numbers."""

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
    """A case that is no more than its name."""

    name: str


RunCase = Callable[["Subject", Any], "float | None"]
"""Raises `CheckFailed` or `NotClaimed`; returns the NMSE where one was measured."""


@dataclass(frozen=True, slots=True)
class Check:
    """A rule and the cases it is tried on."""

    level: str
    name: str
    run: RunCase
    cases: Sequence[Case] = ()
    """Empty: the rule is tried once."""

    def items(self) -> list[Item]:
        """The check's cases, each to be run on its own."""
        if not self.cases:
            return [Item(self.level, self.name, "", self.run, None)]
        return [Item(self.level, self.name, case.name, self.run, case) for case in self.cases]


@dataclass(frozen=True, slots=True)
class Result:
    """What came of one item."""

    level: str
    check: str
    case: str
    status: Status
    seconds: float
    nmse: float | None = None
    message: str = ""
    """Why it failed or what is not claimed."""

    @property
    def name(self) -> str:
        """Check and case: check[case]."""
        return _name(self.check, self.case)


@dataclass(frozen=True, slots=True)
class Item:
    """One case of one check: what the command line counts and pytest collects."""

    level: str
    check: str
    case: str
    _run: RunCase
    _argument: Any

    @property
    def name(self) -> str:
        """Check and case: check[case]."""
        return _name(self.check, self.case)

    def run(self, subject: Subject) -> Result:
        """Try it; a failure of any kind is a result, not an exception."""
        started = time.perf_counter()
        status: Status = "pass"
        nmse, message = None, ""
        try:
            nmse = self._run(subject, self._argument)
        except NotClaimed as reason:
            status, message = "unsupported", str(reason)
        except CheckFailed as failure:
            status, message, nmse = "fail", str(failure), failure.nmse
        except Exception as error:  # the backend broke: that is what is being found out
            status = "fail"
            message = f"{type(error).__name__}: {error}\n{_where(error)}"
        seconds = time.perf_counter() - started
        return Result(self.level, self.check, self.case, status, seconds, nmse, message)


def _name(check: str, case: str) -> str:
    return f"{check}[{case}]" if case else check


def _where(error: Exception) -> str:
    """The last few frames, so that a broken backend is found without running it again."""
    return "".join(traceback.format_tb(error.__traceback__)[-3:]).rstrip()
