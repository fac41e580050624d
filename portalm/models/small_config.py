"""Shrinks a model's config to a size that runs in milliseconds, with the same kinds of layers.

Everything that selects code stays: types of layers, flags, activations, rotary settings. Sizes
become small, and so do lengths at which something changes (windows, chunks, tables), so that a
prompt of `PROMPT_LENGTH` tokens is longer than each.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch

PROMPT_LENGTH = 40
VOCAB_SIZE = 128
_MAX_LAYERS = 12

_SIZES: tuple[tuple[str, int], ...] = (
    (r"type_vocab_size", 4),
    (r"vocab_size", VOCAB_SIZE),
    (r"hidden_size_per_layer|_multiple_of|pronunciation|shape_embed", 16),
    (r"moe_intermediate_size|expert_ffn|expert_intermediate", 32),
    (r"intermediate_size|ffn_dim|ffn_hidden_size|n_inner|dim_ff", 96),
    (r"v_head_dim", 20),
    (r"q_lora_rank", 24),
    (r"_rank$", 32),
    (r"head_dim|kv_channels|d_kv|dim_head", 16),
    (r"hidden_size|d_model|n_embe?d$|embedding_size|embedding_dim|embed_proj_dim|dim_model$", 64),
    (r"num_attention_heads|n_heads?$|num_heads|attention_heads", 4),
    (r"topk_group", 2),
    (r"n_group|expert_group", 4),
    (r"experts_per_tok|moe_k$|moe_topk|top_k|moe_top_k", 3),
    (r"num_experts$|num_local_experts|n_routed_experts|moe_num_experts|num_routed", 8),
    (r"window|chunk|floor|index_topk|block|max_distance", 12),
    (r"original_max_position", 16),
    (r"max_position|n_positions|n_ctx|max_seq|context_length|model_max_length", 4096),
)
"""Patterns of keys, the first that matches counts -> the largest value."""
_KEPT = re.compile(r"^rope_|rotary|factor|seed|shared_experts")
"""Keys whose values are sizes of nothing."""
_NUM_LAYERS = re.compile(r"^(num_hidden_layers|n_layers?|num_layers|decoder_layers)$")
_PERIODS = re.compile(
    r"interval|pattern|period|_step$|every|first_k_dense|dense_layers|start_index"
)
"""Keys that say after how many layers something changes."""


def shrink(values: Mapping[str, Any]) -> dict[str, Any]:
    """Shrink the values of a config.json, all keys of which are set."""
    layers = _layers(values)
    num_layers = _num_layers(values)
    return {key: _shrunk(key, value, values, layers, num_layers) for key, value in values.items()}


def randomize(model: torch.nn.Module) -> None:
    """Fill parameters and persistent buffers with random values.

    Norm weights are near 1 and matrices wide, so that attention is far from uniform and a wrong
    position or mask changes the logits.
    """
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            is_norm = tensor.ndim == 1 and name.endswith("weight")
            tensor.normal_(1.0 if is_norm else 0.0, 0.2)


def _shrunk(
    key: str, value: Any, values: Mapping[str, Any], layers: list[int], num_layers: int
) -> Any:
    if isinstance(value, Mapping):
        if key == "per_layer_config":
            return {k: dict(v) for k, v in value.items() if int(k) < len(layers)}
        return shrink(value) if key.endswith(("_config", "_parameters")) else dict(value)
    if isinstance(value, (list, tuple)):
        if num_layers and len(value) == num_layers:
            value = [value[layer] for layer in layers]
        return [_shrunk(key, v, values, layers, num_layers) for v in value]
    if isinstance(value, bool) or not isinstance(value, int) or _KEPT.search(key):
        return value
    if key.endswith(("_token_id", "_token_index")):
        return value if value < VOCAB_SIZE else VOCAB_SIZE - 1
    if _NUM_LAYERS.match(key):
        return min(value, len(layers)) if layers else value
    rotary = values.get("qk_rope_head_dim")
    if rotary and key in ("head_dim", "qk_head_dim", "qk_nope_head_dim", "qk_rope_head_dim"):
        return 16 * value // rotary  # rotary settings may state their ratio
    if re.search(r"key_value_heads|kv_heads|n_head_kv|query_groups", key):
        return _kv_heads(key, value, values)
    limit = next((limit for pattern, limit in _SIZES if re.search(pattern, key)), None)
    if limit is None:
        return value if value <= VOCAB_SIZE else 16
    return min(value, limit)


def _kv_heads(key: str, value: int, values: Mapping[str, Any]) -> int:
    """KV heads for at most 4 query heads: as many, one, or two."""
    prefix = key.split("num_key_value_heads")[0] if "num_key_value_heads" in key else ""
    names = (f"{prefix}num_attention_heads", "num_attention_heads", "n_head", "n_heads")
    heads = next((values[n] for n in names if isinstance(values.get(n), int)), value)
    return min(value, 4) if value == heads else min(value, 2)


def _num_layers(values: Mapping[str, Any]) -> int:
    found = [v for k, v in values.items() if _NUM_LAYERS.match(k) and isinstance(v, int)]
    return found[0] if found else 0


def _layers(values: Mapping[str, Any]) -> list[int]:
    """Layers to keep: the first ones, and one of each further kind."""
    num_layers = _num_layers(values)
    periods = [
        v for k, v in values.items() if _PERIODS.search(k) and isinstance(v, int) and v < num_layers
    ]
    first = min(num_layers, _MAX_LAYERS, max([4, *(p + 1 for p in periods)]))
    kept = list(range(first))
    kinds = list(_kinds(values, num_layers))
    for layer in range(first, num_layers):
        if kinds[layer] not in [kinds[k] for k in kept]:
            kept.append(layer)
    return kept[:_MAX_LAYERS]


def _kinds(values: Mapping[str, Any], num_layers: int) -> Iterator[str]:
    """The values of each layer in all lists with one value per layer."""
    lists = [v for v in values.values() if isinstance(v, (list, tuple)) and len(v) == num_layers]
    return (repr([one[layer] for one in lists]) for layer in range(num_layers))
