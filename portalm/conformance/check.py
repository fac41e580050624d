"""A check: a named rule of one level, and the cases to run it on."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from portalm.conformance.base import Case, CheckFailed, NotClaimed, Status
from portalm.conformance.subject import Subject

RunCase = Callable[[Subject, Any], float | None]
"""Runs one case and returns the NMSE if it measures one; raises `CheckFailed` or `NotClaimed`."""


@dataclass(frozen=True, slots=True)
class Check:
    """A rule and the cases to run it on."""

    level: str
    name: str
    run: RunCase
    cases: Sequence[Case] = ()
    """Empty: the rule runs once, without a case."""

    def items(self) -> list[Item]:
        """Return one item per case."""
        if not self.cases:
            return [Item(self.level, self.name, "", self.run, None)]
        return [Item(self.level, self.name, case.name, self.run, case) for case in self.cases]


@dataclass(frozen=True, slots=True)
class Result:
    """The result of one item."""

    level: str
    check: str
    case: str
    status: Status
    seconds: float
    nmse: float | None = None
    message: str = ""
    """Why it failed, or what is not claimed; empty if it passed."""
    is_crash: bool = False
    """It failed with an exception other than `CheckFailed`."""

    @property
    def name(self) -> str:
        """Check and case as check[case]."""
        return _name(self.check, self.case)


@dataclass(frozen=True, slots=True)
class Item:
    """One case of one check: the unit that the CLI counts and pytest collects."""

    level: str
    check: str
    case: str
    _run: RunCase
    _argument: Any

    @property
    def name(self) -> str:
        """Check and case as check[case]."""
        return _name(self.check, self.case)

    def run(self, subject: Subject) -> Result:
        """Run the case. Any failure is returned as a result, never raised."""
        started = time.perf_counter()
        status: Status = "pass"
        nmse, message, is_crash = None, "", False
        try:
            nmse = self._run(subject, self._argument)
        except NotClaimed as reason:
            status, message = "unsupported", str(reason)
        except CheckFailed as failure:
            status, message, nmse = "fail", str(failure), failure.nmse
        except Exception as error:  # a crash of the backend is a finding of the kit
            status, is_crash = "fail", True
            message = f"{type(error).__name__}: {error}\n{_where(error)}"
        seconds = time.perf_counter() - started
        return Result(self.level, self.check, self.case, status, seconds, nmse, message, is_crash)


def _name(check: str, case: str) -> str:
    return f"{check}[{case}]" if case else check


def _where(error: Exception) -> str:
    """Format the last few frames of the traceback, so that the fault is found without a rerun."""
    return "".join(traceback.format_tb(error.__traceback__)[-3:]).rstrip()
