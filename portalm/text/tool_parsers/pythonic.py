"""Llama 4 and others: calls in Python syntax, [get_weather(city="Paris"), get_time()]."""

from __future__ import annotations

import ast
import json

from portalm.text.char_parser import Malformed, Reading
from portalm.text.tool_parsers.base import FUNCTION_NAME, ToolParser

_BEGINS = ("<|python_start|>", "<|python_tag|>")
_END = "<|python_end|>"
_OPENING, _CLOSING = "([{", ")]}"
_JSON_NAMES = {"true": True, "false": False, "null": None}
"""JSON literals, which some models write instead of Python's."""
_MAX_DEPTH = 32
_MAX_CHARS = 1 << 20


class PythonicToolParser(ToolParser):
    """Parser of answers that are a list of calls of the request's functions.

    A call is emitted when it is complete, because Python values cannot be converted to JSON before
    they end. A malformed call, and everything after it, is content.
    """

    @classmethod
    def recognizes(cls, template: str) -> bool:
        """Return True if a chat template tells the model to use this format."""
        return "[func_name1(params_name1=params_value1" in template

    def _run(self) -> Reading[None]:
        chars = self.chars
        mark = chars.mark()
        try:
            for tag in _BEGINS:
                yield from chars.skip(tag)
            if not (yield from chars.skip("[")):
                raise Malformed
            is_more = True
            while is_more:
                yield from self._call()
                mark = chars.mark()
                is_more = yield from chars.skip(",")
            if (yield from chars.skip("]")):
                yield from chars.skip(_END)
                mark = chars.mark()
        except Malformed:
            pass
        chars.rewind(mark)
        yield from self._content_until()

    def _call(self) -> Reading[None]:
        chars = self.chars
        name = ""
        char = yield from chars.next_visible()
        while char != "(":
            name += char
            if not char or not FUNCTION_NAME.fullmatch(name):
                raise Malformed
            char = yield from chars.next()
        if name not in self.tool_names:
            raise Malformed
        arguments = _as_json((yield from self._until_closed()))
        self._begin_call(name)
        self._arguments(arguments)

    def _until_closed(self) -> Reading[str]:
        """Read up to the matching closing parenthesis; returns the text before it."""
        text, brackets = "", ["("]
        while brackets:
            char = yield from self.chars.next()
            if not char or len(brackets) > _MAX_DEPTH or len(text) > _MAX_CHARS:
                raise Malformed
            text += char
            if char in _OPENING:
                brackets.append(char)
            elif char in _CLOSING:
                if _OPENING.index(brackets.pop()) != _CLOSING.index(char):
                    raise Malformed
            elif char in "\"'":
                text += yield from self._string(char)
        return text[:-1]

    def _string(self, quote: str) -> Reading[str]:
        """Read the rest of a string literal; returns it with its closing quote."""
        text = ""
        while (char := (yield from self.chars.next())) != quote:
            text += char
            if char == "\\":
                char = yield from self.chars.next()
                text += char
            if not char or len(text) > _MAX_CHARS:
                raise Malformed
        return text + char


def _as_json(arguments: str) -> str:
    """Convert the keyword arguments of a call, in Python syntax, to a JSON object.

    Raises:
        Malformed: they are not keyword arguments with literal values, or cannot be JSON.
    """
    try:
        call = ast.parse(f"f({arguments})", mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            raise Malformed
        values = {}
        for keyword in call.keywords:
            if keyword.arg is None:
                raise Malformed
            values[keyword.arg] = ast.literal_eval(_JsonNames().visit(keyword.value))
        text = json.dumps(values, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        text.encode()  # raises if an escape sequence made half of a surrogate pair
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        raise Malformed from None
    return text


class _JsonNames(ast.NodeTransformer):
    def visit_Name(self, node: ast.Name) -> ast.expr:
        if node.id not in _JSON_NAMES:
            raise Malformed
        return ast.Constant(_JSON_NAMES[node.id])
