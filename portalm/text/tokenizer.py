"""Convert text to token ids and back, for all tokenizer formats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from portalm.errors import InvalidRequest
from portalm.text.base import Codec, SpecialTokens
from portalm.text.chat_template import ChatTemplate, ChatTemplates, Conversation
from portalm.text.detokenizer import Detokenizer, SpelledDetokenizer, WindowDetokenizer
from portalm.text.spelling import Spelling


class Tokenizer:
    """A model's tokenizer (created by `load_tokenizer`)."""

    def __init__(
        self,
        codec: Codec,
        *,
        spelling: Spelling | None,
        special: SpecialTokens,
        templates: ChatTemplates,
    ) -> None:
        """Wrap a tokenizer library.

        Args:
            codec: the library's tokenizer.
            spelling: mapping from tokens to bytes; None if only `codec.decode` gives text.
            special: the special tokens.
            templates: the model's chat templates.
        """
        self._codec = codec
        self.spelling = spelling
        self.special = special
        self._templates = templates
        self.special_ids = special.ids
        self.vocab_size = codec.vocab_size()
        self.bos_token_id = self._id_of("bos_token")
        self.eos_token_id = self._id_of("eos_token")
        self.pad_token_id = self._id_of("pad_token")
        self._bytes: dict[int, bytes] = {}
        self._texts: dict[int, str] = {}

    def _id_of(self, role: str) -> int | None:
        token = self.special.roles.get(role)
        return None if token is None else self._codec.token_to_id(token)

    # -- text and ids -------------------------------------------------------------------------

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Encode `text` as token ids; special tokens that occur in it become their ids.

        Args:
            text: the text to encode.
            add_special_tokens: add the special tokens that the model expects, such as BOS.

        Raises:
            InvalidRequest: `text` is not valid Unicode (it has a lone surrogate).
        """
        try:
            return self._codec.encode(text, add_special_tokens=add_special_tokens)
        except (UnicodeEncodeError, TypeError):  # raised for a lone surrogate
            _reject_surrogates(text)
            raise

    def encode_pair(self, first: str, second: str) -> tuple[list[int], int]:
        """Encode two texts as one input, in the model's format for pairs.

        Args:
            first: the first text, for example a query.
            second: the second text, for example a document.

        Returns:
            The ids, and the index of the first token of type 1 (the second text): `len(ids)` for
            a model that does not use token types.

        Raises:
            InvalidRequest: a text is not valid Unicode (it has a lone surrogate).
        """
        try:
            ids, types = self._codec.encode_pair(first, second)
        except (UnicodeEncodeError, TypeError):
            _reject_surrogates(first)
            _reject_surrogates(second)
            raise
        return ids, types.index(1) if 1 in types else len(ids)

    def truncate(self, ids: Sequence[int], max_tokens: int) -> list[int]:
        """Truncate `ids` to `max_tokens`, keeping the special tokens at the end."""
        if len(ids) <= max_tokens:
            return list(ids)
        num_end = 0
        while num_end < len(ids) and ids[-1 - num_end] in self.special_ids:
            num_end += 1
        num_end = min(num_end, max_tokens)
        return [*ids[: max_tokens - num_end], *ids[len(ids) - num_end :]]

    def decode(
        self,
        ids: Sequence[int],
        *,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
    ) -> str:
        """Text of `ids`; invalid UTF-8 becomes U+FFFD, unknown ids become empty.

        Args:
            ids: the token ids.
            skip_special_tokens: omit special tokens.
            spaces_between_special_tokens: False removes spaces between consecutive special tokens
                (byte-level tokenizers never add them).
        """
        if self.spelling is None:
            if skip_special_tokens or spaces_between_special_tokens:
                return self._codec.decode(ids, skip_special_tokens=skip_special_tokens)
            stream = self.detokenizer(
                skip_special_tokens=False, spaces_between_special_tokens=False
            )
            return "".join(map(stream.feed, ids)) + stream.flush()
        if skip_special_tokens:
            ids = [token_id for token_id in ids if token_id not in self.special_ids]
        pieces = [data for data in map(self.token_bytes, ids) if data]
        if pieces:
            pieces[0] = self.spelling.strip_start(pieces[0])
        return b"".join(pieces).decode("utf-8", "replace")

    def detokenizer(
        self,
        prompt_token_ids: Sequence[int] = (),
        *,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
    ) -> Detokenizer:
        """Create a detokenizer for an answer to a prompt.

        Args:
            prompt_token_ids: the prompt that the text continues; empty at the start of a text.
            skip_special_tokens: as in `decode`.
            spaces_between_special_tokens: as in `decode`.
        """
        if self.spelling is not None:
            return SpelledDetokenizer(
                self, self.spelling, prompt_token_ids, skip_special_tokens=skip_special_tokens
            )
        return WindowDetokenizer(
            self,
            prompt_token_ids,
            skip_special_tokens=skip_special_tokens,
            spaces_between_special_tokens=spaces_between_special_tokens,
        )

    # -- single tokens ------------------------------------------------------------------------

    def id_to_token(self, token_id: int) -> str | None:
        """The token's string in the vocabulary ("Ġthe"); None for an unknown id."""
        return self._codec.id_to_token(token_id) if token_id >= 0 else None

    def token_to_id(self, token: str) -> int | None:
        """The id of a token's string in the vocabulary; None if there is none."""
        return self._codec.token_to_id(token)

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes that the token adds to a text; b"" for an unknown id."""
        data = self._bytes.get(token_id)
        if data is None:
            data = self._bytes[token_id] = self._spell(token_id)
        return data

    def _spell(self, token_id: int) -> bytes:
        token = self.id_to_token(token_id)
        if token is None:
            return b""
        if self.spelling is None:
            return self._codec.decode([token_id], skip_special_tokens=False).encode()
        return self.spelling.token_bytes(token)

    def vocabulary(self) -> list[bytes] | None:
        """Bytes that each token adds to a text, by id; b"" for special tokens.

        None if the bytes of tokens are not known (`spelling` is None).
        """
        if self.spelling is None:
            return None
        return [
            b"" if token_id in self.special_ids else self.token_bytes(token_id)
            for token_id in range(self.vocab_size)
        ]

    def id_to_text(self, token_id: int) -> str:
        """Text of the token on its own, for logprobs; U+FFFD for a part of a character."""
        text = self._texts.get(token_id)
        if text is None:
            text = self._texts[token_id] = self.token_bytes(token_id).decode("utf-8", "replace")
        return text

    # -- conversations ------------------------------------------------------------------------

    @property
    def chat_template(self) -> str | None:
        """The model's Jinja template for conversations; None if it has none."""
        return self._templates.default

    def choose_template(
        self, template: str | None = None, *, has_tools: bool = False
    ) -> ChatTemplate:
        """Choose the template for a conversation.

        Args:
            template: Jinja source, or the name of a template of the model; None for its default.
            has_tools: the conversation has tools, so prefer the template named tool_use.

        Raises:
            InvalidRequest: the model has no chat template.
        """
        text = self._templates.choose(template, has_tools=has_tools)
        return ChatTemplate(text, self.special.roles)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template: str | None = None,
        **kwargs: Any,
    ) -> str:
        """Render a conversation as a prompt, in the format that the model was trained on.

        Args:
            messages: messages {"role": ..., "content": ...}; content is a string or a list of
                text parts.
            add_generation_prompt: end the prompt where the assistant's answer begins.
            continue_final_message: end the prompt inside the last message, for the model to
                continue it.
            tools: functions that the model may call, as in OpenAI's API.
            template: Jinja source, or the name of a template of the model; None for its default.
            **kwargs: additional variables for the template.

        Raises:
            InvalidRequest: the messages are malformed, or the template rejects them.
        """
        conversation = Conversation(
            messages=messages,
            tools=tools or (),
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            variables=kwargs,
        )
        return self.choose_template(template, has_tools=bool(tools)).render(conversation)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template: str | None = None,
        **kwargs: Any,
    ) -> list[int]:
        """Encode a conversation as token ids; arguments and errors as in `render_chat`."""
        text = self.render_chat(
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            template=template,
            **kwargs,
        )
        return self.encode(text, add_special_tokens=False)  # the template adds BOS


def _reject_surrogates(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"the text is not valid Unicode: character {error.start} is a lone surrogate "
            f"({text[error.start]!a}); send the whole surrogate pair",
            param="prompt",
        ) from None
