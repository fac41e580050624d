"""Conversations to text, by the Jinja templates that models ship.

Templates come with models (and from callers): they run in Jinja's sandbox and see plain data only.
The environment is the one that Hugging Face templates are written for.
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
"""Stands behind the final message while it is rendered, to find where it ends. Without the space
at its end: the template strips messages."""


class ChatTemplates:
    """The templates of a model, by name."""

    def __init__(self, templates: Mapping[str, str], *, compile_now: bool = False) -> None:
        """The templates; most models have one, named default.

        Args:
            templates: Jinja texts by name.
            compile_now: raise `ConfigError` for a text that is no template.
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
        """The template that is used where none is named."""
        return self._templates.get("default")

    def choose(self, template: str | None, *, has_tools: bool) -> str:
        """The Jinja text of a conversation's template.

        Args:
            template: Jinja text, or the name of one of the templates; None: the default.
            has_tools: the conversation has tools: prefer the template named tool_use.

        Raises:
            InvalidRequest: the model has no chat template.
        """
        if template is not None:
            return self._templates.get(template, template)
        if has_tools and "tool_use" in self._templates:
            return self._templates["tool_use"]
        if self.default is None:
            raise InvalidRequest(
                "the model has no chat template: give one with --chat-template (or chat_template "
                "in the request), or send a text prompt instead of messages",
                param="messages",
            )
        return self.default


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """What a chat template turns into a prompt."""

    messages: Sequence[Mapping[str, Any]]
    """{"role": ..., "content": ...} each; content is a text or a list of parts of type text."""
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
    """Variables that every conversation sees: special tokens by role (bos_token, ...)."""

    def render(self, conversation: Conversation) -> str:
        """Render a conversation as the prompt that the model was trained on.

        Raises:
            InvalidRequest: the messages are malformed, or the template refuses them.
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
        """The part of a rendered prompt that already belongs to the answer.

        Args:
            conversation: what `prompt` was rendered from.
            prompt: as `render` returned it.

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
                f"the chat template refuses this conversation: {error or type(error).__name__}",
                param="messages",
            ) from error


# -- messages ---------------------------------------------------------------------------------


def check_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """`messages` as plain data that templates expect.

    Content becomes a text (parts of type text are joined by newlines, none is empty), arguments
    of tool calls become objects.

    Raises:
        InvalidRequest: no messages, or one that is malformed, named by its place.
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
        _refuse(f"{place}.role must be a text such as system, user or assistant, not {role!r}")
    plain: dict[str, Any] = _plain(message, "messages")
    has_calls = bool(plain.get("tool_calls"))
    plain["content"] = _flatten(
        plain.get("content"), f"{place}.content", may_lack=has_calls or role == "assistant"
    )
    if has_calls:
        plain["tool_calls"] = _check_calls(plain["tool_calls"], f"{place}.tool_calls")
    else:
        plain.pop("tool_calls", None)
    return plain


def _flatten(content: Any, place: str, *, may_lack: bool) -> str:
    if isinstance(content, str):
        return content
    if content is None and may_lack:
        return ""
    if not isinstance(content, list):
        _refuse(f"{place} must be a text or a list of parts, not {type(content).__name__}")
    texts = []
    for i, part in enumerate(content):
        if isinstance(part, str):
            texts.append(part)
            continue
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind not in ("text", "input_text", "output_text"):
            _refuse(f"{place}[{i}] is of type {kind!r}: this model reads parts of type text only")
        if not isinstance(part.get("text"), str):
            _refuse(f"{place}[{i}].text must be a text")
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
                _refuse(f"{place}[{i}].function.arguments is not JSON: {error}")
    return calls


def _plain(value: Any, param: str) -> Any:
    """A copy of `value` made of JSON's types alone: templates must not reach methods."""
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item, param) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return [_plain(item, param) for item in value]
    raise InvalidRequest(
        f"{param} may hold JSON values only, not {type(value).__name__}", param=param
    )


def _refuse(problem: str) -> NoReturn:
    raise InvalidRequest(f"messages{'' if problem[0] == '[' else ' '}{problem}", param="messages")


# -- going on with the final message ----------------------------------------------------------


def _check_continue(messages: list[dict[str, Any]], add_generation_prompt: bool) -> None:
    if add_generation_prompt:
        raise InvalidRequest(
            "continue_final_message and add_generation_prompt exclude each other: the one goes on "
            "with the last message, the other begins a new one; set one of them to false",
            param="continue_final_message",
        )
    if not messages[-1]["content"]:
        raise InvalidRequest(
            "continue_final_message needs a last message with content to go on with",
            param="continue_final_message",
        )


def _cut_final(text: str) -> str:
    end = text.rfind(_CUT.rstrip())
    if end < 0:
        raise InvalidRequest(
            "continue_final_message is not possible: the chat template leaves out or changes the "
            "last message",
            param="continue_final_message",
        )
    return text[:end] if text.startswith(_CUT, end) else text[:end].rstrip()


# -- Jinja ------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def _compile(text: str) -> Template:
    """The compiled template; `InvalidRequest` with the line for one that is none."""
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
    """Whether a template knows tools: which there are, or how calls of them are written."""
    from jinja2 import TemplateSyntaxError, meta

    if "tool_calls" in text:
        return True
    try:
        return "tools" in meta.find_undeclared_variables(_environment().parse(text))
    except TemplateSyntaxError:
        return True  # rendering it says what is wrong


@lru_cache(maxsize=1)
def _environment() -> Any:
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}`: marks the assistant's words for training; here it is nothing."""

        tags = {"generation"}  # noqa: RUF012 - Jinja's own declaration

        def parse(self, parser: Any) -> nodes.Node | list[nodes.Node]:
            """What is inside the tag."""
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
        """JSON without HTML escapes, which Jinja's own filter makes."""
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
