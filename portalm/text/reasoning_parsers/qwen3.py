"""Qwen 3: reasoning where the answer, or the prompt, opens it."""

from __future__ import annotations

from portalm.text.char_parser import Reading
from portalm.text.reasoning_parsers.base import ReasoningParser


class Qwen3ReasoningParser(ReasoningParser):
    """With enable_thinking false the prompt has an empty reasoning, and the answer has none."""

    def _begins(self) -> Reading[bool]:
        is_opened = yield from self._opened()
        return is_opened or self.is_begun
