"""Base class of tool call parsers, which parse calls while they are being generated.

Rules (checked by tests/unit/test_tool_parsers.py): however a text is split into pieces, the
concatenated result is the same; the content holds no part of a call; text that is not a call is
content, exactly as the model wrote it.

A call is emitted once its name is known and its arguments begin, so that long arguments stream.
It then remains a call: if its JSON turns out to be invalid later, the arguments are what the model
wrote, and the caller finds that they are not JSON, as with a call that `max_tokens` cut.
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
"""Valid function names."""

_ARGUMENTS_KEYS = ("arguments", "parameters")
_OTHER_KEYS = ("id", "type")


class ToolParser(CharParser):
    """Incremental parser of one answer's content and tool calls; a subclass reads one format."""

    def __init__(self, tool_names: Collection[str]) -> None:
        """Start at the beginning of an answer; `tool_names` are the request's functions."""
        self.tool_names = frozenset(tool_names)
        super().__init__()

    @classmethod
    def recognizes(cls, template: str) -> bool:
        """Return True if a chat template tells the model to use this format."""
        return False

    @classmethod
    def new_call_id(cls) -> str:
        """Return a new call id, in a form that the model's chat template accepts."""
        return f"call_{secrets.token_hex(12)}"

    @classmethod
    def parse(cls, text: str, tool_names: Collection[str]) -> list[Piece]:
        """Parse a whole answer at once."""
        parser = cls(tool_names)
        return [*parser.push(text), *parser.finish()]

    # -- for subclasses -----------------------------------------------------------------------

    def _begin_call(self, name: str) -> None:
        self._other(CallBegin(name))

    def _arguments(self, text: str) -> None:
        self.chars.forget()  # the call was emitted, so parsing never goes back before this
        self._other(CallArguments(text))

    def _json_call(self, *, known_only: bool, end: str = "") -> Reading[None]:
        """Read {"name": ..., "arguments": {...}} and emit the call.

        Args:
            known_only: accept only the names of the request's functions.
            end: marker after a call. The arguments of an invalid call extend to it, or to the end
                of the answer if it is empty.

        Raises:
            Malformed: the text is not a call; nothing was emitted.
        """
        chars = self.chars
        if (yield from chars.next_visible()) != "{":
            raise Malformed
        name: str | None = None
        arguments: str | None = None
        while True:
            key = yield from self._key()
            if key == "name":
                name = self._checked_name((yield from read_value(chars)), known_only=known_only)
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

    def _checked_name(self, name: object, *, known_only: bool) -> str:
        if not isinstance(name, str) or not FUNCTION_NAME.fullmatch(name):
            raise Malformed
        if known_only and name not in self.tool_names:
            raise Malformed
        return name

    def _streamed_arguments(self, end: str) -> Reading[bool]:
        """Emit a JSON object while reading it.

        Returns:
            False if it is invalid: then all text up to `end` was emitted as arguments too.
        """
        try:
            yield from copy_value(self.chars, self._arguments)
        except Malformed:
            yield from self._until([end] if end else [], self._arguments)
            return False
        return True

    def _rest_of_call(self) -> Reading[None]:
        """Read the keys after the arguments, up to the call's closing brace."""
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
            chars.rewind(mark)  # the call is complete: parse the rest as separate text


def _arguments_text(value: object) -> str:
    """Convert arguments that are not a plain JSON object after the name to JSON text.

    Raises:
        Malformed: they are not an object, a string with one, or null.
    """
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
