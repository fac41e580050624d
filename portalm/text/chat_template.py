"""Chat templates: Jinja from the checkpoint, rendered in a sandbox."""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from portalm.errors import InvalidRequest

Message = Mapping[str, Any]


class _Generation(jinja2.ext.Extension):
    """{% generation %} marks the assistant's words for training; here its body is just text."""

    tags = frozenset({"generation"})

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """The nodes between the tags."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def render(
    template: str,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    **variables: Any,
) -> str:
    """The conversation as the model was taught to read it.

    Args:
        template: Jinja text.
        messages: objects with a role and content; text parts are joined.
        add_generation_prompt: end where the assistant begins to speak.
        continue_final_message: end within the last message, which the answer goes on with.
        **variables: special tokens, tools, documents and what else the template reads.

    Raises:
        InvalidRequest: the messages do not fit the template, or it is broken.
    """
    if add_generation_prompt and continue_final_message:
        raise InvalidRequest(
            "add_generation_prompt and continue_final_message exclude each other: set "
            "add_generation_prompt to false to go on with the last message",
            param="continue_final_message",
        )
    plain = [_plain(i, message) for i, message in enumerate(messages)]
    if not plain:
        raise InvalidRequest("messages must not be empty", param="messages")
    try:
        text = _compile(template).render(
            messages=plain, add_generation_prompt=add_generation_prompt, **variables
        )
    except jinja2.TemplateError as error:
        raise InvalidRequest(
            f"the chat template refused these messages: {error}", param="messages"
        ) from error
    except (TypeError, ValueError, KeyError, AttributeError, ZeroDivisionError) as error:
        raise InvalidRequest(
            f"the chat template failed on these messages: {type(error).__name__}: {error}",
            param="messages",
        ) from error
    return _cut_after_final(text, plain[-1]) if continue_final_message else text


def _plain(index: int, message: Message) -> dict[str, Any]:
    """The message with its content as one text."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise InvalidRequest(
            f"messages[{index}] must be an object with a role and content", param="messages"
        )
    content = message.get("content")
    if isinstance(content, Sequence) and not isinstance(content, str):
        texts = []
        for part in content:
            kind = part.get("type") if isinstance(part, Mapping) else None
            if kind != "text" or not isinstance(part.get("text"), str):
                raise InvalidRequest(
                    f"messages[{index}] has a content part of type {kind!r}: this model reads "
                    f"text only",
                    param="messages",
                )
            texts.append(part["text"])
        content = "\n".join(texts)
    elif content is not None and not isinstance(content, str):
        raise InvalidRequest(
            f"messages[{index}].content must be a text or a list of parts", param="messages"
        )
    return {**message, "content": content if content is not None else ""}


def _cut_after_final(text: str, final: Mapping[str, Any]) -> str:
    """`text` up to the end of the last message's content."""
    content = final["content"].strip()
    at = text.rfind(content)
    if not content or at < 0:
        raise InvalidRequest(
            "continue_final_message: the chat template does not show the last message as it is",
            param="continue_final_message",
        )
    return text[: at + len(content)]


@functools.lru_cache(maxsize=32)
def _compile(template: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(template)


def _to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    """JSON as it is: Jinja's own filter would escape it for HTML."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)
