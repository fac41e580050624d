"""Wrap tokenizers of the Hugging Face `tokenizers` library (written in Rust) as `Tokenizer`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tokenizers import Tokenizer as RustTokenizer
from tokenizers import processors

from portalm.text.base import SpecialTokens
from portalm.text.chat_template import ChatTemplates
from portalm.text.spelling import read_spelling
from portalm.text.tokenizer import Tokenizer


class _RustCodec:
    """The library's tokenizer as a `Codec`."""

    def __init__(self, rust: RustTokenizer) -> None:
        self._rust = rust

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        # the batch method releases the GIL, and the fast one skips offsets into the text
        [encoding] = self._rust.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return list(encoding.ids)

    def encode_pair(self, first: str, second: str) -> tuple[list[int], list[int]]:
        encoding = self._rust.encode(first, second)
        return list(encoding.ids), list(encoding.type_ids)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        return self._rust.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def id_to_token(self, token_id: int) -> str | None:
        return self._rust.id_to_token(token_id)

    def token_to_id(self, token: str) -> int | None:
        return self._rust.token_to_id(token)

    def vocab_size(self) -> int:
        return vocab_size(self._rust)


def vocab_size(rust: RustTokenizer) -> int:
    """Largest token id plus one."""
    added = rust.get_added_tokens_decoder()
    return max(rust.get_vocab_size(with_added_tokens=True), max(added, default=-1) + 1)


def wrap(
    rust: RustTokenizer, roles: Mapping[str, str | None], templates: ChatTemplates
) -> Tokenizer:
    """Wrap a tokenizer of the library as a `Tokenizer`.

    Args:
        rust: the complete tokenizer, with its special tokens.
        roles: tokens by role (bos_token, eos_token, ...); None where the model has none.
        templates: the model's chat templates.
    """
    added = rust.get_added_tokens_decoder()
    return Tokenizer(
        _RustCodec(rust),
        spelling=read_spelling(rust.decoder),
        special=SpecialTokens(
            roles={role: token for role, token in roles.items() if token is not None},
            ids=frozenset(token_id for token_id, token in added.items() if token.special),
        ),
        templates=templates,
    )


def set_bos_and_eos(tokenizer: RustTokenizer, *, bos: str | None, eos: str | None) -> None:
    """Add `bos` before and `eos` after every encoded text; None adds nothing."""
    if bos is None and eos is None:
        return
    pieces = [*([bos] if bos is not None else []), "$A", *([eos] if eos is not None else [])]
    marks = {mark: tokenizer.token_to_id(mark) for mark in (bos, eos) if mark is not None}
    tokenizer.post_processor = processors.TemplateProcessing(
        single=pieces, special_tokens=list(marks.items())
    )
