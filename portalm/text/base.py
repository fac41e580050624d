"""Types that tokenizers, their loaders and detokenizers share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol


class Codec(Protocol):
    """What a tokenizer library does for `Tokenizer`."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """The ids of `text`."""

    def encode_pair(self, first: str, second: str) -> tuple[list[int], list[int]]:
        """The ids of both texts as one input, and each one's type: 1 for the second text's."""

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """The text of `ids`."""

    def id_to_token(self, token_id: int) -> str | None:
        """A token as the vocabulary writes it; None if there is none of that id."""

    def token_to_id(self, token: str) -> int | None:
        """The id of a token as the vocabulary writes it; None if there is none."""

    def vocab_size(self) -> int:
        """One more than the largest id."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpecialTokens:
    """The tokens that are no text."""

    roles: Mapping[str, str] = field(default_factory=dict)
    """As the vocabulary writes them, by role: bos_token, eos_token, pad_token, unk_token..."""
    ids: frozenset[int] = frozenset()
    """All of them, with or without a role."""


class TokenDecoder(Protocol):
    """The part of `Tokenizer` that detokenizers use."""

    special_ids: frozenset[int]
    """Ids of the special tokens."""

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes that the token adds to a text; empty for an unknown id."""

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `ids`; invalid UTF-8 becomes U+FFFD."""
