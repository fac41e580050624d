"""Body of POST /v1/chat/completions."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from portalm.errors import InvalidRequest
from portalm.sampling_params import SamplingParams
from portalm.server.schemas.common import Messages
from portalm.server.schemas.conversation import ConversationFields
from portalm.server.schemas.sampling import SamplingFields
from portalm.server.schemas.tools import ToolUse, check_tools
from portalm.text.chat_template import Conversation


class ChatRequest(SamplingFields, ConversationFields):
    """POST /v1/chat/completions."""

    messages: Messages
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    return_token_ids: bool = False
    truncate_prompt_tokens: int | None = Field(default=None, ge=-1)

    def params(self) -> SamplingParams:
        """Sampling parameters of the request. Raises `InvalidRequest`."""
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs: true", param="top_logprobs")
        return self.sampling_params(
            max_tokens=self.max_completion_tokens or self.max_tokens
            if self.max_completion_tokens != 0
            else 0,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
        )

    def tool_use(self) -> ToolUse:
        """The tools that answers may call. Raises `InvalidRequest`."""
        return check_tools(self.tools, self.tool_choice, is_parallel=self.parallel_tool_calls)

    def as_conversation(self, tools: ToolUse) -> Conversation:
        """The messages and tools to render. Raises `InvalidRequest`."""
        return self.conversation_of(self.messages, tools)
