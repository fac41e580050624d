"""Tool calls forced by a grammar (`tool_choice`): plain JSON without markers."""

from __future__ import annotations

from portalm.text.char_parser import Malformed, Reading
from portalm.text.tool_parsers.base import ToolParser


class NamedCallParser(ToolParser):
    """Parser of an answer that is one function's arguments (a named `tool_choice`)."""

    def _run(self) -> Reading[None]:
        chars = self.chars
        if (yield from chars.skip("{")):
            chars.back("{")
            [name] = self.tool_names
            self._begin_call(name)
            yield from self._streamed_arguments("")
        yield from self._content_until()


class RequiredCallsParser(ToolParser):
    """Parser of an answer that is a list of {"name": ..., "parameters": {...}} ("required")."""

    def _run(self) -> Reading[None]:
        chars = self.chars
        mark = chars.mark()
        try:
            if not (yield from chars.skip("[")):
                raise Malformed
            is_more = True
            while is_more:
                yield from self._json_call(known_only=True)
                mark = chars.mark()
                is_more = yield from chars.skip(",")
            if (yield from chars.skip("]")):
                mark = chars.mark()
        except Malformed:
            pass
        chars.rewind(mark)
        yield from self._content_until()
