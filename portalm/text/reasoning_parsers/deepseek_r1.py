"""DeepSeek R1 and its distillations, QwQ: every answer begins with reasoning."""

from __future__ import annotations

from portalm.text.char_parser import Reading
from portalm.text.reasoning_parsers.base import ReasoningParser


class DeepSeekR1ReasoningParser(ReasoningParser):
    """Parser for answers that always start with reasoning, with or without an opening tag."""

    def _begins(self) -> Reading[bool]:
        yield from self._skip_opening_tag()
        return True
