"""Incremental detokenising: feed token ids, get the text they complete."""

from __future__ import annotations

from codecs import utf_8_decode
from collections.abc import Sequence
from typing import Protocol

from portalm.text.base import TokenDecoder
from portalm.text.spelling import Spelling

_NUM_PRIMING_TOKENS = 8
"""Prompt tokens that the first token's text may depend on (a character has at most 4 bytes)."""

_MAX_HELD_TOKENS = 16
"""More tokens than this never make one character: what they decode to is broken for good."""


class Detokenizer(Protocol):
    """The text of one answer, as it grows (`Tokenizer.detokenizer` makes one).

    The pieces that `feed` and `flush` return, put together, are what `Tokenizer.decode` makes of
    prompt and answer together, less what it makes of the prompt. No piece ends inside a UTF-8
    character.
    """

    def feed(self, token_id: int) -> str:
        """The text that `token_id` completes; empty while a character is not whole."""

    def flush(self) -> str:
        """The text that is left at the end: U+FFFD for a character that never became whole."""


class SpelledDetokenizer:
    """For tokenizers whose tokens are bytes: one UTF-8 stream."""

    __slots__ = ("_at_start", "_pending", "_skipped", "_spelling", "_token_bytes")

    def __init__(
        self,
        tokenizer: TokenDecoder,
        spelling: Spelling,
        prompt_token_ids: Sequence[int] = (),
        *,
        skip_special_tokens: bool = True,
    ) -> None:
        """At the end of a prompt, whose own text is not given out."""
        self._token_bytes = tokenizer.token_bytes
        self._spelling = spelling
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._pending = b""
        self._at_start = all(
            token_id in self._skipped or not self._token_bytes(token_id)
            for token_id in prompt_token_ids
        )
        for token_id in prompt_token_ids[-_NUM_PRIMING_TOKENS:]:
            self.feed(token_id)

    def feed(self, token_id: int) -> str:
        """The text that `token_id` completes; empty while a character is not whole."""
        if token_id in self._skipped:
            return ""
        data = self._token_bytes(token_id)
        if self._at_start and data:
            data = self._spelling.strip_start(data)
            self._at_start = False
        if self._pending:
            data = self._pending + data
        text, used = utf_8_decode(data, "replace", False)
        self._pending = data[used:]
        return text

    def flush(self) -> str:
        """The text that is left at the end: U+FFFD for a character that never became whole."""
        text, _ = utf_8_decode(self._pending, "replace", True)
        self._pending = b""
        return text


class WindowDetokenizer:
    """For any other tokenizer: decodes a window of the last tokens and gives out what is new.

    The window begins at a token whose text is out already, so that what decoding does to the
    beginning of a text (a space dropped, say) cancels out.
    """

    __slots__ = ("_fresh", "_ids", "_shown", "_shown_special", "_skips", "_spaces", "_tokenizer")

    def __init__(
        self,
        tokenizer: TokenDecoder,
        prompt_token_ids: Sequence[int] = (),
        *,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
    ) -> None:
        """At the end of a prompt, whose own text is not given out."""
        self._tokenizer = tokenizer
        self._skips = skip_special_tokens
        self._spaces = spaces_between_special_tokens or skip_special_tokens
        self._ids = list(prompt_token_ids[-_NUM_PRIMING_TOKENS:])
        self._fresh = len(self._ids)  # tokens of the window before this are out
        self._shown = self._decode(self._ids)
        self._shown_special = bool(self._ids) and self._ids[-1] in tokenizer.special_ids

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skips)

    def feed(self, token_id: int) -> str:
        """The text that `token_id` completes; empty while a character is not whole."""
        is_special = token_id in self._tokenizer.special_ids
        if is_special and self._skips:
            return ""
        self._ids.append(token_id)
        text = self._decode(self._ids)
        is_cut = text.endswith("\ufffd") and len(self._ids) - self._fresh < _MAX_HELD_TOKENS
        if is_cut or len(text) <= len(self._shown):
            return ""
        new = self._advance(text)
        if is_special and self._shown_special and not self._spaces:
            new = new.lstrip(" ")
        self._shown_special = is_special
        return new

    def _advance(self, text: str) -> str:
        new = text[len(self._shown) :]
        del self._ids[: self._fresh]
        self._fresh = len(self._ids)
        self._shown = self._decode(self._ids)
        return new

    def flush(self) -> str:
        """The text that is left at the end: U+FFFD for a character that never became whole."""
        return self._advance(self._decode(self._ids))
