"""Body of POST /v1/chat/completions."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from portalm.errors import InvalidRequest
from portalm.sampling_params import SamplingParams
from portalm.server.schemas.common import Messages, checked_variables
from portalm.server.schemas.sampling import SamplingFields
from portalm.server.schemas.tools import ToolUse, check_tools


class ChatRequest(SamplingFields):
    """POST /v1/chat/completions."""

    messages: Messages
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_ids: bool = False
    truncate_prompt_tokens: int | None = Field(default=None, ge=-1)

    def template_variables(self) -> dict[str, Any]:
        """More variables for the chat template. Raises `InvalidRequest` for the server's own."""
        return checked_variables(self.chat_template_kwargs)

    def params(self) -> SamplingParams:
        """The parameters. Raises `InvalidRequest`."""
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs: true", param="top_logprobs")
        return self.sampling_params(
            max_tokens=self.max_completion_tokens or self.max_tokens
            if self.max_completion_tokens != 0
            else 0,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
        )

    def tool_use(self) -> ToolUse:
        """What is said about tools. Raises `InvalidRequest`."""
        return check_tools(self.tools, self.tool_choice, is_parallel=self.parallel_tool_calls)
