"""What bytes each token stands for, read off a tokenizer's decoder.

Text is then the UTF-8 decoding of concatenated bytes: token by token or all at once, the same.
Broken UTF-8 shows as U+FFFD, one for each maximal broken part (what Python and Rust do). The
`tokenizers` library agrees for byte-level tokenizers; for SentencePiece byte tokens it replaces
every byte of a run that is broken anywhere, which cannot be streamed, so only that differs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

SpellToken = Callable[[str], bytes]
"""The bytes of a token, from its string in the vocabulary."""


@dataclass(frozen=True, slots=True)
class Spelling:
    """How a vocabulary's tokens are written as bytes."""

    token_bytes: SpellToken
    num_stripped_spaces: int = 0
    """Leading spaces that a text loses: SentencePiece writes one before the first word."""

    def strip_start(self, data: bytes) -> bytes:
        """`data`, the beginning of a text, without the spaces that are not part of it."""
        end = 0
        while end < self.num_stripped_spaces and data[end : end + 1] == b" ":
            end += 1
        return data[end:]


def read_spelling(decoder: Any) -> Spelling | None:
    """The spelling that a `tokenizers` decoder amounts to; None if it is none of those known."""
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
    """Replace*, ByteFallback?, Fuse?, Strip?: Llama 2, Mistral, Gemma, Phi 3."""
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
    """The character that GPT-2's byte-level vocabularies write for each byte, as char -> byte."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in shown}
    hidden = (byte for byte in range(256) if byte not in shown)
    alphabet.update({chr(0x100 + i): byte for i, byte in enumerate(hidden)})
    return alphabet


def _byte_level(token: str) -> bytes:
    alphabet = byte_level_alphabet()
    try:
        return bytes([alphabet[char] for char in token])
    except KeyError:  # an added token: plain text
        return token.encode()


class _Replacing:
    """Text with a mark for the space; `<0xE2>` is one byte, if there are byte tokens."""

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
