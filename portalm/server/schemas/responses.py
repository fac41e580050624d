"""Body of POST /v1/responses. Unknown fields are refused by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from pydantic import BaseModel, ConfigDict, Field

from portalm.errors import InvalidRequest
from portalm.sampling_params import SamplingParams
from portalm.server.schemas.common import Messages
from portalm.server.schemas.conversation import checked_variables
from portalm.server.schemas.derived import NO_DEFAULTS, derived_fields, sampling_values
from portalm.server.schemas.formats import JsonSchemaFormat, ResponseFormat
from portalm.server.schemas.responses_input import as_messages
from portalm.server.schemas.tools import ToolUse, check_tools
from portalm.text.chat_template import Conversation

_UNSUPPORTED = {
    "conversation": "send previous_response_id, or the whole conversation as input",
    "prompt": "prompts are not stored: send input and instructions",
    "max_tool_calls": "the server calls no tools: the client does",
    "top_logprobs": "use /v1/chat/completions or /v1/completions",
}
_TOOL_FIELDS = ("name", "description", "parameters", "strict")


class TextFormat(BaseModel):
    """Constraint on the text of an answer."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    description: str | None = None
    strict: bool | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")

    def response_format(self) -> ResponseFormat:
        """The same constraint in the form of chat completions."""
        if self.type != "json_schema":
            return ResponseFormat(type=self.type)
        if self.schema_ is None:
            raise InvalidRequest(
                "text.format must have schema if its type is json_schema", param="text"
            )
        return ResponseFormat(
            type=self.type,
            json_schema=JsonSchemaFormat(name=self.name, strict=self.strict, schema=self.schema_),
        )


class TextConfig(BaseModel):
    """Options of the answer's text."""

    model_config = ConfigDict(extra="forbid")

    format: TextFormat | None = None
    verbosity: str | None = None


class ReasoningConfig(BaseModel):
    """Options of the model's reasoning."""

    model_config = ConfigDict(extra="forbid")

    effort: str | None = None
    summary: str | None = None
    generate_summary: str | None = None


class ResponsesStreamOptions(BaseModel):
    """Options of the event stream."""

    model_config = ConfigDict(extra="forbid")

    include_obfuscation: bool = False


if TYPE_CHECKING:
    _DerivedFields = BaseModel
else:
    _DerivedFields = derived_fields("seed", "top_k", "min_p")  # PortaLM's own


class ResponsesRequest(_DerivedFields):
    """POST /v1/responses."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    input: str | Messages
    instructions: str | None = None
    previous_response_id: str | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
    store: bool | None = None
    metadata: dict[str, str] | None = None
    stream: bool | None = None
    stream_options: ResponsesStreamOptions | None = None
    background: bool | None = None
    truncation: str | None = None
    include: list[str] | None = None

    # part of OpenAI's API and not supported: any value except null is refused by name
    conversation: Any = None
    prompt: Any = None
    max_tool_calls: Any = None
    top_logprobs: Any = None

    # part of OpenAI's API, without effect here
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    service_tier: str | None = None

    # PortaLM's own, as in chat completions
    chat_template_kwargs: dict[str, Any] | None = None
    priority: int = 0
    cache_salt: str | None = None
    request_id: str | None = None

    def check(self) -> None:
        """Raise `InvalidRequest` for known fields with unsupported values."""
        for name, instead in _UNSUPPORTED.items():
            if getattr(self, name):
                _refuse(name, f"is not supported: {instead}")
        if self.truncation not in (None, "disabled"):
            _refuse("truncation", f"{self.truncation!r} is not supported: send a shorter input")
        for what in self.include or ():
            if what != "reasoning.encrypted_content":  # reasoning is returned unencrypted
                _refuse("include", f"{what!r} is not supported")
        if self.text is not None and self.text.verbosity not in (None, "medium"):
            _refuse("text", "verbosity is not supported: ask for it in the instructions")
        if self.reasoning is not None:
            summary = self.reasoning.summary or self.reasoning.generate_summary
            if summary not in (None, "auto"):
                _refuse(
                    "reasoning",
                    f"summary {summary!r} is not supported: the full reasoning is returned",
                )
        if self.background and self.store is False:
            _refuse("background", "needs store, so that the response can be retrieved later")

    def params(self, defaults: Mapping[str, Any] = NO_DEFAULTS) -> SamplingParams:
        """Sampling parameters, unset ones from `defaults`. Raises `InvalidRequest`."""
        form = self.text.format if self.text is not None else None
        structured = form.response_format().structured_outputs() if form else None
        values = {"max_tokens": None, **sampling_values(self, defaults)}
        if self.max_output_tokens is not None:
            values["max_tokens"] = self.max_output_tokens
        return SamplingParams(**values, structured_outputs=structured)

    def tool_use(self) -> ToolUse:
        """The tools that answers may call. Raises `InvalidRequest`."""
        choice = self.tool_choice
        if isinstance(choice, Mapping) and choice.get("type") == "function":
            choice = {"type": "function", "function": {"name": choice.get("name")}}
        tools = [_nested(tool) for tool in self.tools or ()]
        return check_tools(tools, choice, is_parallel=self.parallel_tool_calls)

    def as_conversation(
        self, items: Sequence[Mapping[str, Any]], tools: ToolUse, template: str
    ) -> Conversation:
        """The conversation to render.

        Args:
            items: those of `input`, after those of earlier responses.
            tools: the tools that answers may call.
            template: Jinja text of the chat template.

        Raises:
            InvalidRequest: an item is malformed, or the template cannot set the reasoning effort.
        """
        return Conversation(
            messages=as_messages(items, self.instructions),
            tools=tools.tools,
            variables=self._template_variables(template),
        )

    def _template_variables(self, template: str) -> dict[str, Any]:
        variables = checked_variables(self.chat_template_kwargs)
        effort = self.reasoning.effort if self.reasoning is not None else None
        if effort is None:
            return variables
        if effort == "none" and "enable_thinking" in template:
            return {"enable_thinking": False, **variables}
        if effort != "none" and "reasoning_effort" in template:
            return {"reasoning_effort": effort, **variables}
        _refuse("reasoning", f"effort {effort!r} is not supported by the model's chat template")


def _nested(tool: Mapping[str, Any]) -> dict[str, Any]:
    """A tool in the form of chat completions."""
    function = {key: tool[key] for key in _TOOL_FIELDS if key in tool}
    others = {key: value for key, value in tool.items() if key not in _TOOL_FIELDS}
    return {**others, "function": function}


def _refuse(name: str, problem: str) -> NoReturn:
    raise InvalidRequest(f"{name} {problem}", param=name)
