"""Incremental parsers: the text arrives in pieces, the parser is written as if it had all of it.

A parser is a generator that pulls one character at a time, so the way a text is split into pieces
cannot change the result.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Generator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import ClassVar, TypeVar

T = TypeVar("T")

Reading = Generator[None, str, T]
"""A generator that reads characters (with `yield from`) and returns a T.

The answer's pieces are sent into it; an empty piece is the end of the answer.
"""


@dataclass(frozen=True, slots=True)
class Reasoning:
    """A piece of the model's reasoning, before its answer."""

    text: str


@dataclass(frozen=True, slots=True)
class Content:
    """A piece of the answer itself."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegin:
    """Start of a function call; its arguments follow."""

    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """A piece of the latest call's arguments, JSON text."""

    text: str


Piece = Reasoning | Content | CallBegin | CallArguments


_KEEP = 4096
"""Characters already read that `Chars.forget` leaves in the buffer, so that it seldom copies."""


class Malformed(Exception):
    """The text does not match the expected format. Always caught inside a parser."""


class Chars:
    """The characters of an answer, read one at a time, with rewinding."""

    __slots__ = ("_at", "_is_ended", "_num_forgotten", "_text")

    def __init__(self) -> None:
        """Start with no text read."""
        self._text: list[str] = []
        self._at = 0
        """Index in `_text` of the next character to read."""
        self._num_forgotten = 0
        """Characters of the answer that were dropped from the front of `_text`."""
        self._is_ended = False

    def next(self) -> Reading[str]:
        """Read the next character; returns "" at the end of the answer, and on every later call."""
        if self._at == len(self._text) and not (yield from self._more()):
            return ""
        self._at += 1
        return self._text[self._at - 1]

    def run(self, stops: Collection[str]) -> Reading[str]:
        """Read the characters available now, up to the first one in `stops`.

        Waits for the next piece if none is available. Returns "" at the end of the answer, or if
        the next character is in `stops`.
        """
        if self._at == len(self._text) and not (yield from self._more()):
            return ""
        begin = end = self._at
        while end < len(self._text) and self._text[end] not in stops:
            end += 1
        self._at = end
        return "".join(self._text[begin:end])

    def _more(self) -> Reading[bool]:
        """Wait for the next piece of the answer; returns False at the end."""
        text = "" if self._is_ended else (yield)
        self._text.extend(text)
        self._is_ended = not text
        return not self._is_ended

    def next_visible(self) -> Reading[str]:
        """Read up to the next character that is not whitespace, and return it."""
        while (char := (yield from self.next())).isspace():
            pass
        return char

    def back(self, char: str) -> None:
        """Unread `char`, the last character read."""
        self._at -= len(char)  # 0 at the end of the answer

    def mark(self) -> int:
        """Return the current position, for `rewind`."""
        return self._num_forgotten + self._at

    def rewind(self, mark: int) -> None:
        """Go back to `mark`: what was read since then is read again."""
        self._at = mark - self._num_forgotten

    def forget(self) -> None:
        """Free what was read so far: earlier marks are no longer valid."""
        if self._at > _KEEP:
            self._num_forgotten += self._at
            del self._text[: self._at]
            self._at = 0

    def skip(self, text: str) -> Reading[bool]:
        """Read `text`, and whitespace before it, if it comes next; otherwise read nothing.

        Returns:
            True if `text` came next.
        """
        mark = self.mark()
        char = yield from self.next_visible()
        for wanted in text[1:]:
            if char != text[0]:
                break
            if (yield from self.next()) != wanted:
                char = ""
        if char == text[0]:
            return True
        self.rewind(mark)
        return False


class CharParser(ABC):
    """Incremental parser of one answer. A subclass implements `_run`."""

    markers: ClassVar[tuple[str, ...]] = ()
    """Strings that the parser looks for. Those that are special tokens must be kept in the text."""

    def __init__(self) -> None:
        """Start at the beginning of an answer."""
        self.chars = Chars()
        self._found: list[Piece] = []
        self._space = ""
        """Whitespace after the last content: emitted only if more content follows."""
        self._drops_space = False
        """Whether whitespace at the start of the next content is dropped."""
        self._reading = self._run()
        next(self._reading, None)

    @abstractmethod
    def _run(self) -> Reading[None]:
        """Read the whole answer, reporting what is found through `_content` and `_other`."""

    def push(self, text: str) -> list[Piece]:
        """Parse `text`, the next piece of the answer, and return what it completed."""
        if text:
            self._reading.send(text)
        return self._take()

    def finish(self) -> list[Piece]:
        """End the answer and return what was held back. Nothing may be pushed afterwards."""
        with contextlib.suppress(StopIteration):
            self._reading.send("")
        self._found.append(Content(self._space))
        return self._take()

    def _take(self) -> list[Piece]:
        found, self._found = _joined(self._found), []
        return found

    # -- for subclasses -----------------------------------------------------------------------

    def _content(self, text: str) -> None:
        """Emit content; whitespace at its end is held back until more content follows."""
        body = text.rstrip()
        space = text[len(body) :]
        if self._drops_space:
            body = body.lstrip()
        if body:
            self._found.append(Content(self._space + body))
            self._space, self._drops_space = space, False
        elif not self._drops_space:
            self._space += space

    def _other(self, piece: Piece) -> None:
        """Emit a piece that is not content, and drop the whitespace around it."""
        self._found.append(piece)
        self._space, self._drops_space = "", True

    def _content_until(self, *markers: str) -> Reading[str]:
        """Emit content up to the first of `markers`; returns that marker, or "" at the end."""
        return (yield from self._until(markers, self._content))

    def _until(self, markers: Sequence[str], sink: Callable[[str], None]) -> Reading[str]:
        """Pass text to `sink` up to the first of `markers`.

        Returns:
            The marker, which has been read but not passed to `sink`; "" at the end of the answer.
        """
        chars, initials, held = self.chars, {marker[0] for marker in markers}, ""
        while True:
            chars.forget()
            if not held and (text := (yield from chars.run(initials))):
                sink(text)
            char = yield from chars.next()
            if not char:
                if held:
                    sink(held)
                return ""
            held += char
            while held and not any(marker.startswith(held) for marker in markers):
                sink(held[0])
                held = held[1:]
            if held in markers:
                return held


def _joined(pieces: Sequence[Piece]) -> list[Piece]:
    """Merge adjacent pieces of the same type and remove empty ones."""
    if len(pieces) == 1 and not isinstance(pieces[0], CallBegin) and pieces[0].text:
        return list(pieces)
    joined: list[Piece] = []
    for kind, run in groupby(pieces, type):
        if kind is CallBegin:
            joined.extend(run)
        elif text := "".join(piece.text for piece in run if not isinstance(piece, CallBegin)):
            joined.append(kind(text))
    return joined
