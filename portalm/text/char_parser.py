"""Parsers of answers that come in pieces, written as if the whole text were there.

A parser is a generator that asks for one character after another, so how a text was split into
pieces cannot make a difference: the whole text is read in the same way.
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
"""What reads characters (with `yield from`) and returns a T. It is sent the answer's pieces."""


@dataclass(frozen=True, slots=True)
class Reasoning:
    """What the model thinks before it answers."""

    text: str


@dataclass(frozen=True, slots=True)
class Content:
    """The answer itself."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegin:
    """A function is called; its arguments follow."""

    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of the JSON text of the latest call's arguments."""

    text: str


Piece = Reasoning | Content | CallBegin | CallArguments


_KEEP = 4096
"""Characters that may be kept though nobody goes back to them."""


class Malformed(Exception):
    """The text is not what the parser reads here. Never leaves a parser."""


class Chars:
    """The characters of an answer, one at a time, with a way back."""

    __slots__ = ("_at", "_is_ended", "_num_forgotten", "_text")

    def __init__(self) -> None:
        """Nothing read yet."""
        self._text: list[str] = []
        self._at = 0
        """Of `_text`, what will be read next."""
        self._num_forgotten = 0
        self._is_ended = False

    def next(self) -> Reading[str]:
        """The next character; empty at the end of the answer, however often it is asked for."""
        if self._at == len(self._text) and not (yield from self._more()):
            return ""
        self._at += 1
        return self._text[self._at - 1]

    def run(self, stops: Collection[str]) -> Reading[str]:
        """Some characters, as many as are there before one of `stops`; empty: none, or the end."""
        if self._at == len(self._text) and not (yield from self._more()):
            return ""
        begin = end = self._at
        while end < len(self._text) and self._text[end] not in stops:
            end += 1
        self._at = end
        return "".join(self._text[begin:end])

    def _more(self) -> Reading[bool]:
        """Wait for the next piece of the answer; False: there is none."""
        text = "" if self._is_ended else (yield)
        self._text.extend(text)
        self._is_ended = not text
        return not self._is_ended

    def next_visible(self) -> Reading[str]:
        """The next character that is no white space."""
        while (char := (yield from self.next())).isspace():
            pass
        return char

    def back(self, char: str) -> None:
        """`char`, the last one read, will be read again."""
        self._at -= len(char)  # none at the end of the answer

    def mark(self) -> int:
        """Where reading is now, for `rewind`."""
        return self._num_forgotten + self._at

    def rewind(self, mark: int) -> None:
        """What was read since `mark` will be read again."""
        self._at = mark - self._num_forgotten

    def forget(self) -> None:
        """No earlier mark will be gone back to."""
        if self._at > _KEEP:
            self._num_forgotten += self._at
            del self._text[: self._at]
            self._at = 0

    def skip(self, text: str) -> Reading[bool]:
        """Read `text`, and white space before it, if it is there; whether it is."""
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
    """One answer, as it comes. A subclass says in `_run` how it is read."""

    markers: ClassVar[tuple[str, ...]] = ()
    """What it looks for in the text: if these are special tokens, they must not be left out."""

    def __init__(self) -> None:
        """Nothing seen yet."""
        self.chars = Chars()
        self._found: list[Piece] = []
        self._space = ""
        """White space after content: it belongs to what comes next, if that is content too."""
        self._drops_space = False
        self._reading = self._run()
        next(self._reading, None)

    @abstractmethod
    def _run(self) -> Reading[None]:
        """Read the whole answer; what is found is told by `_content` and the like."""

    def push(self, text: str) -> list[Piece]:
        """What `text`, the next piece of the answer, brought."""
        if text:
            self._reading.send(text)
        return self._take()

    def finish(self) -> list[Piece]:
        """What was held back, at the end of the answer. Nothing may be pushed after it."""
        with contextlib.suppress(StopIteration):
            self._reading.send("")
        self._found.append(Content(self._space))
        return self._take()

    def _take(self) -> list[Piece]:
        found, self._found = _joined(self._found), []
        return found

    # -- for subclasses -----------------------------------------------------------------------

    def _content(self, text: str) -> None:
        """Found: more content."""
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
        """Found: something that is no content; white space around it is not content either."""
        self._found.append(piece)
        self._space, self._drops_space = "", True

    def _content_until(self, *markers: str) -> Reading[str]:
        """Give out content until one of `markers` has been read: that one; empty: the end."""
        return (yield from self._until(markers, self._content))

    def _until(self, markers: Sequence[str], sink: Callable[[str], None]) -> Reading[str]:
        """Give everything to `sink` until one of `markers` has been read: that one, or the end."""
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
    """The same with neighbours of one kind put together, and none that is empty."""
    if len(pieces) == 1 and not isinstance(pieces[0], CallBegin) and pieces[0].text:
        return list(pieces)
    joined: list[Piece] = []
    for kind, run in groupby(pieces, type):
        if kind is CallBegin:
            joined.extend(run)
        elif text := "".join(piece.text for piece in run if not isinstance(piece, CallBegin)):
            joined.append(kind(text))
    return joined
