"""Plans how a conversation is answered: its prompt, and the parsers of its answers."""

from __future__ import annotations

from dataclasses import dataclass, replace

from portalm.errors import ConfigError, InvalidRequest
from portalm.sampling_params import SamplingParams, StructuredOutputs
from portalm.server.schemas.tools import ToolUse
from portalm.text.answer import AnswerParser
from portalm.text.chat_template import ChatTemplate, Conversation
from portalm.text.reasoning_parsers import REASONING_PARSERS
from portalm.text.reasoning_parsers.base import ReasoningParser
from portalm.text.tokenizer import Tokenizer
from portalm.text.tool_parsers import TOOL_PARSERS, detect_format
from portalm.text.tool_parsers.base import ToolParser
from portalm.text.tool_parsers.forced import NamedCallParser, RequiredCallsParser


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerFormat:
    """How the served model writes tool calls and reasoning; set by flags of `portalm serve`."""

    tool_call_parser: str | None = None
    """A name in portalm.text.tool_parsers; None: detect it from the chat template."""
    reasoning_parser: str | None = None
    """A name in portalm.text.reasoning_parsers; None: reasoning is part of the content."""
    enable_auto_tool_choice: bool = False
    """Refuse to start if no tool call parser is set or detected."""

    def __post_init__(self) -> None:
        """Reject unknown names of parsers."""
        if self.tool_call_parser is not None:
            TOOL_PARSERS.get(self.tool_call_parser)
        if self.reasoning_parser is not None:
            REASONING_PARSERS.get(self.reasoning_parser)

    def tool_parser(self, template: str) -> type[ToolParser] | None:
        """Tool call parser of a model with this chat template; None: the format is unknown."""
        name = self.tool_call_parser or detect_format(template)
        return None if name is None else TOOL_PARSERS.get(name)

    def check(self, tokenizer: Tokenizer) -> None:
        """Raise `ConfigError` if tool calls are required and not possible with the model."""
        template = tokenizer.chat_template
        if self.enable_auto_tool_choice and (
            template is None or self.tool_parser(template) is None
        ):
            raise ConfigError(
                "--enable-auto-tool-choice: the format of tool calls cannot be detected from the "
                "model's chat template; set it with --tool-call-parser "
                f"({', '.join(TOOL_PARSERS.names())})"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatPlan:
    """The prompt of a conversation, and how to parse its answers."""

    prompt: str
    """Rendered text, special tokens included: the tokenizer must not add any."""
    params: SamplingParams
    tools: ToolUse
    tool_parser: type[ToolParser] | None
    reasoning_parser: type[ReasoningParser] | None
    answer_start: str
    """The part of the prompt that already belongs to the answer."""

    def new_parser(self) -> AnswerParser:
        """A parser for one of the answers."""
        return AnswerParser(
            reasoning=self.reasoning_parser(self.answer_start) if self.reasoning_parser else None,
            tools=self._new_tool_parser(),
            new_call_id=(self.tool_parser or ToolParser).new_call_id,
            max_calls=self.tools.max_calls,
        )

    def _new_tool_parser(self) -> ToolParser | None:
        if self.tools.named is not None:
            return NamedCallParser([self.tools.named])
        if self.tools.choice == "required":
            return RequiredCallsParser(self.tools.names)
        if self.tools.choice == "auto" and self.tool_parser is not None:
            return self.tool_parser(self.tools.names)
        return None


def plan_chat(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    form: AnswerFormat,
    conversation: Conversation,
    params: SamplingParams,
    tools: ToolUse,
) -> ChatPlan:
    """Render the prompt of a conversation, and choose the parsers of its answers.

    Args:
        tokenizer: the model's.
        template: the template to render `conversation` with.
        form: how the model writes tool calls and reasoning.
        conversation: messages and tools.
        params: sampling parameters of the request.
        tools: the request's tools and tool_choice.

    Raises:
        InvalidRequest: the conversation cannot be answered as asked.
    """
    tool_parser = form.tool_parser(template.text) if tools.tools else None
    if tools.tools:
        _check_tools_possible(tools, tool_parser, params)
    if tools.is_forced:
        params = replace(params, structured_outputs=StructuredOutputs(json=tools.forced_schema()))
    prompt = template.render(conversation)
    answer_start, reasoning_parser = "", None
    if form.reasoning_parser is not None:
        reasoning_parser = REASONING_PARSERS.get(form.reasoning_parser)
        answer_start = template.answer_start(conversation, prompt)
        if params.structured_outputs is not None:
            _check_reasoning_over(reasoning_parser(answer_start), tools)
    markers = [
        *(tool_parser.markers if tool_parser and tools.choice == "auto" else ()),
        *(reasoning_parser.markers if reasoning_parser else ()),
    ]
    if any(tokenizer.token_to_id(marker) in tokenizer.special_ids for marker in markers):
        params = replace(params, skip_special_tokens=False)
    return ChatPlan(
        prompt=prompt,
        params=params,
        tools=tools,
        tool_parser=tool_parser,
        reasoning_parser=reasoning_parser,
        answer_start=answer_start,
    )


def _check_tools_possible(
    tools: ToolUse, tool_parser: type[ToolParser] | None, params: SamplingParams
) -> None:
    """Raise `InvalidRequest` if calls could not be parsed, or the answer cannot have any."""
    if tools.choice == "auto" and tool_parser is None:
        raise InvalidRequest(
            "tool_choice 'auto': the format of tool calls cannot be detected from the model's "
            "chat template; start the server with --tool-call-parser "
            f"({', '.join(TOOL_PARSERS.names())}), or send tool_choice 'required' or 'none'",
            param="tool_choice",
        )
    if params.structured_outputs is not None:
        raise InvalidRequest(
            f"tool_choice {tools.choice!r} cannot be combined with response_format or "
            "structured_outputs: such an answer cannot have calls; send tool_choice 'none'",
            param="tool_choice",
        )


def _check_reasoning_over(parser: ReasoningParser, tools: ToolUse) -> None:
    """Raise `InvalidRequest` if a grammar would have to wait until the reasoning ends."""
    if not parser.is_over:
        raise InvalidRequest(
            "structured output and forced tool calls apply from the first token, but this model "
            'reasons first: disable that (chat_template_kwargs {"enable_thinking": false}), or '
            "send neither response_format nor a tool_choice that forces calls",
            param="tool_choice" if tools.is_forced else "response_format",
        )
