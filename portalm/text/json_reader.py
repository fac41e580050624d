"""Streaming JSON reader, as strict as RFC 8259, except that raw control characters are escaped.

Each function reads from `Chars`, passes every character to `sink` at once (without whitespace
between tokens), and raises `Malformed` at the first character that is not valid.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from portalm.text.char_parser import Chars, Malformed, Reading

Sink = Callable[[str], None]

_MAX_DEPTH = 64
"""Maximum nesting depth. Deeper JSON is most likely a model that repeats itself."""

_SCALAR = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?|true|false|null", re.ASCII)
_SCALAR_CHARS = frozenset("+-.0123456789eEtrufalsn")
_ESCAPES = frozenset('"\\/bfnrtu')
_STRING_STOPS = frozenset(['"', "\\", *map(chr, range(32))])
_HEX = frozenset("0123456789abcdefABCDEF")


def copy_value(chars: Chars, sink: Sink, depth: int = 0) -> Reading[None]:
    """Copy one JSON value to `sink`.

    Args:
        chars: the text; leading whitespace is skipped.
        sink: receives the value's text.
        depth: number of objects and arrays that contain this value.

    Raises:
        Malformed: the text is not JSON, or is nested too deeply.
    """
    char = yield from chars.next_visible()
    if char == '"':
        sink(char)
        yield from _copy_string(chars, sink)
    elif char and char in "{[":
        sink(char)
        if depth == _MAX_DEPTH:
            raise Malformed
        yield from _copy_items(chars, sink, depth + 1, is_object=char == "{")
    else:
        chars.back(char)
        yield from _copy_scalar(chars, sink)


def _copy_items(chars: Chars, sink: Sink, depth: int, *, is_object: bool) -> Reading[None]:
    """Copy the rest of an object or an array, after its opening bracket."""
    close = "}" if is_object else "]"
    char = yield from chars.next_visible()
    if char == close:
        sink(char)
        return
    chars.back(char)
    while True:
        if is_object:
            yield from _copy_char(chars, sink, '"')
            yield from _copy_string(chars, sink)
            yield from _copy_char(chars, sink, ":")
        yield from copy_value(chars, sink, depth)
        if (yield from _copy_char(chars, sink, f",{close}")) == close:
            return


def _copy_char(chars: Chars, sink: Sink, wanted: str) -> Reading[str]:
    """Copy the next non-whitespace character and return it; it must be one of `wanted`."""
    char = yield from chars.next_visible()
    sink(char)
    if not char or char not in wanted:
        raise Malformed
    return char


def _copy_string(chars: Chars, sink: Sink) -> Reading[None]:
    """Copy the rest of a string, after its opening quote."""
    while True:
        if text := (yield from chars.run(_STRING_STOPS)):
            sink(text)
        char = yield from chars.next()
        if not char:
            raise Malformed
        if char < " ":
            # models write raw newlines in strings: escape them, so that the result is valid JSON
            sink(json.dumps(char)[1:-1])
            continue
        sink(char)
        if char == '"':
            return
        if char == "\\":
            yield from _copy_escape(chars, sink)


def _copy_escape(chars: Chars, sink: Sink) -> Reading[None]:
    char = yield from chars.next()
    sink(char)
    if not char or char not in _ESCAPES:
        raise Malformed
    for _ in range(4 if char == "u" else 0):
        digit = yield from chars.next()
        sink(digit)
        if not digit or digit not in _HEX:
            raise Malformed


def _copy_scalar(chars: Chars, sink: Sink) -> Reading[None]:
    text = ""
    while (char := (yield from chars.next())) and char in _SCALAR_CHARS:
        sink(char)
        text += char
    chars.back(char)
    if not _SCALAR.fullmatch(text):
        raise Malformed


def read_value(chars: Chars) -> Reading[Any]:
    """Read one JSON value and return it as a Python object."""
    text: list[str] = []
    yield from copy_value(chars, text.append)
    try:
        return json.loads("".join(text))
    except ValueError:  # Python's limit on the number of digits of an integer
        raise Malformed from None
