"""Hermes, Qwen 2.5 and Qwen 3: <tool_call>{"name": ..., "arguments": {...}}</tool_call>."""

from __future__ import annotations

from portalm.text.char_parser import Malformed, Reading
from portalm.text.tool_parsers.base import ToolParser

_BEGIN = "<tool_call>"
_END = "</tool_call>"


class HermesToolParser(ToolParser):
    """Parser of calls between tags, anywhere in the answer."""

    markers = (_BEGIN, _END)

    @classmethod
    def recognizes(cls, template: str) -> bool:
        """Return True if a chat template tells the model to use this format."""
        others = ("<function=", "<arg_key>")  # formats with the same tags around other syntax
        return _BEGIN in template and _END in template and not any(o in template for o in others)

    def _run(self) -> Reading[None]:
        chars = self.chars
        while marker := (yield from self._content_until(_BEGIN, _END)):
            if marker == _END:
                continue  # a closing tag without a call: drop it
            mark = chars.mark()
            try:
                yield from self._json_call(known_only=False, end=_END)
            except Malformed:
                self._content(_BEGIN)
                chars.rewind(mark)
                continue
            while (yield from chars.skip("}")):
                pass  # some models write an extra closing brace
            yield from chars.skip(_END)
