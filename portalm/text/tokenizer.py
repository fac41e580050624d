"""Between text and token ids, whatever the checkpoint keeps its tokenizer in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from portalm.errors import CheckpointError, InvalidRequest
from portalm.text.chat_template import Message, render


class Encoder(Protocol):
    """The part of the `tokenizers` library's Tokenizer that is used here."""

    def encode(self, sequence: str, *, add_special_tokens: bool = True) -> Any:
        """An object with `ids`."""
        ...

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text."""
        ...

    def id_to_token(self, id: int) -> str | None:
        """The token as the vocabulary spells it."""
        ...

    def token_to_id(self, token: str) -> int | None:
        """Its id."""
        ...

    def get_vocab_size(self, with_added_tokens: bool = True) -> int:
        """Number of tokens."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokenizer:
    """A tokenizer, its special tokens and its chat template."""

    encoder: Encoder
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    special_ids: frozenset[int] = frozenset()
    chat_template: str | None = None
    template_variables: Mapping[str, Any] = field(default_factory=dict)
    """What templates may read: bos_token, eos_token and so on."""

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return self.encoder.get_vocab_size()

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`."""
        ids: list[int] = self.encoder.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(
        self,
        token_ids: Sequence[int],
        *,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
    ) -> str:
        """Text of `token_ids`."""
        if skip_special_tokens or not spaces_between_special_tokens:
            return self.encoder.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return self._decode_spaced(token_ids)

    def _decode_spaced(self, token_ids: Sequence[int]) -> str:
        """Special tokens shown with a space between neighbours, as transformers does it."""
        pieces: list[str] = []
        plain: list[int] = []
        for token_id in [*token_ids, None]:
            if token_id is not None and token_id not in self.special_ids:
                plain.append(token_id)
                continue
            if plain:
                pieces.append(self.encoder.decode(plain, skip_special_tokens=False))
                plain = []
            if token_id is not None:
                pieces.append(self.encoder.id_to_token(token_id) or "")
        return " ".join(pieces)

    def text_of(self, token_id: int) -> str:
        """One token as text, special or not (for logprobs)."""
        return self.encoder.decode([token_id], skip_special_tokens=False)

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template: str | None = None,
        **variables: Any,
    ) -> list[int]:
        """Token ids of a conversation.

        Raises:
            InvalidRequest: the model has no chat template, or the messages do not fit it.
        """
        text = self.render_chat(
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            template=template,
            **variables,
        )
        return self.encode(text, add_special_tokens=False)

    def render_chat(
        self, messages: Sequence[Message], *, template: str | None = None, **options: Any
    ) -> str:
        """The text that `apply_chat_template` tokenises; the template brings special tokens."""
        template = template or self.chat_template
        if template is None:
            raise InvalidRequest(
                "the model has no chat template: use completions, or give one with --chat-template",
                param="messages",
            )
        return render(template, messages, **{**self.template_variables, **options})


def load_tokenizer(
    path: Path, *, chat_template: str | None = None, trust_remote_code: bool = False
) -> Tokenizer:
    """The tokenizer of the checkpoint at `path`, a folder or a .gguf file.

    Args:
        path: as `resolve_model` gave it.
        chat_template: Jinja text or the path of a file, instead of the checkpoint's.
        trust_remote_code: let a tokenizer run Python code from its repository.

    Raises:
        CheckpointError: there is no tokenizer, or it is broken.
    """
    template = _read_template(chat_template)
    if path.suffix == ".gguf":
        from portalm.text.gguf_tokenizer import load_gguf_tokenizer

        return load_gguf_tokenizer(path, template)
    if (path / "tokenizer.json").exists():
        from portalm.text.hf_tokenizer import load_fast_tokenizer

        return load_fast_tokenizer(path, template)
    from portalm.text.hf_tokenizer import load_slow_tokenizer

    return load_slow_tokenizer(path, template, trust_remote_code=trust_remote_code)


def _read_template(chat_template: str | None) -> str | None:
    """The template itself; a value without Jinja's braces is a path."""
    if chat_template is None or "{" in chat_template:
        return chat_template
    path = Path(chat_template).expanduser()
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise CheckpointError(path, f"no chat template there ({error.strerror})") from error
