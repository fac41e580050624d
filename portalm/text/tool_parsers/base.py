"""What every format of tool calls shares: read calls while they are being written.

The law (tests/unit/test_tool_parsers.py): the pieces of any split of a text add up to those of the
whole text; nothing of a call is in the content; what is no call is content, as the model wrote it.

A call is given out once its name is known and its arguments begin, so that long arguments stream.
From then on it stays a call: if its JSON breaks later on, the arguments are what the model wrote,
and the caller sees that they are no JSON, as with a call that `max_tokens` cut.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Collection

from portalm.text.char_parser import (
    CallArguments,
    CallBegin,
    CharParser,
    Malformed,
    Piece,
    Reading,
)
from portalm.text.json_reader import copy_value, read_value

FUNCTION_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}", re.ASCII)
"""What a function may be called."""

_ARGUMENTS_KEYS = ("arguments", "parameters")
_OTHER_KEYS = ("id", "type")


class ToolParser(CharParser):
    """One answer's content and tool calls, as they come. Subclasses read one format each."""

    def __init__(self, tool_names: Collection[str]) -> None:
        """Nothing seen yet; the request offers functions of these names."""
        self.tool_names = frozenset(tool_names)
        super().__init__()

    @classmethod
    def recognises(cls, template: str) -> bool:
        """Whether a chat template tells the model to write calls like this."""
        return False

    @classmethod
    def new_call_id(cls) -> str:
        """An id for a call, of a kind that the model's chat template takes back."""
        return f"call_{secrets.token_hex(12)}"

    @classmethod
    def parse(cls, text: str, tool_names: Collection[str]) -> list[Piece]:
        """All of an answer at once."""
        parser = cls(tool_names)
        return [*parser.push(text), *parser.finish()]

    # -- for subclasses -----------------------------------------------------------------------

    def _begin_call(self, name: str) -> None:
        self._other(CallBegin(name))

    def _arguments(self, text: str) -> None:
        self.chars.forget()  # the call is out: nothing takes it back
        self._other(CallArguments(text))

    def _json_call(self, *, is_known: bool, end: str = "") -> Reading[None]:
        """Read {"name": ..., "arguments": {...}} and give it out.

        Args:
            is_known: only the request's functions can be called: what has another name is no call.
            end: what stands behind a call; a broken one's arguments go on to there (empty: to the
                end of the answer).

        Raises:
            Malformed: it is no call; nothing was given out.
        """
        chars = self.chars
        if (yield from chars.next_visible()) != "{":
            raise Malformed
        name: str | None = None
        arguments: str | None = None
        while True:
            key = yield from self._key()
            if key == "name":
                name = self._checked_name((yield from read_value(chars)), is_known=is_known)
            elif key in _ARGUMENTS_KEYS:
                first = yield from chars.next_visible()
                chars.back(first)
                if name is not None and first == "{":
                    self._begin_call(name)
                    if (yield from self._streamed_arguments(end)):
                        yield from self._rest_of_call()
                    return
                arguments = _arguments_text((yield from read_value(chars)))
            elif key in _OTHER_KEYS:
                yield from read_value(chars)
            else:
                raise Malformed
            if name is not None and arguments is not None:
                break
            char = yield from chars.next_visible()
            if char == "}":
                break
            if char != ",":
                raise Malformed
        if name is None:
            raise Malformed
        self._begin_call(name)
        self._arguments(arguments or "{}")
        if arguments is not None:
            yield from self._rest_of_call()

    def _key(self) -> Reading[object]:
        key = yield from read_value(self.chars)
        if (yield from self.chars.next_visible()) != ":":
            raise Malformed
        return key

    def _checked_name(self, name: object, *, is_known: bool) -> str:
        if not isinstance(name, str) or not FUNCTION_NAME.fullmatch(name):
            raise Malformed
        if is_known and name not in self.tool_names:
            raise Malformed
        return name

    def _streamed_arguments(self, end: str) -> Reading[bool]:
        """Give out an object as it comes; False: it broke, and what follows went with it."""
        try:
            yield from copy_value(self.chars, self._arguments)
        except Malformed:
            yield from self._until([end] if end else [], self._arguments)
            return False
        return True

    def _rest_of_call(self) -> Reading[None]:
        """Read what may follow the arguments inside a call, up to its closing brace."""
        chars = self.chars
        mark = chars.mark()
        try:
            while (char := (yield from chars.next_visible())) == ",":
                if (yield from self._key()) not in _OTHER_KEYS:
                    raise Malformed
                yield from read_value(chars)
            if char != "}":
                raise Malformed
        except Malformed:
            chars.rewind(mark)  # the call is whole: what follows is judged by itself


def _arguments_text(value: object) -> str:
    """The arguments of a call that were written in an unusual way."""
    if isinstance(value, str):  # JSON inside a JSON string
        try:
            value = json.loads(value or "{}")
        except (ValueError, RecursionError):
            raise Malformed from None
    if value is None:
        return "{}"
    if not isinstance(value, dict):
        raise Malformed
    return json.dumps(value, separators=(",", ":"))
