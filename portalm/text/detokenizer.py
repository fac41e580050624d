"""Incremental detokenization: feed token ids, get the text that they complete."""

from __future__ import annotations

from codecs import utf_8_decode
from collections.abc import Sequence
from typing import Protocol

from portalm.text.base import TokenDecoder
from portalm.text.spelling import Spelling

_NUM_PRIMING_TOKENS = 8
"""Prompt tokens that the first token's text may depend on (a character has at most 4 bytes)."""

_MAX_HELD_TOKENS = 16
"""Tokens held back for an incomplete character; after this many, U+FFFD is emitted instead."""


class Detokenizer(Protocol):
    """Incremental text of one answer (created by `Tokenizer.detokenizer`).

    The concatenated results of `feed` and `flush` equal `Tokenizer.decode(prompt + answer)` with
    the prompt's own text removed from the front. No result ends inside a UTF-8 character.
    """

    def feed(self, token_id: int) -> str:
        """Add a token and return the text that it completes ("" inside a character)."""

    def flush(self) -> str:
        """Return the rest of the text at the end: U+FFFD for an incomplete character."""


class SpelledDetokenizer:
    """Detokenizer for tokens with known bytes: one UTF-8 stream."""

    __slots__ = ("_at_start", "_pending", "_skipped", "_spelling", "_token_bytes")

    def __init__(
        self,
        tokenizer: TokenDecoder,
        spelling: Spelling,
        prompt_token_ids: Sequence[int] = (),
        *,
        skip_special_tokens: bool = True,
    ) -> None:
        """Start after a prompt, whose own text is not returned."""
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
        """Add a token and return the text that it completes ("" inside a character)."""
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
        """Return the rest of the text at the end: U+FFFD for an incomplete character."""
        text, _ = utf_8_decode(self._pending, "replace", True)
        self._pending = b""
        return text


class WindowDetokenizer:
    """Detokenizer for any other tokenizer: decodes a window of the last tokens, returns new text.

    The window starts with tokens whose text was already returned, so that what decoding does at
    the start of a text (dropping a space, for example) cancels out.
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
        """Start after a prompt, whose own text is not returned."""
        self._tokenizer = tokenizer
        self._skips = skip_special_tokens
        self._spaces = spaces_between_special_tokens or skip_special_tokens
        self._ids = list(prompt_token_ids[-_NUM_PRIMING_TOKENS:])
        self._fresh = len(self._ids)  # the text of the window's tokens before this was returned
        self._shown = self._decode(self._ids)
        self._shown_special = bool(self._ids) and self._ids[-1] in tokenizer.special_ids

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skips)

    def feed(self, token_id: int) -> str:
        """Add a token and return the text that it completes ("" inside a character)."""
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
        """Return the rest of the text at the end: U+FFFD for an incomplete character."""
        return self._advance(self._decode(self._ids))
