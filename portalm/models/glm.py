"""GLM-4: Llamas that rotate half of each head, in adjacent pairs, with gate and up merged.

GLM team, "ChatGLM: a family of large language models from GLM-130B to GLM-4 all tools", 2024.
Checkpoints of 2024 are `Glm`; those of 2025 (GLM-4-0414) also normalize the outputs of attention
and feed-forward.
"""

from __future__ import annotations

from typing import Literal

from portalm.layers.blocks import Block, SequentialBlock
from portalm.layers.mlp import FeedForward
from portalm.models.decoder import Decoder
from portalm.models.layer_reader import LayerReader


class Glm(Decoder):
    """GLM-4 decoder of 2024; see `portalm.models.model.Model`."""

    defaults = {
        "attention_bias": True,
        "head_dim": 128,
        "num_key_value_heads": 2,
        "partial_rotary_factor": 0.5,
        "rms_norm_eps": 1.5625e-7,
    }
    reads = frozenset({"attention_bias", "partial_rotary_factor"})
    is_interleaved = True

    def has_bias(self, part: Literal["qkv", "out", "mlp"]) -> bool:
        """Query, key and value, if config.json has attention_bias."""
        return part == "qkv" and self.config.attention_bias

    def mlp(self, read: LayerReader, layer: int, name: str) -> FeedForward:
        """Read a feed-forward whose checkpoint has gate and up merged."""
        return self.merged_mlp(read, name)


class Glm4(Glm):
    """GLM-4-0414 decoder."""

    def block(self, read: LayerReader, layer: int, name: str) -> Block:
        """Read a layer with norms before and after attention and feed-forward."""
        return SequentialBlock(
            attention_norm=self.norm(read, f"{name}.input_layernorm"),
            attention=self.attention(read, layer, f"{name}.self_attn"),
            attention_out_norm=self.norm(read, f"{name}.post_self_attn_layernorm"),
            mlp_norm=self.norm(read, f"{name}.post_attention_layernorm"),
            mlp=self.mlp(read, layer, f"{name}.mlp"),
            mlp_out_norm=self.norm(read, f"{name}.post_mlp_layernorm"),
        )
