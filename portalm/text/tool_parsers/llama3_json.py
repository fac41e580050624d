"""Llama 3.1, 3.2 and 3.3: {"name": ..., "parameters": {...}}, several with semicolons between."""

from __future__ import annotations

from portalm.text.char_parser import Malformed, Reading
from portalm.text.tool_parsers.base import ToolParser

_TAG = "<|python_tag|>"


class Llama3JsonToolParser(ToolParser):
    """The whole answer is calls. No mark tells them: they have the names of the request's tools."""

    @classmethod
    def recognises(cls, template: str) -> bool:
        """Whether a chat template tells the model to write calls like this."""
        return '{"name": function name, "parameters":' in template

    def _run(self) -> Reading[None]:
        chars = self.chars
        mark = chars.mark()
        try:
            while True:
                yield from chars.skip(_TAG)
                yield from self._json_call(is_known=True)
                mark = chars.mark()
                yield from chars.skip(";")
        except Malformed:
            chars.rewind(mark)
        yield from self._content_until()
