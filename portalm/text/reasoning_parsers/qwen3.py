"""Qwen 3: reasoning only if the prompt or the answer opens it."""

from __future__ import annotations

from portalm.text.char_parser import Reading
from portalm.text.reasoning_parsers.base import ReasoningParser


class Qwen3ReasoningParser(ReasoningParser):
    """Parser for optional reasoning.

    With `enable_thinking=False` the prompt holds an empty reasoning, and the answer has none.
    """

    def _begins(self) -> Reading[bool]:
        is_opened = yield from self._skip_opening_tag()
        return is_opened or self.is_begun
