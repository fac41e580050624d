"""Tokenizers of folders in Hugging Face's layout."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tokenizers import Tokenizer as FastTokenizer

from portalm.errors import CheckpointError
from portalm.text.tokenizer import Tokenizer

_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")


def load_fast_tokenizer(folder: Path, chat_template: str | None) -> Tokenizer:
    """From tokenizer.json, by the tokenizers library; transformers is not imported."""
    path = folder / "tokenizer.json"
    try:
        encoder = FastTokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception for a broken file
        raise CheckpointError(path, f"it is not a tokenizer ({error})") from error
    encoder.no_truncation()
    encoder.no_padding()
    config = _read_json(folder / "tokenizer_config.json")
    names = {
        name: text for name in _SPECIAL_NAMES if (text := _token_text(config.get(name))) is not None
    }
    special = {i for i, token in encoder.get_added_tokens_decoder().items() if token.special}

    def id_of(name: str) -> int | None:
        return encoder.token_to_id(names[name]) if name in names else None

    return Tokenizer(
        encoder=encoder,
        bos_token_id=id_of("bos_token"),
        eos_token_id=id_of("eos_token"),
        special_ids=frozenset(special),
        chat_template=chat_template or _chat_template(folder, config),
        template_variables=names,
    )


def load_slow_tokenizer(
    folder: Path, chat_template: str | None, *, trust_remote_code: bool
) -> Tokenizer:
    """By transformers, for folders without a tokenizer.json."""
    from transformers import AutoTokenizer

    try:
        slow = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    except Exception as error:  # it raises whatever a tokenizer's own code raises
        raise CheckpointError(
            folder, f"there is no tokenizer that can be read ({type(error).__name__}: {error})"
        ) from error
    names = {
        name: text for name in _SPECIAL_NAMES if isinstance(text := getattr(slow, name, None), str)
    }
    return Tokenizer(
        encoder=_Slow(slow),
        bos_token_id=slow.bos_token_id,
        eos_token_id=slow.eos_token_id,
        special_ids=frozenset(slow.all_special_ids),
        chat_template=chat_template or slow.chat_template,
        template_variables=names,
    )


class _Slow:
    """A transformers tokenizer behind the tokenizers library's names."""

    def __init__(self, slow: Any) -> None:
        self._slow = slow

    def encode(self, sequence: str, *, add_special_tokens: bool = True) -> Any:
        ids = self._slow.encode(sequence, add_special_tokens=add_special_tokens)
        return SimpleNamespace(ids=ids)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return str(
            self._slow.decode(
                list(ids),
                skip_special_tokens=skip_special_tokens,
                clean_up_tokenization_spaces=False,
            )
        )

    def id_to_token(self, id: int) -> str | None:
        token = self._slow.convert_ids_to_tokens(id)
        return None if token is None else str(token)

    def token_to_id(self, token: str) -> int | None:
        found = self._slow.convert_tokens_to_ids(token)
        return None if found is None else int(found)

    def get_vocab_size(self, with_added_tokens: bool = True) -> int:
        return len(self._slow)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(path, f"it is not valid JSON ({error})") from error
    return values if isinstance(values, dict) else {}


def _token_text(value: Any) -> str | None:
    """A token is spelled as a text or as an object with its content."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    """chat_template.jinja, else tokenizer_config.json's (the one named default, of several)."""
    path = folder / "chat_template.jinja"
    if path.exists():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None
