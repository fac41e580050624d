"""Mistral: [TOOL_CALLS][{"name": ..., "arguments": {...}}, ...], or [TOOL_CALLS]name[ARGS]{...}."""

from __future__ import annotations

import secrets
import string

from portalm.text.char_parser import Malformed, Reading
from portalm.text.tool_parsers.base import FUNCTION_NAME, ToolParser

_BEGIN = "[TOOL_CALLS]"
_ID = "[CALL_ID]"
_ARGUMENTS = "[ARGS]"
_ID_CHARS = string.ascii_letters + string.digits


class MistralToolParser(ToolParser):
    """Parser of calls that follow a special token."""

    markers = (_BEGIN, _ID, _ARGUMENTS)

    @classmethod
    def recognizes(cls, template: str) -> bool:
        """Return True if a chat template tells the model to use this format."""
        return _BEGIN in template

    @classmethod
    def new_call_id(cls) -> str:
        """Return nine random letters and digits, the only form that Mistral's templates accept."""
        return "".join(secrets.choice(_ID_CHARS) for _ in range(9))

    def _run(self) -> Reading[None]:
        chars = self.chars
        while (yield from self._content_until(_BEGIN)):
            mark = chars.mark()
            try:
                if (yield from chars.skip("[")):
                    yield from self._list_of_calls()
                else:
                    yield from self._named_call()
            except Malformed:
                self._content(_BEGIN)
                chars.rewind(mark)

    def _list_of_calls(self) -> Reading[None]:
        chars = self.chars
        yield from self._json_call(known_only=False)
        mark = chars.mark()
        try:
            while (yield from chars.skip(",")):
                yield from self._json_call(known_only=False)
                mark = chars.mark()
        except Malformed:
            chars.rewind(mark)
        else:
            yield from chars.skip("]")

    def _named_call(self) -> Reading[None]:
        chars = self.chars
        char = yield from chars.next_visible()
        name = ""
        while char and FUNCTION_NAME.fullmatch(name + char):
            name += char
            char = yield from chars.next()
        chars.back(char)
        if (yield from chars.skip(_ID)):
            while (char := (yield from chars.next())) in _ID_CHARS and char:
                pass
            chars.back(char)
        yield from chars.skip(_ARGUMENTS)
        if not name or not (yield from chars.skip("{")):
            raise Malformed
        chars.back("{")
        self._begin_call(name)
        yield from self._streamed_arguments(_BEGIN)
