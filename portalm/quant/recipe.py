"""Recipes: which layers of a checkpoint are quantized, and with which settings.

Every scheme writes its recipe in its own way (lists of names, regular expressions, class names).
The tensors of a layer say whether it is quantized: the recipe says how to read them, and the two
must not contradict each other.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from portalm.errors import CheckpointError, UnsupportedModel
from portalm.quant.scheme import LayerParts

T = TypeVar("T")

Matcher = Callable[[str], bool]
"""True for the names of the layers that a pattern covers."""


@dataclass(frozen=True, slots=True)
class Rule(Generic[T]):
    """Settings of the layers that a pattern covers."""

    pattern: str
    """As the checkpoint has it, for errors."""
    matches: Matcher
    settings: T | None
    """None: the layers are not quantized."""


class Recipe(Generic[T]):
    """Settings by a layer's name."""

    def __init__(
        self,
        *,
        excluded: Sequence[Rule[T]] = (),
        by_name: Mapping[str, T | None] | None = None,
        levels: Iterable[Sequence[Rule[T]]] = (),
        default: T | None = None,
    ) -> None:
        """Use the first source below that covers a layer.

        Args:
            excluded: rules of layers that are not quantized.
            by_name: settings of single layers; None: not quantized.
            levels: other rules by precedence; rules of one level must agree on a layer.
            default: settings of all other layers; None: they are not quantized.
        """
        self._by_name = dict(by_name or {})
        self._excluded = tuple(excluded)
        self._levels = [tuple(level) for level in levels]
        self._default = default

    def settings(self, parts: LayerParts) -> T:
        """Settings of a layer that the checkpoint stores quantized.

        Raises:
            CheckpointError: the recipe says that the layer is not quantized, or has several rules
                for it that contradict each other.
        """
        for rule in self._excluded:
            if rule.matches(parts.layer):
                raise _excludes(parts, rule.pattern)
        if parts.layer in self._by_name:
            found_by_name = self._by_name[parts.layer]
            if found_by_name is None:
                raise _excludes(parts, parts.layer)
            return found_by_name
        for level in self._levels:
            found = [rule for rule in level if rule.matches(parts.layer)]
            if not found:
                continue
            settings = found[0].settings
            if any(rule.settings != settings for rule in found):
                named = ", ".join(repr(rule.pattern) for rule in found)
                raise parts.error(f"several rules of quantization_config match it: {named}")
            if settings is None:
                raise _excludes(parts, found[0].pattern)
            return settings
        if self._default is None:
            known = [repr(rule.pattern) for level in self._levels for rule in level]
            raise parts.error(
                f"it is stored quantized, but no rule of quantization_config matches it: "
                f"{', '.join([*known, *self._by_name][:5]) or 'there is none'}"
            )
        return self._default


def _excludes(parts: LayerParts, pattern: str) -> CheckpointError:
    return parts.error(f"it is stored quantized, but quantization_config excludes {pattern!r}")


def excluding(names: Iterable[object]) -> list[Rule[T]]:
    """Rules for a list of modules that are not converted, by whole components of their names.

    Writers compare such names in several ways (equal, prefix, substring): a run of whole
    components, such as mlp.gate in model.layers.0.mlp.gate, is what all of them match.
    """
    return [Rule(str(name), by_components(str(name)), None) for name in names]


def by_components(pattern: str) -> Matcher:
    """Match names that have `pattern`, which may have wildcards, as whole components."""
    if pattern.startswith("re:"):
        return by_regex(pattern.removeprefix("re:"))
    inner = ".*".join(re.escape(part) for part in pattern.strip(".").split("*"))
    return by_regex(rf"(.*\.)?{inner}(\.|$)")


def by_regex(pattern: str) -> Matcher:
    """Match names that begin with a match of the regular expression."""
    try:
        found = re.compile(pattern)
    except re.error as error:
        raise UnsupportedModel(
            f"config.json: quantization_config has an invalid regular expression {pattern!r} "
            f"({error})"
        ) from None
    return lambda name: found.match(name) is not None


def by_wildcards(pattern: str) -> Matcher:
    """Match whole names by a pattern with * and ?."""
    return lambda name: fnmatch.fnmatchcase(name, pattern)
