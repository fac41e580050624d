"""EXAONE 4: a Qwen3 with norms after attention and feed-forward instead of before them.

LG AI Research, "EXAONE 4.0", 2025. Models with sliding windows have one in three of every four
layers, and a rotary embedding only in those. The small model has no windows, and a rotary embedding
in every layer.
"""

from __future__ import annotations

from dataclasses import replace

from portalm.errors import UnsupportedModel
from portalm.layers.attention import Attention
from portalm.layers.blocks import Block, SequentialBlock
from portalm.models.layer_reader import LayerReader
from portalm.models.qwen import Qwen3


class Exaone4(Qwen3):
    """EXAONE 4 decoder; see `portalm.models.model.Model`."""

    defaults = {"num_key_value_heads": 32, "rms_norm_eps": 1e-5, "sliding_window": 4096}
    reads = frozenset({"layer_types", "sliding_window"})

    def has_window(self, layer: int) -> bool:
        """All layers except every fourth, or every `sliding_window_pattern`-th."""
        pattern = self.config.values.get("sliding_window_pattern", 4)
        if not isinstance(pattern, int) or pattern < 1:
            raise UnsupportedModel(
                f"config.json: sliding_window_pattern {pattern!r} is not supported without "
                f"layer_types for {self.config.architecture}"
            )
        return (layer + 1) % pattern != 0

    def block(self, read: LayerReader, layer: int, name: str) -> Block:
        """Read a layer whose norms apply to the outputs of attention and feed-forward."""
        return SequentialBlock(
            attention=self.attention(read, layer, f"{name}.self_attn"),
            attention_out_norm=self.norm(read, f"{name}.post_attention_layernorm"),
            mlp=self.mlp(read, layer, f"{name}.mlp"),
            mlp_out_norm=self.norm(read, f"{name}.post_feedforward_layernorm"),
        )

    def attention(self, read: LayerReader, layer: int, name: str) -> Attention:
        """Read attention; in models with windows, layers without one have no rotary embedding."""
        attention = super().attention(read, layer, name)
        has_windows = self.config.sliding_window is not None
        if has_windows and attention.spec.sliding_window is None:
            return replace(attention, rope=None)
        return attention
