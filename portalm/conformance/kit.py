"""All checks, and running them on a backend."""

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
    """Every case of every check of these levels (none: all) whose name has `pattern`."""
    wanted = {_level(level) for level in levels}
    return [
        item
        for check in CHECKS
        if not wanted or check.level in wanted
        for item in check.items()
        if pattern in item.name
    ]


def _level(named: str) -> str:
    """L3 for L3, and for its name: models."""
    for level, name in LEVELS.items():
        if named in (level, name.split()[0].strip(",")):
            return level
    known = ", ".join(f"{k} ({v})" for k, v in LEVELS.items())
    raise ConfigError(f"no level {named!r}; levels: {known}")


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
