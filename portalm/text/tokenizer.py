"""Text to token ids and back, whatever the tokenizer's file format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from portalm.errors import InvalidRequest
from portalm.text.base import Codec, SpecialTokens
from portalm.text.chat_template import ChatTemplate, ChatTemplates, Conversation
from portalm.text.detokenizer import Detokenizer, SpelledDetokenizer, WindowDetokenizer
from portalm.text.spelling import Spelling


class Tokenizer:
    """A model's tokenizer (`load_tokenizer` makes one)."""

    def __init__(
        self,
        codec: Codec,
        *,
        spelling: Spelling | None,
        special: SpecialTokens,
        templates: ChatTemplates,
    ) -> None:
        """A tokenizer over a library's.

        Args:
            codec: does the work.
            spelling: what bytes its tokens are; None: only `codec.decode` knows.
            special: the tokens with a role.
            templates: how the model writes a conversation.
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
        """The token ids of `text`; special tokens written in it are those tokens.

        Args:
            text: any text.
            add_special_tokens: put what the model wants around a text (BOS, say).

        Raises:
            InvalidRequest: `text` is no valid Unicode (half of a surrogate pair).
        """
        try:
            return self._codec.encode(text, add_special_tokens=add_special_tokens)
        except (UnicodeEncodeError, TypeError):  # what the libraries say of a lone surrogate
            _refuse_surrogates(text)
            raise

    def encode_pair(self, first: str, second: str) -> tuple[list[int], int]:
        """The ids of two texts as the model wants to see them together.

        Args:
            first: any text, a query say.
            second: any text, a document say.

        Returns:
            The ids, and where tokens of type 1 (the second text's) begin: behind the end for a
            model that does not tell the two apart.

        Raises:
            InvalidRequest: a text is no valid Unicode (half of a surrogate pair).
        """
        try:
            ids, types = self._codec.encode_pair(first, second)
        except (UnicodeEncodeError, TypeError):
            _refuse_surrogates(first)
            _refuse_surrogates(second)
            raise
        return ids, types.index(1) if 1 in types else len(ids)

    def truncate(self, ids: Sequence[int], max_tokens: int) -> list[int]:
        """The first of `ids`, at most `max_tokens` with the special tokens that end them."""
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
        """The text of `ids`; broken UTF-8 shows as U+FFFD, unknown ids as nothing."""
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
        """A stream of text that goes on from a prompt.

        Args:
            prompt_token_ids: what the answer goes on from; empty: it begins a text.
            skip_special_tokens: special tokens have no text.
            spaces_between_special_tokens: False: no space between special tokens that follow
                each other (byte-level tokenizers never put one there).
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
        """The token as the vocabulary writes it ("Ġthe"); None if there is none of that id."""
        return self._codec.id_to_token(token_id) if token_id >= 0 else None

    def token_to_id(self, token: str) -> int | None:
        """The id of a token as the vocabulary writes it; None if there is none."""
        return self._codec.token_to_id(token)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that the token adds to a text; none for an unknown id."""
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
        """By id: the bytes that each token adds to a text, none for special tokens.

        None if tokens are not known as bytes (`spelling`).
        """
        if self.spelling is None:
            return None
        return [
            b"" if token_id in self.special_ids else self.token_bytes(token_id)
            for token_id in range(self.vocab_size)
        ]

    def id_to_text(self, token_id: int) -> str:
        """The token's own text, for logprobs; U+FFFD for parts of a character."""
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
        """The template to render a conversation with.

        Args:
            template: Jinja text, or the name of one of the model's templates; None: its default.
            has_tools: the conversation has tools: prefer the model's template for those.

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
        """A conversation as the text that the model was trained on.

        Args:
            messages: {"role": ..., "content": ...} each; content is a text or a list of parts of
                type text.
            add_generation_prompt: end where the assistant begins to speak.
            continue_final_message: end inside the last message, for the model to go on with it.
            tools: functions that the model may call, as in OpenAI's API.
            template: Jinja text, or the name of one of the model's templates, to use instead of
                its default one.
            **kwargs: more variables for the template.

        Raises:
            InvalidRequest: the messages are malformed, or the template refuses them.
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
        """The token ids of a conversation; arguments and errors as in `render_chat`."""
        text = self.render_chat(
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            template=template,
            **kwargs,
        )
        return self.encode(text, add_special_tokens=False)  # the template writes BOS itself


def _refuse_surrogates(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"the text is not valid Unicode: character {error.start} is half of a surrogate pair "
            f"({text[error.start]!a}); send the whole pair",
            param="prompt",
        ) from None
