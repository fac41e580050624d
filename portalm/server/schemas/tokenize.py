"""Bodies of POST /tokenize and /detokenize."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from portalm.server.schemas.common import MAX_PROMPT, Messages, TokenIds
from portalm.server.schemas.conversation import ConversationFields


class TokenizeRequest(ConversationFields):
    """POST /tokenize."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool = True
    return_token_strs: bool = False


class DetokenizeRequest(BaseModel):
    """POST /detokenize."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    tokens: Annotated[TokenIds, Field(max_length=MAX_PROMPT)]
