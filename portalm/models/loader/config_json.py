"""Builds a ModelConfig from Hugging Face's config.json and generation_config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from portalm.config import DTypeName, EncoderConfig, ModelConfig, RopeConfig
from portalm.errors import CheckpointError, ConfigError, UnsupportedModel
from portalm.models.loader.end_tokens import tokenizer_eos_ids
from portalm.models.loader.json_file import read_json_object
from portalm.models.loader.quantization_config import quantization_config
from portalm.models.loader.sentence_transformers import read_pooling
from portalm.models.text_part import text_values

_DTYPES = {
    "float32": "float32",
    "float16": "float16",
    "bfloat16": "bfloat16",
    "float64": "float32",
}


def read_config(folder: Path, overrides: Mapping[str, Any]) -> ModelConfig:
    """Read the config of the checkpoint in `folder`; `overrides` replace values of config.json.

    Of a multimodal model it is the config of the text part, whose values `overrides` replace.

    Raises:
        CheckpointError: a file or a value is missing or invalid.
        UnsupportedModel: the model, its encoder settings or its pooling are not supported.
    """
    path = folder / "config.json"
    values = read_json_object(path)
    architecture = str((values.get("architectures") or [""])[0])
    part = text_values({**values, **_nested(values, overrides)})
    values = {**(values if part is None else part), **overrides}
    quantized = quantization_config(folder, values)
    if quantized is not None:
        values["quantization_config"] = quantized
    generation = folder / "generation_config.json"
    generated = read_json_object(generation) if generation.exists() else {}
    try:
        config = model_config(values, generated)
        ends = (*config.eos_token_ids, *tokenizer_eos_ids(folder))
        config = replace(config, eos_token_ids=tuple(dict.fromkeys(ends)))
        if part is not None:
            config = replace(config, text_part_of=architecture)
        pooling = read_pooling(folder, is_encoder=config.encoder is not None)
        return replace(config, pooling=pooling)
    except KeyError as error:
        raise CheckpointError(path, f"it has no {error.args[0]!r}") from None
    except (ConfigError, TypeError, ValueError) as error:
        raise CheckpointError(path, str(error)) from error


def _nested(values: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """text_config with the values of `overrides`, if both have one."""
    old, new = values.get("text_config"), overrides.get("text_config")
    both = isinstance(old, Mapping) and isinstance(new, Mapping)
    return {"text_config": {**old, **new}} if both else {}  # type: ignore[dict-item]


def model_config(values: dict[str, Any], generated: dict[str, Any]) -> ModelConfig:
    """Build the config from config.json's `values` and those of generation_config.json."""
    from portalm.models.registry import model_class

    architectures = values.get("architectures") or [""]
    newer, older = values.get("rope_parameters"), values.get("rope_scaling")
    if newer and older and newer != older:
        raise UnsupportedModel(
            "config.json has both rope_parameters and rope_scaling, with different values: keep one"
        )
    source = values
    values = model_class(str(architectures[0])).complete(values)
    num_heads = _integer(values, "num_attention_heads")
    hidden_size = _integer(values, "hidden_size")
    head_size = int(values.get("head_dim") or hidden_size // num_heads)
    return ModelConfig(
        architecture=str(architectures[0]),
        vocab_size=_integer(values, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=_integer(values, "intermediate_size"),
        num_layers=_integer(values, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=int(values.get("num_key_value_heads") or num_heads),
        head_size=head_size,
        max_position=_max_position(values, source),
        norm_eps=1e-6 if values.get("rms_norm_eps") is None else float(values["rms_norm_eps"]),
        rope=_rope_config(values, head_size),
        tie_word_embeddings=bool(values.get("tie_word_embeddings", False)),
        attention_bias=bool(values.get("attention_bias", False)),
        mlp_bias=bool(values.get("mlp_bias", False)),
        sliding_window=_sliding_window(values),
        bos_token_id=_first(values.get("bos_token_id")),
        eos_token_ids=_eos_ids(values, generated),
        dtype=_dtype(values),
        encoder=_encoder_config(values),
        values=values,
        source=source,
    )


_ROBERTAS = ("roberta", "xlm-roberta")


def _encoder_config(values: dict[str, Any]) -> EncoderConfig | None:
    """Read the values that only encoders have; None: the model is a decoder."""
    kind = values.get("model_type")
    if kind not in ("bert", "modernbert", *_ROBERTAS):
        return None
    for name, known in (("hidden_act", "gelu"), ("position_embedding_type", "absolute")):
        if values.get(name, known) != known:
            raise UnsupportedModel(
                f"config.json: {name} {values[name]!r} is not supported for {kind}; supported: "
                f"{known!r}"
            )
    if values.get("is_decoder"):
        raise UnsupportedModel(f"config.json: is_decoder true is not supported for {kind}")
    return EncoderConfig(
        layer_norm_eps=float(values.get("layer_norm_eps", 1e-12)),
        num_token_types=int(values.get("type_vocab_size", 2)),
        first_position=int(values.get("pad_token_id", 1)) + 1 if kind in _ROBERTAS else 0,
        num_labels=_num_labels(values),
        has_sigmoid=_has_sigmoid(values),
    )


def _num_labels(values: dict[str, Any]) -> int:
    """Number of labels: from their names, or num_labels if they have no names."""
    labels = values.get("id2label")
    return len(labels) if labels else int(values.get("num_labels", 2))


def _has_sigmoid(values: dict[str, Any]) -> bool:
    """False if the checkpoint's sentence-transformers settings have no activation (Identity)."""
    newer = values.get("sentence_transformers") or {}
    function = newer.get("activation_fn") or values.get("sbert_ce_default_activation_function")
    return not str(function).endswith("Identity")


def _max_position(values: dict[str, Any], source: dict[str, Any]) -> int:
    """Longest prompt: rows of the position table, minus those that RoBERTa never uses.

    If config.json itself (`source`) has YaRN, also its factor times the original length, which is
    how model cards give the longest text.
    """
    encoder = _encoder_config(values)
    num_unused = 0 if encoder is None else encoder.first_position
    longest = _integer(values, "max_position_embeddings")
    if source.get("rope_parameters") or source.get("rope_scaling"):
        scaling = dict(_rope_config(values, 1).scaling)
        if scaling.get("rope_type") == "yarn" and scaling.get("factor"):
            extended = float(scaling["factor"]) * int(scaling["original_max_position_embeddings"])
            longest = max(longest, int(extended))
    return longest - num_unused


def _rope_config(values: dict[str, Any], head_size: int) -> RopeConfig:
    """Read rotary settings from rope_theta and rope_scaling, or from rope_parameters."""
    scaling = dict(values.get("rope_parameters") or values.get("rope_scaling") or {})
    if "full_attention" in scaling:  # settings for each type of layer: take the main one
        scaling = dict(scaling["full_attention"] or {})
    theta = float(scaling.pop("rope_theta", None) or values.get("rope_theta") or 10_000.0)
    partial = scaling.pop("partial_rotary_factor", None) or values.get("partial_rotary_factor")
    kind = scaling.pop("rope_type", None) or scaling.pop("type", None) or "default"
    scaling.pop("type", None)
    if kind != "default":
        scaling["rope_type"] = "longrope" if kind == "su" else kind
        longest = values["max_position_embeddings"]
        scaling.setdefault(
            "original_max_position_embeddings",
            values.get("original_max_position_embeddings") or longest,
        )
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


def _integer(values: dict[str, Any], name: str) -> int:
    """Read a whole number; raise `ValueError`, naming the key, for anything else."""
    value = values[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value):
        raise ValueError(f"{name} must be a whole number, not {value!r}")
    return int(value)


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
