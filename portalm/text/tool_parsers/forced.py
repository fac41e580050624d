"""Calls of an answer that a grammar forced: plain JSON, without a mark around it."""

from __future__ import annotations

from portalm.text.char_parser import Malformed, Reading
from portalm.text.tool_parsers.base import ToolParser


class NamedCallParser(ToolParser):
    """The whole answer is the arguments of the only function."""

    def _run(self) -> Reading[None]:
        chars = self.chars
        if (yield from chars.skip("{")):
            chars.back("{")
            [name] = self.tool_names
            self._begin_call(name)
            yield from self._streamed_arguments("")
        yield from self._content_until()


class RequiredCallsParser(ToolParser):
    """The whole answer is a list of {"name": ..., "parameters": {...}}."""

    def _run(self) -> Reading[None]:
        chars = self.chars
        mark = chars.mark()
        try:
            if not (yield from chars.skip("[")):
                raise Malformed
            is_more = True
            while is_more:
                yield from self._json_call(is_known=True)
                mark = chars.mark()
                is_more = yield from chars.skip(",")
            if (yield from chars.skip("]")):
                mark = chars.mark()
        except Malformed:
            pass
        chars.rewind(mark)
        yield from self._content_until()
