"""Find plugin classes by name: built-in ones, and entry points of other packages."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Mapping
from typing import Generic, TypeVar

from portalm.errors import ConfigError

P = TypeVar("P")


class Plugins(Generic[P]):
    """All plugin classes of one kind."""

    def __init__(
        self, base: type[P], *, kind: str, group: str, own: Mapping[str, str] | None = None
    ) -> None:
        """Define a kind of plugin.

        Args:
            base: base class of all of them.
            kind: name of the kind in errors.
            group: entry-point group of other packages' classes.
            own: built-in classes, name -> module:class.
        """
        self._base = base
        self._found: dict[str, type[P]] = {}
        self._kind = kind
        self._group = group
        self._own = {
            name: importlib.metadata.EntryPoint(name, home, group)
            for name, home in (own or {}).items()
        }

    def names(self) -> list[str]:
        """Names of all installed classes."""
        return sorted(self._entry_points())

    def get(self, name: str) -> type[P]:
        """Return the class of that name. Raises `ConfigError` if there is none."""
        if name in self._found:  # searching all installed packages takes milliseconds
            return self._found[name]
        entry_point = self._entry_points().get(name)
        if entry_point is None:
            installed = ", ".join(self.names()) or "none"
            raise ConfigError(
                f"there is no {self._kind} {name!r}; installed: {installed} "
                f"(packages add more with the entry-point group {self._group!r})"
            )
        try:
            found = entry_point.load()
        except Exception as error:  # code of another package: it may raise anything
            raise ConfigError(
                f"the {self._kind} {name!r} cannot be imported: {type(error).__name__}: {error}"
            ) from error
        if not isinstance(found, type) or not issubclass(found, self._base):
            raise ConfigError(
                f"the {self._kind} {name!r} ({entry_point.value}) is not a subclass of "
                f"{self._base.__module__}.{self._base.__name__}"
            )
        self._found[name] = found
        return found

    def _entry_points(self) -> dict[str, importlib.metadata.EntryPoint]:
        others = importlib.metadata.entry_points(group=self._group)
        return {**{one.name: one for one in others}, **self._own}
