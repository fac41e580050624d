"""GLM-4: Llamas that rotate half of each head, pairs side by side; gate and up are merged.

GLM team, "ChatGLM: a family of large language models from GLM-130B to GLM-4 all tools", 2024: the
checkpoints of that year are a Glm; those of 2025 (GLM-4-0414) also norm what comes out of attention
and feed-forward.
"""

from __future__ import annotations

from typing import Literal

from portalm.layers.blocks import Block, SequentialBlock
from portalm.layers.mlp import FeedForward
from portalm.models.decoder import Decoder
from portalm.models.layer_reader import LayerReader


class Glm(Decoder):
    """The first of them."""

    defaults = {
        "attention_bias": True,
        "head_dim": 128,
        "num_key_value_heads": 2,
        "partial_rotary_factor": 0.5,
        "rms_norm_eps": 1.5625e-7,
    }
    reads = frozenset({"attention_bias"})
    is_interleaved = True

    def has_bias(self, part: Literal["qkv", "out", "mlp"]) -> bool:
        """Only query, key and value, where the config says so."""
        return part == "qkv" and self.config.attention_bias

    def mlp(self, read: LayerReader, layer: int, name: str) -> FeedForward:
        """Gate and up are merged in the checkpoint."""
        return self.merged_mlp(read, name)


class Glm4(Glm):
    """The second."""

    def block(self, read: LayerReader, layer: int, name: str) -> Block:
        """Norms on both sides."""
        return SequentialBlock(
            attention_norm=self.norm(read, f"{name}.input_layernorm"),
            attention=self.attention(read, layer, f"{name}.self_attn"),
            attention_out_norm=self.norm(read, f"{name}.post_self_attn_layernorm"),
            mlp_norm=self.norm(read, f"{name}.post_attention_layernorm"),
            mlp=self.mlp(read, layer, f"{name}.mlp"),
            mlp_out_norm=self.norm(read, f"{name}.post_mlp_layernorm"),
        )
