"""Bodies of POST /tokenize and /detokenize."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from portalm.server.schemas.common import MAX_PROMPT, Messages, TokenIds, checked_variables


class TokenizeRequest(BaseModel):
    """POST /tokenize."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool = False

    def template_variables(self) -> dict[str, Any]:
        """More variables for the chat template. Raises `InvalidRequest` for the server's own."""
        return checked_variables(self.chat_template_kwargs)


class DetokenizeRequest(BaseModel):
    """POST /detokenize."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    tokens: Annotated[TokenIds, Field(max_length=MAX_PROMPT)]
