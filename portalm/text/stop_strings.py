"""Stop strings in a stream of text: found across pieces, never shown before they are decided."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Watches one answer. The match that ends first wins; of those, the one that begins first.

    So the outcome does not depend on how the text was cut into pieces.
    """

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        """For these stop strings; `include` keeps the one that was found in the text."""
        self._stops = tuple(stops)
        self._include = include
        self._held = ""

    def feed(self, text: str) -> tuple[str, str | None]:
        """What may be shown now, and the stop string if one was found (then it is over)."""
        if not self._stops:
            return text, None
        text = self._held + text
        self._held = ""
        found = [(text.find(stop), stop) for stop in self._stops]
        ends = [(start + len(stop), start, stop) for start, stop in found if start >= 0]
        if ends:
            end, start, stop = min(ends)
            return text[: end if self._include else start], stop
        num_held = self._num_undecided(text)
        if num_held:
            self._held = text[-num_held:]
            text = text[:-num_held]
        return text, None

    def flush(self) -> str:
        """What was held back, now that no more text will come."""
        text, self._held = self._held, ""
        return text

    def _num_undecided(self, text: str) -> int:
        """Characters at the end that may begin a stop string."""
        longest = 0
        for stop in self._stops:
            for length in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:length]):
                    longest = length
                    break
        return longest
