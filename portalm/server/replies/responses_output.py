"""The output of a response while it is written: its items, and the events that describe them."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any, Literal

from portalm.text.answer import AnswerPiece, ToolCall
from portalm.text.char_parser import Content, Reasoning

Event = dict[str, Any]
"""An event of a stream, before it gets its sequence_number."""
Status = Literal["completed", "incomplete"]


class ResponseOutput:
    """Output items of a response. An item is complete before the next one begins."""

    def __init__(self) -> None:
        """Start with no items."""
        self.items: list[dict[str, Any]] = []
        self._kind: type[AnswerPiece] | None = None
        """Kind of piece that extends the last item; None: the item is complete."""
        self._texts: list[str] = []
        """Text of the last item so far, in pieces."""

    def add(self, pieces: Sequence[AnswerPiece]) -> list[Event]:
        """Add pieces of the answer; returns the events of the changes."""
        events: list[Event] = []
        for piece in pieces:
            if isinstance(piece, Reasoning):
                events += self._open(Reasoning, _reasoning_item, "reasoning_text")
                events.append(self._text_event("reasoning_text.delta", delta=piece.text))
                self._texts.append(piece.text)
            elif isinstance(piece, Content):
                events += self._open(Content, _message_item, "output_text")
                events.append(self._text_event("output_text.delta", delta=piece.text, logprobs=[]))
                self._texts.append(piece.text)
            else:
                if piece.new_call is not None:
                    events += self._begin(_call_item(piece.new_call))
                    self._kind = type(piece)
                if piece.arguments:
                    events.append(
                        self._event("function_call_arguments.delta", delta=piece.arguments)
                    )
                    self._texts.append(piece.arguments)
        return events

    def finish(self, status: Status) -> list[Event]:
        """Complete the output; returns the events. Without items, an empty message is added."""
        events = [] if self.items else self._open(Content, _message_item, "output_text")
        return events + self._close(status)

    # -- items --------------------------------------------------------------------------------

    def _open(self, kind: type[AnswerPiece], make_item: Any, part_type: str) -> list[Event]:
        """Begin a text item, unless the last item is of the same kind and still open."""
        if self._kind is kind:
            return []
        events = self._begin(make_item())
        self._kind = kind
        return [*events, self._text_event("content_part.added", part=_part(part_type, ""))]

    def _begin(self, item: dict[str, Any]) -> list[Event]:
        events = self._close("completed")
        self.items.append(item)
        return [*events, self._item_event("output_item.added")]

    def _close(self, status: Status) -> list[Event]:
        """Complete the last item."""
        if self._kind is None:
            return []
        item, text = self.items[-1], "".join(self._texts)
        if item["type"] == "function_call":
            item["arguments"] = text
            events = [
                self._event("function_call_arguments.done", arguments=text, name=item["name"])
            ]
        else:
            is_message = item["type"] == "message"
            name = "output_text" if is_message else "reasoning_text"
            part = _part(name, text)
            item["content"] = [part]
            logprobs: dict[str, Any] = {"logprobs": []} if is_message else {}
            events = [
                self._text_event(f"{name}.done", text=text, **logprobs),
                self._text_event("content_part.done", part=part),
            ]
        item["status"] = status
        self._kind, self._texts = None, []
        return [*events, self._item_event("output_item.done")]

    # -- events -------------------------------------------------------------------------------

    def _event(self, kind: str, **fields: Any) -> Event:
        index = len(self.items) - 1
        item_id = self.items[-1]["id"]
        return {"type": f"response.{kind}", "item_id": item_id, "output_index": index, **fields}

    def _text_event(self, kind: str, **fields: Any) -> Event:
        return self._event(kind, content_index=0, **fields)

    def _item_event(self, kind: str) -> Event:
        index = len(self.items) - 1
        return {"type": f"response.{kind}", "output_index": index, "item": {**self.items[-1]}}


def _message_item() -> dict[str, Any]:
    return {
        "id": f"msg_{uuid.uuid4().hex}",
        "type": "message",
        "role": "assistant",
        "status": "in_progress",
        "content": [],
    }


def _reasoning_item() -> dict[str, Any]:
    return {
        "id": f"rs_{uuid.uuid4().hex}",
        "type": "reasoning",
        "status": "in_progress",
        "summary": [],
        "content": [],
    }


def _call_item(call: ToolCall) -> dict[str, Any]:
    return {
        "id": f"fc_{uuid.uuid4().hex}",
        "type": "function_call",
        "status": "in_progress",
        "call_id": call.id,
        "name": call.name,
        "arguments": "",
    }


def _part(kind: str, text: str) -> dict[str, Any]:
    if kind == "output_text":
        return {"type": kind, "text": text, "annotations": [], "logprobs": []}
    return {"type": kind, "text": text}
