"""Tokens that end an answer, where the model's config does not list them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from portalm.models.loader.json_file import read_json_object

_NAMES = frozenset(
    {
        "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|calls|>", "<|flush|>",
        "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>", "</s>", "<|eom_id|>", "<EOT>",
        "_<EOT>", "[EOT]", "[EOS]", "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>",
        # between the files of a repository: nothing after them belongs to an answer
        "<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<|fim_repo|>", "<|repo_name|>", "<fim-repo>",
        "<REPO>", "<reponame>", "<|file_sep|>",
    }
)  # fmt: skip
"""Special tokens at which llama.cpp ends an answer, whatever the file's eos_token_id is."""
_ROLES = ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")
_SPECIAL_TYPES = frozenset({2, 3, 4})
"""Values of tokenizer.ggml.token_type: unknown, control, user-defined."""


def gguf_end_ids(metadata: Mapping[str, Any]) -> list[int]:
    """Ids at which an answer ends, by a GGUF file's metadata; the file's own eos_token_id first.

    As in llama.cpp, these are the tokens that have a role at the end of a text, and special tokens
    with known names: a file's eos is often not what ends the turn of a chat.
    """
    keys = [f"tokenizer.ggml.{role}_token_id" for role in _ROLES]
    ids = [int(metadata[key]) for key in keys if metadata.get(key) is not None]
    tokens = metadata.get("tokenizer.ggml.tokens") or ()
    types = metadata.get("tokenizer.ggml.token_type") or ()
    for token_id, kind in enumerate(types):
        if kind in _SPECIAL_TYPES and token_id < len(tokens) and tokens[token_id] in _NAMES:
            ids.append(token_id)
    names = {tokens[i]: i for i in ids if i < len(tokens)}
    # in these dialects <|end|> separates the channels of one answer, and </s> is an HTML tag
    if "<|end|>" in names and (
        {"<|return|>", "<|call|>"} <= names.keys() or {"<|calls|>", "<|flush|>"} <= names.keys()
    ):
        ids = [i for i in ids if i != names["<|end|>"]]
    if {"</s>", "<|tool_response>"} <= names.keys():
        ids = [i for i in ids if i != names["</s>"]]
    return list(dict.fromkeys(ids))


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
