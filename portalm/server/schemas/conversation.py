"""Fields of the endpoints that render a conversation with the chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

from portalm.errors import InvalidRequest
from portalm.server.schemas.tools import ToolUse
from portalm.text.chat_template import Conversation

_RESERVED_VARIABLES = {
    "self", "messages", "add_generation_prompt", "continue_final_message", "tools", "template",
}  # fmt: skip
"""Variables that the server passes to chat templates itself."""


class ConversationFields(BaseModel):
    """Options of rendering messages."""

    model_config = ConfigDict(extra="forbid")

    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def conversation_of(
        self, messages: Sequence[Mapping[str, Any]], tools: ToolUse | None = None
    ) -> Conversation:
        """`messages` and the options as one value to render.

        Raises:
            InvalidRequest: chat_template_kwargs sets a reserved variable.
        """
        return Conversation(
            messages=[_with_reasoning(message) for message in messages],
            tools=() if tools is None else tools.tools,
            add_generation_prompt=self.add_generation_prompt and not self.continue_final_message,
            continue_final_message=self.continue_final_message,
            variables=checked_variables(self.chat_template_kwargs),
        )


def checked_variables(variables: dict[str, Any] | None) -> dict[str, Any]:
    """chat_template_kwargs of a request. Raises `InvalidRequest` if one is reserved."""
    for name in _RESERVED_VARIABLES & (variables or {}).keys():
        raise InvalidRequest(
            f"chat_template_kwargs must not set {name!r}: the server sets it",
            param="chat_template_kwargs",
        )
    return variables or {}


def _with_reasoning(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """`message` with its reasoning under the name that chat templates read."""
    if isinstance(message, Mapping) and isinstance(message.get("reasoning"), str):
        return {"reasoning_content": message["reasoning"], **message}
    return message
