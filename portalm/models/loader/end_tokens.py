"""Tokens that end an answer, where the model's config does not list them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from portalm.models.loader.json_file import read_json_object


def tokenizer_eos_ids(folder: Path) -> tuple[int, ...]:
    """Ids of tokenizer_config.json's eos_token; empty if it has none, or its id is unknown.

    Chat models may end a turn with a token that config.json, made for the base model, does not
    list: vLLM and SGLang end an answer at the tokenizer's, too.
    """
    config = _read(folder / "tokenizer_config.json")
    eos = _text(config.get("eos_token")) or _text(
        _read(folder / "special_tokens_map.json").get("eos_token")
    )
    if eos is None:
        return ()
    for token_id, text in _added_tokens(folder, config):
        if text == eos:
            return (token_id,)
    return ()


def _added_tokens(folder: Path, config: dict[str, Any]) -> Iterator[tuple[int, str | None]]:
    """(id, text) of the tokens that are listed apart from the vocabulary; all special ones are."""
    decoder = config.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        for token_id, token in decoder.items():
            yield int(token_id), _text(token)
    for token in _read(folder / "tokenizer.json").get("added_tokens") or ():
        yield int(token["id"]), _text(token)
    for text, token_id in _read(folder / "added_tokens.json").items():
        yield int(token_id), text


def _text(token: Any) -> str | None:
    """Text of a token that is given as a string or as an object with `content`."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _read(path: Path) -> dict[str, Any]:
    return read_json_object(path) if path.exists() else {}
