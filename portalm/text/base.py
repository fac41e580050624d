"""Types that tokenizers, their loaders and detokenizers share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol


class Codec(Protocol):
    """The interface of a tokenizer library, which `Tokenizer` wraps."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of `text`."""

    def encode_pair(self, first: str, second: str) -> tuple[list[int], list[int]]:
        """Token ids of both texts as one input, and their token type ids (1: second text)."""

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Text of `ids`."""

    def id_to_token(self, token_id: int) -> str | None:
        """The token's string in the vocabulary; None for an unknown id."""

    def token_to_id(self, token: str) -> int | None:
        """The id of a token's string in the vocabulary; None if there is none."""

    def vocab_size(self) -> int:
        """Largest token id plus one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpecialTokens:
    """Tokens that are not text, such as BOS and EOS."""

    roles: Mapping[str, str] = field(default_factory=dict)
    """Their strings in the vocabulary by role: bos_token, eos_token, pad_token, unk_token, ..."""
    ids: frozenset[int] = frozenset()
    """Ids of all special tokens, with and without a role."""


class TokenDecoder(Protocol):
    """The part of `Tokenizer` that detokenizers use."""

    special_ids: frozenset[int]
    """Ids of the special tokens."""

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes that the token adds to a text; b"" for an unknown id."""

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `ids`; invalid UTF-8 becomes U+FFFD."""
