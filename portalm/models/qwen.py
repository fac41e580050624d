"""Qwen2, Qwen2.5 and Qwen3: Llamas with QKV biases, or with query and key norms.

Yang et al., "Qwen2 technical report", 2024, and "Qwen3 technical report", 2025.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from portalm.layers.attention import Attention
from portalm.models.decoder import Decoder
from portalm.models.layer_reader import LayerReader


class Qwen2(Decoder):
    """Qwen2 decoder: query, key and value have biases, and later layers may have a window."""

    defaults = {"use_sliding_window": False}
    reads = frozenset({"layer_types", "sliding_window", "use_sliding_window"})

    def has_bias(self, part: Literal["qkv", "out", "mlp"]) -> bool:
        """Query, key and value have biases."""
        return part == "qkv"

    def has_window(self, layer: int) -> bool:
        """Layers from number `max_window_layers`."""
        return layer >= int(self.config.values.get("max_window_layers", 28))


class MiMo(Qwen2):
    """MiMo 7B decoder; its layer that predicts further tokens is not loaded.

    Xiaomi, "MiMo: unlocking the reasoning potential of language model", 2025.
    """

    reads = Qwen2.reads | {"attention_bias"}


class Qwen3(Qwen2):
    """Qwen3 decoder: norms of each query and key head before the rotary embedding."""

    defaults = {"use_sliding_window": False, "head_dim": 128}
    reads = Qwen2.reads | {"attention_bias"}

    def has_bias(self, part: Literal["qkv", "out", "mlp"]) -> bool:
        """Attention projections, if config.json has attention_bias."""
        return part != "mlp" and self.config.attention_bias

    def attention(self, read: LayerReader, layer: int, name: str) -> Attention:
        """Read attention with query and key norms."""
        size, eps = self.config.head_size, self.config.norm_eps
        return replace(
            super().attention(read, layer, name),
            query_norm=read.rms_norm(f"{name}.q_norm", size, eps),
            key_norm=read.rms_norm(f"{name}.k_norm", size, eps),
        )
