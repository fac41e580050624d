"""The bytes of each token, derived from a tokenizer's decoder.

Text is the UTF-8 decoding of the concatenated bytes, so decoding token by token and all at once
give the same result. Each maximal invalid part becomes one U+FFFD, as in Python and Rust. The
`tokenizers` library does the same for byte-level tokenizers. For SentencePiece byte tokens it
replaces every byte of a run that has an invalid byte anywhere, which cannot be streamed; this is
the only difference.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

SpellToken = Callable[[str], bytes]
"""Convert a token's string in the vocabulary to its bytes."""


@dataclass(frozen=True, slots=True)
class Spelling:
    """Mapping from a vocabulary's token strings to bytes."""

    token_bytes: SpellToken
    num_stripped_spaces: int = 0
    """Leading spaces to remove from a text: SentencePiece adds one before the first word."""

    def strip_start(self, data: bytes) -> bytes:
        """Remove the spaces that the tokenizer added from `data`, the beginning of a text."""
        end = 0
        while end < self.num_stripped_spaces and data[end : end + 1] == b" ":
            end += 1
        return data[end:]


def read_spelling(decoder: Any) -> Spelling | None:
    """Return the spelling equivalent to a `tokenizers` decoder; None if there is none."""
    if decoder is None:
        return None
    steps = _flatten(json.loads(decoder.__getstate__()))
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return Spelling(_byte_level)
    if kinds == ["Metaspace"]:
        mark = steps[0].get("replacement", "▁")
        strips = steps[0].get("prepend_scheme", "always") != "never"
        return Spelling(_Replacing(((mark, " "),), has_bytes=False), int(strips))
    return _read_sentencepiece(steps, kinds)


def _read_sentencepiece(steps: list[dict[str, Any]], kinds: list[str]) -> Spelling | None:
    """Spelling of Replace*, ByteFallback?, Fuse?, Strip? (Llama 2, Mistral, Gemma, Phi 3)."""
    order = ["Replace", "ByteFallback", "Fuse", "Strip"]
    if any(kind not in order for kind in kinds) or kinds != sorted(kinds, key=order.index):
        return None
    replacements = [_read_replacement(step) for step in steps if step["type"] == "Replace"]
    if not replacements or None in replacements:
        return None
    strips = [step for step in steps if step["type"] == "Strip"]
    num_stripped = 0
    if strips:
        strip = strips[0]
        if "Fuse" not in kinds or len(strips) > 1 or strip["content"] != " " or strip["stop"]:
            return None
        num_stripped = strip["start"]
    spell = _Replacing(
        tuple(pair for pair in replacements if pair is not None), has_bytes="ByteFallback" in kinds
    )
    return Spelling(spell, num_stripped)


def _flatten(step: dict[str, Any]) -> list[dict[str, Any]]:
    if step["type"] != "Sequence":
        return [step]
    return [inner for part in step["decoders"] for inner in _flatten(part)]


def _read_replacement(step: dict[str, Any]) -> tuple[str, str] | None:
    old = step["pattern"].get("String")
    return None if old is None else (old, step["content"])


# -- the two families -------------------------------------------------------------------------


@lru_cache(maxsize=1)
def byte_level_alphabet() -> dict[str, int]:
    """Map each character of GPT-2's byte-level vocabularies to the byte that it stands for."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in shown}
    hidden = (byte for byte in range(256) if byte not in shown)
    alphabet.update({chr(0x100 + i): byte for i, byte in enumerate(hidden)})
    return alphabet


def _byte_level(token: str) -> bytes:
    alphabet = byte_level_alphabet()
    try:
        return bytes([alphabet[char] for char in token])
    except KeyError:  # an added token, which is stored as plain text
        return token.encode()


class _Replacing:
    """Spelling by string replacement ("▁" to a space); with `has_bytes`, `<0xE2>` is one byte."""

    def __init__(self, replacements: Iterable[tuple[str, str]], *, has_bytes: bool) -> None:
        self._replacements = tuple(replacements)
        self._has_bytes = has_bytes

    def __call__(self, token: str) -> bytes:
        for old, new in self._replacements:
            token = token.replace(old, new)
        if self._has_bytes and len(token) == 6 and token.startswith("<0x") and token[5] == ">":
            try:
                return bytes([int(token[3:5], 16)])
            except ValueError:
                pass
        return token.encode()
