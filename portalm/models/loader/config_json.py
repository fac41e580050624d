"""ModelConfig from Hugging Face's config.json and generation_config.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from portalm.config import DTypeName, ModelConfig, RopeConfig
from portalm.errors import CheckpointError, ConfigError

_DTYPES = {
    "float32": "float32",
    "float16": "float16",
    "bfloat16": "bfloat16",
    "float64": "float32",
}


def read_config(folder: Path, overrides: Mapping[str, Any]) -> ModelConfig:
    """The config of the checkpoint in `folder`, with `overrides` in place of its values.

    Raises:
        CheckpointError: a file or a value is missing or not what it should be.
    """
    path = folder / "config.json"
    values = {**_read_json(path), **overrides}
    generation = folder / "generation_config.json"
    generated = _read_json(generation) if generation.exists() else {}
    try:
        return model_config(values, generated)
    except KeyError as error:
        raise CheckpointError(path, f"it has no {error.args[0]!r}") from None
    except (ConfigError, TypeError, ValueError) as error:
        raise CheckpointError(path, str(error)) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(path, error.strerror or str(error)) from error
    except ValueError as error:
        raise CheckpointError(path, f"it is not valid JSON ({error})") from error
    if not isinstance(values, dict):
        raise CheckpointError(path, f"it holds a {type(values).__name__}, not an object")
    return values


def model_config(values: dict[str, Any], generated: dict[str, Any]) -> ModelConfig:
    """The config that config.json's `values` and generation_config.json's spell."""
    architectures = values.get("architectures") or [""]
    num_heads = int(values["num_attention_heads"])
    hidden_size = int(values["hidden_size"])
    head_size = int(values.get("head_dim") or hidden_size // num_heads)
    return ModelConfig(
        architecture=str(architectures[0]),
        vocab_size=int(values["vocab_size"]),
        hidden_size=hidden_size,
        intermediate_size=int(values["intermediate_size"]),
        num_layers=int(values["num_hidden_layers"]),
        num_heads=num_heads,
        num_kv_heads=int(values.get("num_key_value_heads") or num_heads),
        head_size=head_size,
        max_position=int(values["max_position_embeddings"]),
        rms_norm_eps=float(values.get("rms_norm_eps", 1e-6)),
        rope=_rope_config(values, head_size),
        tie_word_embeddings=bool(values.get("tie_word_embeddings", False)),
        attention_bias=bool(values.get("attention_bias", False)),
        mlp_bias=bool(values.get("mlp_bias", False)),
        sliding_window=_sliding_window(values),
        bos_token_id=_first(values.get("bos_token_id")),
        eos_token_ids=_eos_ids(values, generated),
        dtype=_dtype(values),
    )


def _rope_config(values: dict[str, Any], head_size: int) -> RopeConfig:
    """Both spellings: rope_theta and rope_scaling, or all of it in rope_parameters."""
    scaling = dict(values.get("rope_parameters") or values.get("rope_scaling") or {})
    theta = float(scaling.pop("rope_theta", None) or values.get("rope_theta") or 10_000.0)
    partial = scaling.pop("partial_rotary_factor", None) or values.get("partial_rotary_factor")
    kind = scaling.pop("rope_type", None) or scaling.pop("type", None) or "default"
    scaling.pop("type", None)
    if kind != "default":
        scaling["rope_type"] = kind
        scaling.setdefault("original_max_position_embeddings", values["max_position_embeddings"])
    else:
        scaling = {}
    return RopeConfig(
        theta=theta,
        rotary_dim=int(head_size * partial) if partial else None,
        scaling=tuple(sorted(scaling.items())),
    )


def _sliding_window(values: dict[str, Any]) -> int | None:
    window = values.get("sliding_window")
    return int(window) if window and values.get("use_sliding_window", True) else None


def _first(value: Any) -> int | None:
    if isinstance(value, list):
        value = value[0] if value else None
    return None if value is None else int(value)


def _eos_ids(values: dict[str, Any], generated: dict[str, Any]) -> tuple[int, ...]:
    ids: list[int] = []
    for source in (values, generated):
        eos = source.get("eos_token_id")
        ids.extend(eos if isinstance(eos, list) else [] if eos is None else [eos])
    return tuple(dict.fromkeys(int(i) for i in ids))


def _dtype(values: dict[str, Any]) -> DTypeName:
    name = str(values.get("dtype") or values.get("torch_dtype") or "float32")
    return cast(DTypeName, _DTYPES.get(name.removeprefix("torch."), "float32"))
