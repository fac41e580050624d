"""Converts a GGUF file's metadata to the keys and values of config.json."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from portalm.errors import UnsupportedModel
from portalm.models.loader.gguf_families import Get, GGUFFamily
from portalm.models.loader.gguf_file import TYPES, TensorInfo

DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Unquantized tensor types -> torch dtypes."""
ROPE_FACTORS = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")
"""Tensors that hold rotary settings, not weights."""
_NEEDS_SUPPORT = (
    "attention.clamp_kqv",
    "attention.max_alibi_bias",
    "attention.sliding_window",
    "attention.temperature_length",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "router_logit_softcapping",
    "swiglu_clamp_exp",
)
"""Metadata that changes what a model computes: a file that sets it needs a family that reads it."""


def hf_values(
    path: Path,
    family: GGUFFamily,
    metadata: Mapping[str, Any],
    infos: Mapping[str, TensorInfo],
    factors: Mapping[str, tuple[float, ...]],
) -> dict[str, Any]:
    """Build the values of config.json.

    Args:
        path: the file, for error messages.
        family: the file's family.
        metadata: the file's metadata.
        infos: the file's tensors, by their names in the file.
        factors: contents of the tensors in `ROPE_FACTORS` that the file has.

    Raises:
        KeyError: a required key is missing.
        UnsupportedModel: the metadata has a setting that the family does not support.
    """
    prefix = metadata["general.architecture"]
    find: Get = lambda key: metadata.get(f"{prefix}.{key}")  # noqa: E731
    get: Callable[[str], Any] = lambda key: metadata[f"{prefix}.{key}"]  # noqa: E731
    for key in _NEEDS_SUPPORT:
        if find(key) and key not in family.values.values():
            raise UnsupportedModel(
                f"{path}: {key} is {find(key)!r}, which is not supported for "
                f"{family.architecture}: ignoring it would make its answers wrong"
            )
    if "token_embd.weight" not in infos:
        raise KeyError("token_embd.weight")
    num_heads, head_size = get("attention.head_count"), find("attention.key_length")
    share = _rotary_share(path, family, find, head_size or get("embedding_length") // num_heads)
    return {
        "architectures": [family.architecture],
        "vocab_size": infos["token_embd.weight"].shape[0],
        "hidden_size": get("embedding_length"),
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": find("attention.head_count_kv") or num_heads,
        "head_dim": head_size,
        "max_position_embeddings": get("context_length"),
        "rms_norm_eps": find("attention.layer_norm_epsilon")
        or get("attention.layer_norm_rms_epsilon"),
        "rope_theta": find("rope.freq_base"),
        "rope_scaling": _rope_scaling(family, find, factors),
        "partial_rotary_factor": share,
        "tie_word_embeddings": "output.weight" not in infos,
        "attention_bias": "blk.0.attn_output.bias" in infos,
        "mlp_bias": "blk.0.ffn_gate.bias" in infos,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": [
            metadata[key]
            for key in ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
            if key in metadata
        ],
        "torch_dtype": _dtype(infos),
        **family.hf_values(find, infos),
    }


def _rotary_share(path: Path, family: GGUFFamily, find: Get, head_size: int) -> float | None:
    """Share of a head with rotary embedding; None: the whole head, or the family reads the key."""
    key = "rope.dimension_count"
    rotary = find(key)
    if not rotary or rotary == head_size or key in family.values.values():
        return None
    if not family.rotates_part:
        raise UnsupportedModel(
            f"{path}: {key} is {rotary}, but {family.architecture} supports only the head size, "
            f"{head_size}"
        )
    return float(rotary / head_size)


def _rope_scaling(
    family: GGUFFamily, find: Get, factors: Mapping[str, tuple[float, ...]]
) -> dict[str, Any] | None:
    original = find("rope.scaling.original_context_length")
    scaling: dict[str, Any] = {"original_max_position_embeddings": original} if original else {}
    every, short, long = (factors.get(name) for name in ROPE_FACTORS)
    if every is not None:
        return {"rope_type": "factors", "factors": every}
    if short is not None and long is not None:
        return {
            **scaling,
            "rope_type": "longrope",
            "short_factor": short,
            "long_factor": long,
            "attention_factor": find("rope.scaling.attn_factor"),
        }
    kind = find("rope.scaling.type")
    if kind in (None, "none"):
        return None
    scaling |= {"rope_type": kind, "factor": find("rope.scaling.factor") or 1.0}
    if kind == "yarn":
        scaling |= {**_yarn(find), **family.scaling}
    return scaling


def _yarn(find: Get) -> dict[str, Any]:
    scaling = {name: find(f"rope.scaling.yarn_{name}") for name in ("beta_fast", "beta_slow")}
    multiplier = find("rope.scaling.yarn_log_multiplier")
    if multiplier:
        # DeepSeek's mscale_all_dim / 10; published models have mscale == mscale_all_dim
        scaling |= dict.fromkeys(("mscale", "mscale_all_dim"), 10 * float(multiplier))
    return {name: value for name, value in scaling.items() if value is not None}


def _dtype(infos: Mapping[str, TensorInfo]) -> str:
    """The dtype of most weights; bfloat16 if those are quantized."""
    sizes: Counter[int] = Counter()
    for info in infos.values():
        sizes[info.kind] += math.prod(info.shape)
    [(kind, _)] = sizes.most_common(1)
    return DTYPES.get(TYPES[kind][0], "bfloat16")
