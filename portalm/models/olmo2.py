"""OLMo 2: norms behind attention and feed-forward instead of before them; query and key normed.

OLMo team, "2 OLMo 2 Furious", 2025. Query and key are normed over all heads of a token at once.
"""

from __future__ import annotations

from dataclasses import replace

from portalm.layers.attention import Attention
from portalm.layers.blocks import Block, SequentialBlock
from portalm.models.decoder import Decoder
from portalm.models.layer_reader import LayerReader


class Olmo2(Decoder):
    """Functions of an OLMo 2; see `portalm.models.model.Model`."""

    defaults = {"rms_norm_eps": 1e-5}
    reads = frozenset({"attention_bias"})

    def block(self, read: LayerReader, layer: int, name: str) -> Block:
        """What is added to the residual is normed, the residual itself is not."""
        return SequentialBlock(
            attention=self.attention(read, layer, f"{name}.self_attn"),
            attention_out_norm=self.norm(read, f"{name}.post_attention_layernorm"),
            mlp=self.mlp(read, layer, f"{name}.mlp"),
            mlp_out_norm=self.norm(read, f"{name}.post_feedforward_layernorm"),
        )

    def attention(self, read: LayerReader, layer: int, name: str) -> Attention:
        """A layer's attention."""
        config = self.config
        query, key = config.num_heads * config.head_size, config.num_kv_heads * config.head_size
        return replace(
            super().attention(read, layer, name),
            query_norm=read.rms_norm(f"{name}.q_norm", query, config.norm_eps),
            key_norm=read.rms_norm(f"{name}.k_norm", key, config.norm_eps),
            norms_all_heads=True,
        )
