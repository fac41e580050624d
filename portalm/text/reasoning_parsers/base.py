"""What formats of reasoning share: thoughts between <think> and </think>, then the answer."""

from __future__ import annotations

from abc import abstractmethod

from portalm.text.char_parser import CharParser, Piece, Reading, Reasoning

_BEGIN = "<think>"
_END = "</think>"


class ReasoningParser(CharParser):
    """One answer's reasoning and what follows it, as they come.

    White space at both ends of the reasoning, and before what follows it, is not given out.
    """

    markers = (_BEGIN, _END)

    def __init__(self, begun: str) -> None:
        """Nothing seen yet.

        Args:
            begun: what the prompt has of the assistant's message already.
        """
        begun = begun.rstrip()
        self.is_begun = begun.rfind(_BEGIN) > begun.rfind(_END)
        """The prompt has opened the reasoning."""
        self.is_over = begun.endswith(_END)
        """The prompt has closed it: there will be none."""
        super().__init__()

    @classmethod
    def parse(cls, text: str, begun: str = "") -> list[Piece]:
        """All of an answer at once."""
        parser = cls(begun)
        return [*parser.push(text), *parser.finish()]

    @abstractmethod
    def _begins(self) -> Reading[bool]:
        """Read the tag that opens the reasoning, if there is one; whether reasoning follows."""

    def _run(self) -> Reading[None]:
        if not self.is_over and (yield from self._begins()):
            yield from self._reasoning()
        yield from self._content_until()

    def _opened(self) -> Reading[bool]:
        """Read the tag, if it is there."""
        return (yield from self.chars.skip(_BEGIN))

    def _reasoning(self) -> Reading[None]:
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
