"""Parsers by name: ours, and those that other packages bring as entry points."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Mapping
from typing import Generic, TypeVar

from portalm.errors import ConfigError

P = TypeVar("P")


class ParserRegistry(Generic[P]):
    """All parsers of one kind."""

    def __init__(self, base: type[P], *, kind: str, group: str, own: Mapping[str, str]) -> None:
        """The parsers of a kind.

        Args:
            base: what each of them is a subclass of.
            kind: what errors call them.
            group: the entry-point group that others join by.
            own: ours, name -> module:class.
        """
        self._base = base
        self._kind = kind
        self._group = group
        self._own = {
            name: importlib.metadata.EntryPoint(name, home, group) for name, home in own.items()
        }

    def names(self) -> list[str]:
        """All that are installed."""
        return sorted(self._entry_points())

    def get(self, name: str) -> type[P]:
        """The parser of that name. Raises `ConfigError`, naming those that there are."""
        entry_point = self._entry_points().get(name)
        if entry_point is None:
            raise ConfigError(
                f"there is no {self._kind} {name!r}; installed: {', '.join(self.names())} "
                f"(packages add more by the entry-point group {self._group!r})"
            )
        try:
            parser = entry_point.load()
        except Exception as error:  # code of another package: it may raise anything
            raise ConfigError(
                f"the {self._kind} {name!r} does not import: {type(error).__name__}: {error}"
            ) from error
        if not isinstance(parser, type) or not issubclass(parser, self._base):
            raise ConfigError(
                f"the {self._kind} {name!r} ({entry_point.value}) is no subclass of "
                f"{self._base.__module__}.{self._base.__name__}"
            )
        return parser

    def _entry_points(self) -> dict[str, importlib.metadata.EntryPoint]:
        others = importlib.metadata.entry_points(group=self._group)
        return {**{one.name: one for one in others}, **self._own}
