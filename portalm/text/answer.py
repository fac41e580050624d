"""One answer of a chat, taken apart: reasoning, content, tool calls; whole or as it comes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from portalm.text.char_parser import CallBegin, Content, Piece, Reasoning
from portalm.text.reasoning_parsers.base import ReasoningParser
from portalm.text.tool_parsers.base import ToolParser


@dataclass(slots=True)
class ToolCall:
    """A call of a function."""

    id: str
    name: str
    arguments: str = ""
    """JSON text, as the model wrote it."""


@dataclass(frozen=True, slots=True)
class CallDelta:
    """What was added to a call."""

    index: int
    """Which of the answer's calls."""
    begun: ToolCall | None
    """The call, where it begins here."""
    arguments: str = ""
    """More of its arguments."""


AnswerPiece = Reasoning | Content | CallDelta


class AnswerParser:
    """Takes one answer apart. What was found so far can be read at any time."""

    def __init__(
        self,
        *,
        reasoning: ReasoningParser | None = None,
        tools: ToolParser | None = None,
        new_call_id: Callable[[], str] = ToolParser.new_call_id,
        max_calls: int | None = None,
    ) -> None:
        """Nothing seen yet.

        Args:
            reasoning: finds the reasoning; None: there is none, or it is content.
            tools: finds tool calls in what is left; None: all of that is content.
            new_call_id: makes the ids of calls.
            max_calls: further calls are left out; None: none is.
        """
        self._reasoning: list[str] = []
        self._content: list[str] = []
        self.calls: list[ToolCall] = []
        self._reasoning_parser = reasoning
        self._tool_parser = tools
        self._new_call_id = new_call_id
        self._max_calls = max_calls
        self._is_past_max = False

    @property
    def reasoning(self) -> str:
        """The reasoning so far."""
        return "".join(self._reasoning)

    @property
    def content(self) -> str:
        """The content so far."""
        return "".join(self._content)

    def push(self, text: str) -> list[AnswerPiece]:
        """What `text`, the next piece of the answer, brought."""
        if self._reasoning_parser is None:
            return self._take(self._read_calls(text))
        return self._take(self._after_reasoning(self._reasoning_parser.push(text)))

    def finish(self) -> list[AnswerPiece]:
        """What was held back, at the end of the answer. Nothing may be pushed after it."""
        pieces: list[Piece] = []
        if self._reasoning_parser is not None:
            pieces += self._after_reasoning(self._reasoning_parser.finish())
        if self._tool_parser is not None:
            pieces += self._tool_parser.finish()
        return self._take(pieces)

    def _after_reasoning(self, pieces: Sequence[Piece]) -> list[Piece]:
        found: list[Piece] = []
        for piece in pieces:
            if isinstance(piece, Content):
                found += self._read_calls(piece.text)
            else:
                found.append(piece)
        return found

    def _read_calls(self, text: str) -> list[Piece]:
        if self._tool_parser is None:
            return [Content(text)] if text else []
        return self._tool_parser.push(text)

    def _take(self, pieces: Sequence[Piece]) -> list[AnswerPiece]:
        taken: list[AnswerPiece] = []
        for piece in pieces:
            if isinstance(piece, Reasoning):
                self._reasoning.append(piece.text)
                taken.append(piece)
            elif isinstance(piece, Content):
                self._content.append(piece.text)
                taken.append(piece)
            elif isinstance(piece, CallBegin):
                self._is_past_max = self._max_calls is not None and (
                    len(self.calls) >= self._max_calls
                )
                if not self._is_past_max:
                    call = ToolCall(self._new_call_id(), piece.name)
                    self.calls.append(call)
                    taken.append(CallDelta(len(self.calls) - 1, call))
            elif not self._is_past_max:
                self.calls[-1].arguments += piece.text
                taken.append(CallDelta(len(self.calls) - 1, None, piece.text))
        return taken
