"""The forms that a prompt may have in the Python API; they are vLLM's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypedDict

from portalm.errors import InvalidRequest


class TextPrompt(TypedDict, total=False):
    """A text to tokenize."""

    prompt: str
    cache_salt: str
    """Cached blocks are shared only between prompts with the same salt."""


class TokensPrompt(TypedDict, total=False):
    """Token ids."""

    prompt_token_ids: Sequence[int]
    prompt: str
    """The text of the ids, if known; it is reported, but not tokenized."""
    cache_salt: str
    """Cached blocks are shared only between prompts with the same salt."""


Prompt: TypeAlias = "str | Sequence[int] | TextPrompt | TokensPrompt"
"""A text, token ids, or either of them in a dictionary."""

_KEYS = ("prompt", "prompt_token_ids", "cache_salt")


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptParts:
    """A prompt in one form."""

    content: str | Sequence[int]
    """What to compute: a text or token ids."""
    text: str | None = None
    """Text of the prompt, where `content` is token ids that came with it."""
    cache_salt: str = ""


def as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """Return one prompt or several as a list.

    Raises:
        InvalidRequest: it is neither.
    """
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if isinstance(prompts, bytes | bytearray):
        raise _not_a_prompt(prompts)
    try:
        many: list[Any] = list(prompts)
    except TypeError:
        raise _not_a_prompt(prompts) from None
    if many and all(isinstance(x, int) for x in many):
        return [many]
    return many


def as_prompt(prompt: Prompt) -> PromptParts:
    """Return the parts of a prompt.

    Raises:
        InvalidRequest: a dictionary has other keys than those of `TextPrompt` and `TokensPrompt`.
    """
    if not isinstance(prompt, Mapping):
        return PromptParts(content=prompt)
    # vLLM's optional keys may be present without a value
    given: dict[str, Any] = {k: v for k, v in prompt.items() if v is not None}
    for key in given:
        if key not in _KEYS:
            raise InvalidRequest(
                f"a prompt has the key {key!r}, which is not supported; supported keys: "
                f"{', '.join(_KEYS)}",
                param="prompt",
            )
    text, token_ids, salt = (given.get(key) for key in _KEYS)
    for key, value in (("prompt", text), ("cache_salt", salt)):
        if value is not None and not isinstance(value, str):
            raise InvalidRequest(
                f"the prompt's {key!r} must be a string, not {type(value).__name__}",
                param="prompt",
            )
    if token_ids is None and text is None:
        raise InvalidRequest(
            'a prompt in a dictionary needs the key "prompt" or "prompt_token_ids"', param="prompt"
        )
    if token_ids is None:
        return PromptParts(content=text or "", cache_salt=salt or "")
    if isinstance(token_ids, str):
        raise InvalidRequest(
            'the prompt\'s "prompt_token_ids" is a string: pass a text as "prompt"', param="prompt"
        )
    return PromptParts(content=token_ids, text=text, cache_salt=salt or "")


def _not_a_prompt(value: object) -> InvalidRequest:
    return InvalidRequest(
        f"a prompt must be a string, a list of token ids or a dictionary with one of them, not "
        f"{type(value).__name__}",
        param="prompt",
    )
