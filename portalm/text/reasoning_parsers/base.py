"""Base class of reasoning parsers: reasoning between <think> and </think>, then the answer."""

from __future__ import annotations

from abc import abstractmethod

from portalm.text.char_parser import CharParser, Piece, Reading, Reasoning

_BEGIN = "<think>"
_END = "</think>"


class ReasoningParser(CharParser):
    """Incremental parser of one answer's reasoning and content; a subclass reads one format.

    Whitespace at both ends of the reasoning, and before the content after it, is dropped.
    """

    markers = (_BEGIN, _END)

    def __init__(self, answer_start: str) -> None:
        """Start at the beginning of an answer.

        Args:
            answer_start: start of the assistant's message that is already in the prompt.
        """
        answer_start = answer_start.rstrip()
        self.is_begun = answer_start.rfind(_BEGIN) > answer_start.rfind(_END)
        """Whether the prompt opens the reasoning."""
        self.is_over = answer_start.endswith(_END)
        """Whether the prompt closes the reasoning, so that the answer has none."""
        super().__init__()

    @classmethod
    def parse(cls, text: str, answer_start: str = "") -> list[Piece]:
        """Parse a whole answer at once."""
        parser = cls(answer_start)
        return [*parser.push(text), *parser.finish()]

    @abstractmethod
    def _begins(self) -> Reading[bool]:
        """Read the opening tag, if there is one; returns True if reasoning follows."""

    def _run(self) -> Reading[None]:
        if not self.is_over and (yield from self._begins()):
            yield from self._reasoning()
        yield from self._content_until()

    def _skip_opening_tag(self) -> Reading[bool]:
        """Read the opening tag if it comes next; returns True if it did."""
        return (yield from self.chars.skip(_BEGIN))

    def _reasoning(self) -> Reading[None]:
        """Emit reasoning up to the closing tag, without whitespace at either end."""
        char = yield from self.chars.next_visible()
        self.chars.back(char)
        held = ""

        def sink(text: str) -> None:
            nonlocal held
            body = (held + text).rstrip()
            held = (held + text)[len(body) :]
            self._other(Reasoning(body))

        yield from self._until([_END], sink)
        self._drops_space = True
