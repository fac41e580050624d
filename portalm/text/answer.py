"""Split a chat answer into reasoning, content and tool calls, whole or incrementally."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from portalm.text.char_parser import CallBegin, Content, Piece, Reasoning
from portalm.text.reasoning_parsers.base import ReasoningParser
from portalm.text.tool_parsers.base import ToolParser


@dataclass(slots=True)
class ToolCall:
    """One function call."""

    id: str
    name: str
    arguments: str = ""
    """JSON text, as the model wrote it."""


@dataclass(frozen=True, slots=True)
class CallDelta:
    """An update of one tool call."""

    index: int
    """Position of the call among the answer's calls."""
    new_call: ToolCall | None
    """The call if this delta starts it, otherwise None."""
    arguments: str = ""
    """Text to append to its arguments."""


AnswerPiece = Reasoning | Content | CallDelta


class AnswerParser:
    """Incremental parser of one answer; the result so far can be read at any time."""

    def __init__(
        self,
        *,
        reasoning: ReasoningParser | None = None,
        tools: ToolParser | None = None,
        new_call_id: Callable[[], str] = ToolParser.new_call_id,
        max_calls: int | None = None,
    ) -> None:
        """Start at the beginning of an answer.

        Args:
            reasoning: parser of the reasoning; None leaves any reasoning in the content.
            tools: parser of tool calls in the text after the reasoning; None makes it all content.
            new_call_id: returns a new id for each call.
            max_calls: maximum number of calls, later ones are dropped; None is no limit.
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
        """Parse `text`, the next piece of the answer, and return what it completed."""
        if self._reasoning_parser is None:
            return self._take(self._read_calls(text))
        return self._take(self._after_reasoning(self._reasoning_parser.push(text)))

    def finish(self) -> list[AnswerPiece]:
        """End the answer and return what was held back. Nothing may be pushed afterwards."""
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
