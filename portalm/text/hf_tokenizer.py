"""Load tokenizers from folders in Hugging Face's layout."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as RustTokenizer

from portalm.errors import CheckpointError
from portalm.text.base import SpecialTokens
from portalm.text.chat_template import ChatTemplates
from portalm.text.rust_tokenizer import set_bos_and_eos, vocab_size, wrap
from portalm.text.tokenizer import Tokenizer

_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token")

_BOS_BY_FLAG = ("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer")
"""Tokenizer classes for which add_bos_token and add_eos_token override tokenizer.json."""


def load_fast_tokenizer(path: Path, chosen: ChatTemplates | None) -> Tokenizer:
    """Load tokenizer.json, with the `chosen` chat templates or, if None, the folder's own."""
    file = path / "tokenizer.json"
    try:
        rust = RustTokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exceptions
        raise CheckpointError(file, f"it is not a valid tokenizer: {error}") from error
    rust.no_truncation()
    rust.no_padding()
    config = {**_read_json(path / "special_tokens_map.json"), **_read_config(path)}
    names = {role: _content(config.get(role)) for role in _ROLES}
    _add_listed_tokens(rust, config, names)
    _follow_flags(rust, config, names)
    return wrap(rust, names, chosen or ChatTemplates(_folder_templates(path, config)))


def _read_config(path: Path) -> dict[str, Any]:
    """Read tokenizer_config.json, without entries that are null."""
    config = _read_json(path / "tokenizer_config.json")
    return {key: value for key, value in config.items() if value is not None}


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(file, f"it is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(file, "it must contain a JSON object")
    return values


def _content(token: Any) -> str | None:
    """Return the token's text from an entry that is a string, or an object with flags."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _add_listed_tokens(
    rust: RustTokenizer, config: Mapping[str, Any], names: Mapping[str, str | None]
) -> None:
    """Add the tokens listed in tokenizer_config.json, and mark those with a role as special."""
    listed = config.get("added_tokens_decoder") or {}
    for token_id, entry in sorted(listed.items(), key=lambda item: int(item[0])):
        token = AddedToken(
            entry["content"],
            single_word=entry.get("single_word", False),
            lstrip=entry.get("lstrip", False),
            rstrip=entry.get("rstrip", False),
            normalized=entry.get("normalized", False),
            special=entry.get("special", False),
        )
        if rust.token_to_id(token.content) is None and int(token_id) == vocab_size(rust):
            rust.add_tokens([token])
    special = {token.content for token in rust.get_added_tokens_decoder().values() if token.special}
    more = [
        _content(token)
        for key in ("additional_special_tokens", "extra_special_tokens")
        for token in _listed(config.get(key))
    ]
    rust.add_special_tokens(
        [
            AddedToken(token, normalized=False, special=True)
            for token in dict.fromkeys([*names.values(), *more])
            if token and token not in special and rust.token_to_id(token) is not None
        ]
    )


def _listed(tokens: Any) -> list[Any]:
    """Return the entries of a list, or of an object that names them; [] for None."""
    return list(tokens.values() if isinstance(tokens, dict) else tokens or ())


def _follow_flags(
    rust: RustTokenizer, config: Mapping[str, Any], names: Mapping[str, str | None]
) -> None:
    """Apply add_bos_token and add_eos_token, for the tokenizer classes that honor them."""
    kind = str(config.get("tokenizer_class", "")).removesuffix("Fast")
    if kind not in _BOS_BY_FLAG or not {"add_bos_token", "add_eos_token"} & config.keys():
        return
    bos, eos = names["bos_token"], names["eos_token"]
    set_bos_and_eos(
        rust,
        bos=bos if config.get("add_bos_token", True) else None,
        eos=eos if config.get("add_eos_token", False) else None,
    )


def _folder_templates(path: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Chat templates by name: of tokenizer_config.json, chat_template.json and .jinja files.

    Later ones replace earlier ones of the same name, as they do in transformers.
    """
    processor = _read_json(path / "chat_template.json")  # of models with several modalities
    templates = {
        **_named_templates(config.get("chat_template")),
        **_named_templates(processor.get("chat_template")),
    }
    file = path / "chat_template.jinja"
    if file.is_file():
        templates["default"] = file.read_text(encoding="utf-8")
    for more in sorted((path / "additional_chat_templates").glob("*.jinja")):
        templates[more.stem] = more.read_text(encoding="utf-8")
    return templates


def _named_templates(listed: Any) -> dict[str, str]:
    """Templates by name, of one template, a list of named ones, or an object."""
    if isinstance(listed, str):
        return {"default": listed}
    if isinstance(listed, dict):
        return {str(name): str(template) for name, template in listed.items()}
    return {entry["name"]: entry["template"] for entry in listed or ()}


# -- transformers -----------------------------------------------------------------------------


def load_slow_tokenizer(
    path: Path, chosen: ChatTemplates | None, *, trust_remote_code: bool
) -> Tokenizer:
    """Load a tokenizer in a format that only transformers reads (importing it takes seconds)."""
    _check_package(path)
    from transformers import AutoTokenizer

    try:
        slow = AutoTokenizer.from_pretrained(str(path), trust_remote_code=trust_remote_code)
    except Exception as error:  # each format's code raises different types
        raise CheckpointError(path, f"transformers cannot read its tokenizer: {error}") from error
    names = {role: getattr(slow, role, None) for role in _ROLES}
    listed = _named_templates(getattr(slow, "chat_template", None))
    templates = chosen or ChatTemplates({**listed, **_folder_templates(path, {})})
    rust = getattr(slow, "backend_tokenizer", None)
    if isinstance(rust, RustTokenizer):
        return wrap(rust, names, templates)
    return Tokenizer(
        _TransformersCodec(slow),
        spelling=None,
        special=SpecialTokens(
            roles={role: token for role, token in names.items() if token is not None},
            ids=frozenset(slow.all_special_ids),
        ),
        templates=templates,
    )


def _check_package(path: Path) -> None:
    """Check that the Python package that reads the folder's tokenizer file is installed.

    Raises:
        CheckpointError: names the package to install.
    """
    model, tekken = path / "tokenizer.model", path / "tekken.json"
    if model.is_file() and not (path / "vocab.json").is_file():
        with model.open("rb") as file:
            is_protobuf = file.read(1) == b"\n"  # else lines of text, as tiktoken writes
        file_name, package = model.name, "sentencepiece" if is_protobuf else "tiktoken"
    elif tekken.is_file():
        file_name, package = tekken.name, "mistral-common"
    else:
        return
    if importlib.util.find_spec(package.replace("-", "_")) is None:
        raise CheckpointError(
            path,
            f"reading its tokenizer ({file_name}) needs the Python package {package}, which is not "
            f"installed: run `pip install {package}`, or name a folder with a tokenizer.json with "
            f"--tokenizer",
        )


class _TransformersCodec:
    """A transformers tokenizer that is written in Python, as a `Codec`."""

    def __init__(self, slow: Any) -> None:
        self._slow = slow

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return list(self._slow.encode(text, add_special_tokens=add_special_tokens))

    def encode_pair(self, first: str, second: str) -> tuple[list[int], list[int]]:
        encoded = self._slow(first, second, return_token_type_ids=True)
        return list(encoded["input_ids"]), list(encoded["token_type_ids"])

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        return str(
            self._slow.decode(
                list(ids),
                skip_special_tokens=skip_special_tokens,
                clean_up_tokenization_spaces=False,
            )
        )

    def id_to_token(self, token_id: int) -> str | None:
        return (
            str(self._slow.convert_ids_to_tokens(token_id)) if token_id < len(self._slow) else None
        )

    def token_to_id(self, token: str) -> int | None:
        token_id: int | None = self._slow.get_vocab().get(token)
        return token_id

    def vocab_size(self) -> int:
        return len(self._slow)
