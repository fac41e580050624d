"""DeepSeek R1 and its distillations, QwQ: every answer begins with reasoning."""

from __future__ import annotations

from portalm.text.char_parser import Reading
from portalm.text.reasoning_parsers.base import ReasoningParser


class DeepSeekR1ReasoningParser(ReasoningParser):
    """The opening tag may be in the prompt, in the answer, or nowhere."""

    def _begins(self) -> Reading[bool]:
        yield from self._opened()
        return True
