"""Render conversations as text with the Jinja templates of models.

Templates come from models and from callers, so they run in Jinja's sandbox and get plain data only.
The environment provides what Hugging Face templates expect.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NoReturn

from portalm.errors import ConfigError, InvalidRequest
from portalm.text.tool_prompt import write_tools

if TYPE_CHECKING:
    from jinja2 import Template

_CUT = "CONTINUE-HERE-7f3a "
"""Appended to the final message while rendering, to find where it ends. If the trailing space is
missing in the result, the template strips messages."""


class ChatTemplates:
    """A model's chat templates, by name."""

    def __init__(self, templates: Mapping[str, str], *, compile_now: bool = False) -> None:
        """Keep the templates; most models have only one, named default.

        Args:
            templates: Jinja source by name.
            compile_now: check all templates now.

        Raises:
            ConfigError: `compile_now` is set, and a template is not valid Jinja.
        """
        self._templates = dict(templates)
        if compile_now:
            for text in self._templates.values():
                try:
                    _compile(text)
                except InvalidRequest as error:
                    raise ConfigError(str(error)) from None

    @property
    def default(self) -> str | None:
        """Source of the default template; None if there is none."""
        return self._templates.get("default")

    def choose(self, template: str | None, *, has_tools: bool) -> str:
        """Choose a conversation's template and return its Jinja source.

        Args:
            template: Jinja source, or the name of one of the templates; None for the default.
            has_tools: the conversation has tools, so prefer the template named tool_use.

        Raises:
            InvalidRequest: the model has no chat template.
        """
        if template is not None:
            return self._templates.get(template, template)
        if has_tools and "tool_use" in self._templates:
            return self._templates["tool_use"]
        if self.default is None:
            raise InvalidRequest(
                "the model has no chat template; set one with --chat-template (or chat_template "
                "in the request), or send a text prompt instead of messages",
                param="messages",
            )
        return self.default


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """Input of a chat template."""

    messages: Sequence[Mapping[str, Any]]
    """Messages {"role": ..., "content": ...}; content is a string or a list of text parts."""
    tools: Sequence[Mapping[str, Any]] = ()
    """Functions that the model may call, as in OpenAI's chat completions."""
    add_generation_prompt: bool = True
    """End the prompt where the assistant's answer begins."""
    continue_final_message: bool = False
    """End the prompt inside the last message, for the model to continue it."""
    variables: Mapping[str, Any] = field(default_factory=dict)
    """Additional variables for the template."""


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """One chat template, ready to render conversations."""

    text: str
    """Jinja source."""
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    """Special tokens by role (bos_token, ...), available as variables in every conversation."""

    def render(self, conversation: Conversation) -> str:
        """Render a conversation as the prompt that the model was trained on.

        Raises:
            InvalidRequest: the messages are malformed, or the template rejects them.
        """
        messages = check_messages(conversation.messages)
        tools = _plain(conversation.tools, "tools") if conversation.tools else None
        if not takes_tools(self.text):
            messages = write_tools(messages, tools)
        if conversation.continue_final_message:
            _check_continue(messages, conversation.add_generation_prompt)
            messages[-1] = {**messages[-1], "content": messages[-1]["content"] + _CUT}
        text = self._run(
            {
                "documents": None,
                **self.special_tokens,
                **conversation.variables,
                "messages": messages,
                "tools": tools,
                "add_generation_prompt": conversation.add_generation_prompt,
            }
        )
        return _cut_final(text) if conversation.continue_final_message else text

    def answer_start(self, conversation: Conversation, prompt: str) -> str:
        """Return the part of a rendered prompt that already belongs to the answer.

        Args:
            conversation: the conversation that `prompt` was rendered from.
            prompt: the result of `render`.

        Returns:
            The generation prompt, or the content of the message to continue; may be empty.
        """
        if conversation.continue_final_message:
            return str(conversation.messages[-1].get("content") or "")
        if not conversation.add_generation_prompt:
            return ""
        return prompt.removeprefix(self.render(replace(conversation, add_generation_prompt=False)))

    def _run(self, variables: Mapping[str, Any]) -> str:
        try:
            return _compile(self.text).render(variables)
        except InvalidRequest:
            raise
        except Exception as error:  # a template is a program: it may raise anything
            raise InvalidRequest(
                f"the chat template rejected the conversation: {error or type(error).__name__}",
                param="messages",
            ) from error


# -- messages ---------------------------------------------------------------------------------


def check_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Check messages and convert them to the plain data that templates expect.

    Content becomes a string (text parts are joined by newlines, missing content is ""), and the
    arguments of tool calls become objects.

    Raises:
        InvalidRequest: there are no messages, or one is malformed; the error names its place.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        _refuse("must be a list of {'role': ..., 'content': ...} objects")
    if not messages:
        _refuse("must not be empty")
    return [_check_message(message, f"[{i}]") for i, message in enumerate(messages)]


def _check_message(message: Any, place: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        _refuse(f"{place} must be an object with role and content, not {type(message).__name__}")
    role = message.get("role")
    if not isinstance(role, str) or not role:
        _refuse(f"{place}.role must be a string such as system, user or assistant, not {role!r}")
    plain: dict[str, Any] = _plain(message, "messages")
    has_calls = bool(plain.get("tool_calls"))
    plain["content"] = _flatten(
        plain.get("content"), f"{place}.content", is_optional=has_calls or role == "assistant"
    )
    if has_calls:
        plain["tool_calls"] = _check_calls(plain["tool_calls"], f"{place}.tool_calls")
    else:
        plain.pop("tool_calls", None)
    return plain


def _flatten(content: Any, place: str, *, is_optional: bool) -> str:
    """Convert a message's content to a string."""
    if isinstance(content, str):
        return content
    if content is None and is_optional:
        return ""
    if not isinstance(content, list):
        _refuse(f"{place} must be a string or a list of parts, not {type(content).__name__}")
    texts = []
    for i, part in enumerate(content):
        if isinstance(part, str):
            texts.append(part)
            continue
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind not in ("text", "input_text", "output_text"):
            _refuse(f"{place}[{i}] has type {kind!r}; this model supports text parts only")
        if not isinstance(part.get("text"), str):
            _refuse(f"{place}[{i}].text must be a string")
        texts.append(part["text"])
    return "\n".join(texts)


def _check_calls(calls: Any, place: str) -> list[Any]:
    if not isinstance(calls, list):
        _refuse(f"{place} must be a list")
    for i, call in enumerate(calls):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict):
            _refuse(f"{place}[{i}].function must be an object with name and arguments")
        arguments = function.get("arguments")
        if isinstance(arguments, str) or arguments is None:
            try:
                function["arguments"] = json.loads(arguments or "{}")
            except ValueError as error:
                _refuse(f"{place}[{i}].function.arguments is not valid JSON: {error}")
    return calls


def _plain(value: Any, param: str) -> Any:
    """Copy `value` using JSON types only, so that templates cannot call methods."""
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item, param) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return [_plain(item, param) for item in value]
    raise InvalidRequest(
        f"{param} may contain JSON values only, not {type(value).__name__}", param=param
    )


def _refuse(problem: str) -> NoReturn:
    raise InvalidRequest(f"messages{'' if problem[0] == '[' else ' '}{problem}", param="messages")


# -- continuing the final message -------------------------------------------------------------


def _check_continue(messages: list[dict[str, Any]], add_generation_prompt: bool) -> None:
    if add_generation_prompt:
        raise InvalidRequest(
            "continue_final_message and add_generation_prompt exclude each other: the first "
            "continues the last message, the second starts a new one; set one of them to false",
            param="continue_final_message",
        )
    if not messages[-1]["content"]:
        raise InvalidRequest(
            "continue_final_message needs a last message with content to continue",
            param="continue_final_message",
        )


def _cut_final(text: str) -> str:
    """Cut a rendered prompt at the end of its final message."""
    end = text.rfind(_CUT.rstrip())
    if end < 0:
        raise InvalidRequest(
            "continue_final_message is not possible: the chat template omits or changes the last "
            "message",
            param="continue_final_message",
        )
    return text[:end] if text.startswith(_CUT, end) else text[:end].rstrip()


# -- Jinja ------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def _compile(text: str) -> Template:
    """Compile a template; raises `InvalidRequest`, with the line, if it is not valid Jinja."""
    from jinja2 import TemplateSyntaxError

    try:
        template: Template = _environment().from_string(text)
    except TemplateSyntaxError as error:
        raise InvalidRequest(
            f"the chat template is not valid Jinja, line {error.lineno}: {error.message}",
            param="chat_template",
        ) from None
    return template


@lru_cache(maxsize=64)
def takes_tools(text: str) -> bool:
    """Return True if a template uses the list of tools, or formats tool calls."""
    from jinja2 import TemplateSyntaxError, meta

    if "tool_calls" in text:
        return True
    try:
        return "tools" in meta.find_undeclared_variables(_environment().parse(text))
    except TemplateSyntaxError:
        return True  # rendering raises the error


@lru_cache(maxsize=1)
def _environment() -> Any:
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}`, which marks the assistant's text for training: ignored here."""

        tags = {"generation"}  # noqa: RUF012 - Jinja's own declaration

        def parse(self, parser: Any) -> nodes.Node | list[nodes.Node]:
            """Return the nodes inside the tag."""
            next(parser.stream)
            body: list[nodes.Node] = parser.parse_statements(
                ("name:endgeneration",), drop_needle=True
            )
            return body

    def raise_exception(message: str) -> NoReturn:
        raise TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        """Format as JSON, without the HTML escapes of Jinja's own filter."""
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment
