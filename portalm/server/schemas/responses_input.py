"""Converts items of the Responses API to the messages of a chat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from portalm.errors import InvalidRequest

_ROLES = {"user": "user", "assistant": "assistant", "system": "system", "developer": "system"}
"""Role of a chat message by role of an item: chat templates have no developer role."""
_TEXT_PARTS = ("input_text", "output_text", "text", "reasoning_text", "summary_text")


def as_items(given: str | Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The items of an `input`; a string is one message of the user."""
    if isinstance(given, str):
        return [{"type": "message", "role": "user", "content": given}]
    return [{"type": "message", **item} if "role" in item else dict(item) for item in given]


def as_messages(
    items: Sequence[Mapping[str, Any]], instructions: str | None
) -> list[dict[str, Any]]:
    """Convert items to the messages of a conversation.

    Consecutive reasoning, messages and calls of the assistant become one message.

    Raises:
        InvalidRequest: an item is malformed or of an unknown type; the text names it.
    """
    messages: list[dict[str, Any]] = []
    if instructions is not None:
        messages.append({"role": "system", "content": instructions})
    is_open = False
    """Whether the last message is the assistant's and takes its next items."""
    for i, item in enumerate(items):
        addition = _message_of(item, f"input[{i}]")
        if addition["role"] != "assistant":
            is_open = False
            messages.append(addition)
        elif is_open:
            _extend(messages[-1], addition)
        else:
            is_open = True
            messages.append(addition)
    if not messages:
        _refuse("input", "must not be empty")
    return messages


def _extend(message: dict[str, Any], addition: Mapping[str, Any]) -> None:
    """Merge `addition` into a message of the assistant."""
    for name in ("content", "reasoning_content"):
        texts = [part[name] for part in (message, addition) if part.get(name)]
        if texts:
            message[name] = "\n".join(texts)
    if "tool_calls" in addition:
        message["tool_calls"] = [*message.get("tool_calls", ()), *addition["tool_calls"]]


def _message_of(item: Mapping[str, Any], place: str) -> dict[str, Any]:
    kind = item.get("type")
    if kind == "message":
        role = item.get("role")
        if role not in _ROLES:
            _refuse(f"{place}.role", f"must be one of {', '.join(_ROLES)}, not {role!r}")
        return {"role": _ROLES[role], "content": _text(item.get("content"), f"{place}.content")}
    if kind == "function_call":
        call = {name: _required(item, name, place) for name in ("call_id", "name", "arguments")}
        function = {"name": call["name"], "arguments": call["arguments"]}
        calls = [{"id": call["call_id"], "type": "function", "function": function}]
        return {"role": "assistant", "content": "", "tool_calls": calls}
    if kind == "function_call_output":
        return {
            "role": "tool",
            "tool_call_id": _required(item, "call_id", place),
            "content": _text(item.get("output"), f"{place}.output"),
        }
    if kind == "reasoning":
        parts = item.get("content") or item.get("summary") or ""
        text = _text(parts, f"{place}.content")
        return {"role": "assistant", "content": "", "reasoning_content": text}
    _refuse(
        f"{place}.type",
        f"{kind!r} is not supported; use message, function_call, function_call_output or reasoning",
    )


def _required(item: Mapping[str, Any], name: str, place: str) -> str:
    value = item.get(name)
    if not isinstance(value, str):
        _refuse(f"{place}.{name}", f"must be a string, not {value!r}"[:200])
    return value


def _text(content: Any, place: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        _refuse(place, f"must be a string or a list of parts, not {type(content).__name__}")
    texts = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        text = part.get("refusal" if kind == "refusal" else "text") if kind in (
            *_TEXT_PARTS, "refusal"
        ) else None  # fmt: skip
        if not isinstance(text, str):
            _refuse(f"{place}[{i}]", f"of type {kind!r} is not supported; use parts with text")
        texts.append(text)
    return "\n".join(texts)


def _refuse(place: str, problem: str) -> NoReturn:
    raise InvalidRequest(f"{place} {problem}", param="input")
