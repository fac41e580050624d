"""Llama 3.1, 3.2 and 3.3: {"name": ..., "parameters": {...}}, separated by semicolons."""

from __future__ import annotations

from portalm.text.char_parser import Malformed, Reading
from portalm.text.tool_parsers.base import ToolParser

_TAG = "<|python_tag|>"


class Llama3JsonToolParser(ToolParser):
    """Parser of answers that consist of calls; only calls of the request's functions count."""

    @classmethod
    def recognizes(cls, template: str) -> bool:
        """Return True if a chat template tells the model to use this format."""
        return '{"name": function name, "parameters":' in template

    def _run(self) -> Reading[None]:
        chars = self.chars
        mark = chars.mark()
        try:
            while True:
                yield from chars.skip(_TAG)
                yield from self._json_call(known_only=True)
                mark = chars.mark()
                yield from chars.skip(";")
        except Malformed:
            chars.rewind(mark)
        yield from self._content_until()
