"""Limits and field types that several request bodies share."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from portalm.errors import InvalidRequest

MAX_ANSWERS = 4096
"""Of one request: prompts times n."""

MAX_PROMPT = 1 << 20
"""Token ids of one prompt, whatever the model: longer ones are not looked at."""

_RESERVED_VARIABLES = {
    "self", "messages", "add_generation_prompt", "continue_final_message", "tools", "template",
}  # fmt: skip
"""Of chat templates: what the server gives them itself, and what its functions call so."""

Messages = Annotated[list[dict[str, Any]], Field(fail_fast=True, max_length=4096)]
TokenIds = Annotated[list[int], Field(fail_fast=True)]
Texts = Annotated[list[str], Field(fail_fast=True)]
StopText = Annotated[str, Field(max_length=1024)]
"""Lists stop at their first wrong item: a body may hold millions of them."""


def checked_variables(variables: dict[str, Any] | None) -> dict[str, Any]:
    """Variables that a request gives to the chat template. Raises `InvalidRequest`."""
    for name in _RESERVED_VARIABLES & (variables or {}).keys():
        raise InvalidRequest(
            f"chat_template_kwargs may not set {name!r}: the server does",
            param="chat_template_kwargs",
        )
    return variables or {}
