"""Find stop strings in a text that arrives in pieces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class StopMatch(NamedTuple):
    """Result of pushing a piece of text."""

    text: str
    """Text that can be shown now: it cannot become part of a stop string."""
    stop: str | None
    """The stop string that was found, after which nothing may be pushed; None if none was."""


class StopStrings:
    """Incremental search for stop strings, holding back text that may be the start of one.

    The stop string that ends first wins; if several end there, the longest. The text is cut where
    it begins. The way the text is split into pieces does not change the result.
    """

    __slots__ = ("_fallbacks", "_held", "_initials", "_keeps_stop", "_matched", "_stops")

    def __init__(self, stops: Sequence[str], *, include_stop_str_in_output: bool = False) -> None:
        """Start at the beginning of a text.

        Args:
            stops: the strings to find, none of them empty.
            include_stop_str_in_output: keep the stop string that was found in the text.
        """
        self._stops = tuple(stops)
        self._fallbacks = [_fallbacks(stop) for stop in self._stops]
        self._initials = frozenset(stop[0] for stop in self._stops)
        self._keeps_stop = include_stop_str_in_output
        self._matched = [0] * len(self._stops)
        """For each stop string: length of its longest prefix that the text so far ends with."""
        self._held = ""
        """The end of the text so far that may be the start of a stop string."""

    def push(self, text: str) -> StopMatch:
        """Search the next piece of text."""
        if not self._held and self._initials.isdisjoint(text):
            return StopMatch(text, None)
        for i, char in enumerate(text):
            stop = self._advance(char)
            if stop is not None:
                seen = self._held + text[: i + 1]
                self._held = ""
                return StopMatch(seen if self._keeps_stop else seen[: -len(stop)], stop)
        seen = self._held + text
        end = len(seen) - max(self._matched)
        self._held = seen[end:]
        return StopMatch(seen[:end], None)

    def _advance(self, char: str) -> str | None:
        """Advance all matches by `char` (Knuth-Morris-Pratt); return the longest complete one."""
        found = None
        for i, stop in enumerate(self._stops):
            count = self._matched[i]
            while count and stop[count] != char:
                count = self._fallbacks[i][count - 1]
            if stop[count] == char:
                count += 1
            if count == len(stop):
                found = stop if found is None or len(stop) > len(found) else found
                count = 0
            self._matched[i] = count
        return found

    def skip(self, text: str) -> str:
        """Pass a piece of text through without searching it; returns the text to show now."""
        return self.flush() + text

    def flush(self) -> str:
        """Return the text held back and restart all matches."""
        held, self._held = self._held, ""
        self._matched = [0] * len(self._stops)
        return held


def _fallbacks(stop: str) -> list[int]:
    """Failure function of `stop`: for each prefix, the length of its longest proper border."""
    lengths = [0] * len(stop)
    count = 0
    for i in range(1, len(stop)):
        while count and stop[i] != stop[count]:
            count = lengths[count - 1]
        if stop[i] == stop[count]:
            count += 1
        lengths[i] = count
    return lengths
