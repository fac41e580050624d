"""Text from token ids as they come, never with half a character."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

_REPLACEMENT = "\ufffd"

_NUM_CONTEXT = 6
"""Prompt tokens before the answer: whether a word begins with a space shows in what is before."""

_MAX_HELD = 16
"""No character has more tokens than this: what is held back longer is no beginning of one."""


class Decoder(Protocol):
    """What a detokeniser needs of a tokenizer."""

    def decode(
        self,
        token_ids: Sequence[int],
        *,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
    ) -> str:
        """The text of `token_ids`."""
        ...


class Detokenizer:
    """One answer's text. A token costs two decodings of a few tokens, however long the answer."""

    def __init__(
        self,
        decoder: Decoder,
        prompt_token_ids: Sequence[int] = (),
        *,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
    ) -> None:
        """For the answer to a prompt."""
        self._decoder = decoder
        self._ids = list(prompt_token_ids[-_NUM_CONTEXT:])
        self._read = len(self._ids)
        """Tokens before this have been given out."""
        self._skip_special = skip_special_tokens
        self._spaces = spaces_between_special_tokens

    def feed(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens add; what may be half a character is held back."""
        text = ""
        for token_id in token_ids:
            self._ids.append(token_id)
            text += self._new_text(is_last=False)
        return text

    def flush(self) -> str:
        """What was held back, now that no more tokens will come."""
        return self._new_text(is_last=True)

    def _new_text(self, *, is_last: bool) -> str:
        if self._read == len(self._ids):
            return ""
        before = self._decode(self._ids[: self._read])
        after = self._decode(self._ids)
        num_held = len(self._ids) - self._read
        if after.endswith(_REPLACEMENT) and not is_last and num_held < _MAX_HELD:
            return ""
        if len(after) > len(before):
            del self._ids[: self._read]  # what was just given out is the context of what follows
        else:
            del self._ids[self._read :]  # tokens without a text are no context
        self._read = len(self._ids)
        return after[len(before) :]

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._decoder.decode(
            token_ids,
            skip_special_tokens=self._skip_special,
            spaces_between_special_tokens=self._spaces,
        )
