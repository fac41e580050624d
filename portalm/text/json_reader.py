"""JSON that is read while it is being written: checked as strictly as RFC 8259 wants it.

Every function takes what it reads from `Chars`, gives it to `sink` at once, without white space
between tokens, and raises `Malformed` at the first character that cannot be.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from portalm.text.char_parser import Chars, Malformed, Reading

Sink = Callable[[str], None]

_MAX_DEPTH = 64
"""Values inside values: more is a model that has lost its way."""

_SCALAR = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?|true|false|null", re.ASCII)
_SCALAR_CHARS = frozenset("+-.0123456789eEtrufalsn")
_ESCAPES = frozenset('"\\/bfnrtu')
_STRING_STOPS = frozenset(['"', "\\", *map(chr, range(32))])
_HEX = frozenset("0123456789abcdefABCDEF")


def copy_value(chars: Chars, sink: Sink, depth: int = 0) -> Reading[None]:
    """Read one value."""
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
    """Read the rest of an object or a list, from behind its opening bracket."""
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
    """Read the next visible character: one of `wanted`."""
    char = yield from chars.next_visible()
    sink(char)
    if not char or char not in wanted:
        raise Malformed
    return char


def _copy_string(chars: Chars, sink: Sink) -> Reading[None]:
    """Read the rest of a string, from behind its first quote."""
    while True:
        if text := (yield from chars.run(_STRING_STOPS)):
            sink(text)
        char = yield from chars.next()
        if not char:
            raise Malformed
        if char < " ":
            char = json.dumps(char)[1:-1]  # what was meant is clear: escape it for the reader
            sink(char)
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
    """Read one value; as Python's `json` gives it."""
    text: list[str] = []
    yield from copy_value(chars, text.append)
    try:
        return json.loads("".join(text))
    except ValueError:  # a number with thousands of digits
        raise Malformed from None
