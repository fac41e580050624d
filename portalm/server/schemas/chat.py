"""Body of POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from portalm.errors import InvalidRequest
from portalm.sampling_params import SamplingParams
from portalm.server.schemas.common import Messages
from portalm.server.schemas.conversation import ConversationFields
from portalm.server.schemas.derived import NO_DEFAULTS
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

    def params(self, defaults: Mapping[str, Any] = NO_DEFAULTS) -> SamplingParams:
        """Sampling parameters, unset ones from `defaults`. Raises `InvalidRequest`."""
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs: true", param="top_logprobs")
        max_tokens = self.max_completion_tokens
        if max_tokens is None:
            max_tokens = self.max_tokens
        return self.sampling_params(
            defaults,
            max_tokens=defaults.get("max_tokens") if max_tokens is None else max_tokens,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
        )

    def tool_use(self) -> ToolUse:
        """The tools that answers may call. Raises `InvalidRequest`."""
        return check_tools(self.tools, self.tool_choice, is_parallel=self.parallel_tool_calls)

    def as_conversation(self, tools: ToolUse) -> Conversation:
        """The messages and tools to render. Raises `InvalidRequest`."""
        return self.conversation_of(self.messages, tools)
