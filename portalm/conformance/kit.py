"""The list of all checks, and a function that runs them on a backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from portalm.backend import Backend
from portalm.conformance import laws, layers, models, operations, serving
from portalm.conformance.base import LEVELS
from portalm.conformance.check import Item, Result
from portalm.conformance.subject import Subject
from portalm.errors import ConfigError

CHECKS = (
    *operations.CHECKS,
    *layers.CHECKS,
    *laws.CHECKS,
    *models.CHECKS,
    *serving.CHECKS,
)


def all_items(levels: Sequence[str] = (), pattern: str = "") -> list[Item]:
    """Return the cases of all checks of `levels` (empty: all) whose name contains `pattern`."""
    wanted = {_level(level) for level in levels}
    return [
        item
        for check in CHECKS
        if not wanted or check.level in wanted
        for item in check.items()
        if pattern in item.name
    ]


def _level(named: str) -> str:
    """Resolve a level by its id (L3) or its name (models)."""
    for level, name in LEVELS.items():
        if named in (level, name.split()[0].strip(",")):
            return level
    known = ", ".join(f"{k} ({v})" for k, v in LEVELS.items())
    raise ConfigError(f"level {named!r} does not exist; levels: {known}")


def run_kit(
    backend: Backend,
    *,
    levels: Sequence[str] = (),
    pattern: str = "",
    progress: Callable[[Result], None] | None = None,
) -> list[Result]:
    """Run checks on `backend`; failures are returned as results."""
    subject = Subject(backend)
    results = []
    for item in all_items(levels, pattern):
        results.append(item.run(subject))
        if progress is not None:
            progress(results[-1])
    return results
