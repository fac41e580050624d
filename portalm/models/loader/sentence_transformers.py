"""Reads a model's pooling from the files of sentence-transformers: modules.json and others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from portalm.config import PoolingConfig, PoolingName
from portalm.errors import CheckpointError, UnsupportedModel
from portalm.models.loader.json_file import read_json, read_json_object

_POOLING: dict[str, PoolingName] = {"cls": "cls", "mean": "mean", "lasttoken": "last"}
_OLDER_PREFIX = "pooling_mode_"


def read_pooling(folder: Path, *, is_encoder: bool) -> PoolingConfig:
    """Read the pooling of the model in `folder`.

    Without modules.json it is the normalized mean for an encoder, and the normalized last token for
    a decoder.

    Raises:
        CheckpointError: a file is broken.
        UnsupportedModel: the pooling is not supported, or the model has additional layers.
    """
    modules = folder / "modules.json"
    max_tokens = _max_tokens(folder)
    if not modules.is_file():
        default: PoolingName = "mean" if is_encoder else "last"
        return PoolingConfig(pooling=default, max_tokens=max_tokens)
    pooling: PoolingName | None = None
    normalize = False
    listed = read_json(modules)
    if not isinstance(listed, list) or not all(isinstance(one, dict) for one in listed):
        raise CheckpointError(modules, "it must hold a list of modules")
    for module in listed:
        kind = str(module.get("type")).rpartition(".")[2]
        if kind == "Pooling":
            pooling = _pooling(folder / str(module.get("path")) / "config.json")
        elif kind == "Normalize":
            normalize = True
        elif kind != "Transformer":
            raise UnsupportedModel(
                f"{str(modules)!r} has a module of type {kind}, which is not supported; "
                f"supported: Transformer, Pooling, Normalize"
            )
    if pooling is None:
        raise CheckpointError(modules, "it has no Pooling module")
    return PoolingConfig(
        pooling=pooling, normalize=normalize, max_tokens=max_tokens, is_purpose=True
    )


def _pooling(path: Path) -> PoolingName:
    """Read the pooling's name from pooling_mode, or from one flag for each name in older files."""
    values = read_json_object(path)
    named = values.get("pooling_mode")
    if named is None:
        flags = [name for name in values if name.startswith(_OLDER_PREFIX) and values[name]]
        named = [name.removeprefix(_OLDER_PREFIX).removesuffix("_token") for name in flags]
    chosen = [named] if isinstance(named, str) else [str(one) for one in named]
    chosen = [name.removesuffix("_tokens") for name in chosen]
    if len(chosen) != 1 or chosen[0] not in _POOLING:
        raise UnsupportedModel(
            f"{str(path)!r} has pooling {' and '.join(chosen) or 'none'}, which is not supported; "
            f"supported: one of {', '.join(_POOLING)}"
        )
    return _POOLING[chosen[0]]


def _max_tokens(folder: Path) -> int | None:
    path = folder / "sentence_bert_config.json"
    values: dict[str, Any] = read_json_object(path) if path.is_file() else {}
    found = values.get("max_seq_length")
    return None if found is None else int(found)
