"""All checks, and running them on a backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from portalm.backend import Backend
from portalm.conformance import laws, models, operations, serving
from portalm.conformance.check import LEVELS, Item, Result
from portalm.conformance.subject import Subject
from portalm.errors import ConfigError

CHECKS = (*operations.CHECKS, *laws.CHECKS, *models.CHECKS, *serving.CHECKS)


def all_items(levels: Sequence[str] = (), pattern: str = "") -> list[Item]:
    """Every case of every check of these levels (none: all) whose name has `pattern`."""
    for level in levels:
        if level not in LEVELS:
            raise ConfigError(f"no level {level!r}; levels: {', '.join(LEVELS)}")
    return [
        item
        for check in CHECKS
        if not levels or check.level in levels
        for item in check.items()
        if pattern in item.name
    ]


def run_kit(
    backend: Backend,
    *,
    levels: Sequence[str] = (),
    pattern: str = "",
    progress: Callable[[Result], None] | None = None,
) -> list[Result]:
    """Try `backend`; failures are results."""
    subject = Subject(backend)
    results = []
    for item in all_items(levels, pattern):
        results.append(item.run(subject))
        if progress is not None:
            progress(results[-1])
    return results
