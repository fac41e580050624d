"""Finds stop strings in a text that comes in pieces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class StopMatch(NamedTuple):
    """What a piece of text brought."""

    text: str
    """Text that is safe to show now."""
    stop: str | None
    """The stop string that was found; nothing may be pushed after it."""


class StopStrings:
    """Holds back text that may be the beginning of a stop string until that is decided.

    The stop string whose end comes first wins, and of several that end there the longest; the
    text is cut where it begins. How the text was split into pieces makes no difference.
    """

    __slots__ = ("_fallbacks", "_held", "_initials", "_keeps_stop", "_matched", "_stops")

    def __init__(self, stops: Sequence[str], *, include_stop_str_in_output: bool = False) -> None:
        """No text seen yet.

        Args:
            stops: the texts to find, none of them empty.
            include_stop_str_in_output: keep the found one at the end of the text.
        """
        self._stops = tuple(stops)
        self._fallbacks = [_fallbacks(stop) for stop in self._stops]
        self._initials = frozenset(stop[0] for stop in self._stops)
        self._keeps_stop = include_stop_str_in_output
        self._matched = [0] * len(self._stops)
        """For each stop string: how many of its characters the text so far ends with."""
        self._held = ""
        """The end of the text so far that may be the beginning of a stop string."""

    def push(self, text: str) -> StopMatch:
        """Take the next piece of text."""
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
        """Move all matches on by one character (Knuth, Morris, Pratt); the longest whole one."""
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
        """Let a piece of text pass without looking for stop strings; the text to show now."""
        return self.flush() + text

    def flush(self) -> str:
        """The text held back; what comes after it begins anew."""
        held, self._held = self._held, ""
        self._matched = [0] * len(self._stops)
        return held


def _fallbacks(stop: str) -> list[int]:
    """For each beginning of `stop`: the length of its longest end that `stop` begins with."""
    lengths = [0] * len(stop)
    count = 0
    for i in range(1, len(stop)):
        while count and stop[i] != stop[count]:
            count = lengths[count - 1]
        if stop[i] == stop[count]:
            count += 1
        lengths[i] = count
    return lengths
