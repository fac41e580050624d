"""OLMo 2: norms after attention and feed-forward instead of before them, and of query and key.

OLMo team, "2 OLMo 2 Furious", 2025. Query and key norms take all heads of a token as one vector.
"""

from __future__ import annotations

from dataclasses import replace

from portalm.config import ModelConfig
from portalm.layers.attention import Attention
from portalm.layers.blocks import Block, SequentialBlock
from portalm.models.decoder import Decoder
from portalm.models.layer_reader import LayerReader


class Olmo2(Decoder):
    """OLMo 2 decoder; see `portalm.models.model.Model`."""

    defaults = {"rms_norm_eps": 1e-5}
    reads = frozenset({"attention_bias"})

    def block(self, read: LayerReader, layer: int, name: str) -> Block:
        """Read a layer whose norms apply to the outputs of attention and feed-forward."""
        return SequentialBlock(
            attention=self.attention(read, layer, f"{name}.self_attn"),
            attention_out_norm=self.norm(read, f"{name}.post_attention_layernorm"),
            mlp=self.mlp(read, layer, f"{name}.mlp"),
            mlp_out_norm=self.norm(read, f"{name}.post_feedforward_layernorm"),
        )

    def attention(self, read: LayerReader, layer: int, name: str) -> Attention:
        """Read attention with query and key norms over all heads."""
        return with_norms_of_all_heads(
            super().attention(read, layer, name), read, name, self.config
        )


def with_norms_of_all_heads(
    attention: Attention, read: LayerReader, name: str, config: ModelConfig
) -> Attention:
    """Read norms that take all query heads of a token, or all its key heads, as one vector."""
    query, key = config.num_heads * config.head_size, config.num_kv_heads * config.head_size
    return replace(
        attention,
        query_norm=read.rms_norm(f"{name}.q_norm", query, config.norm_eps),
        key_norm=read.rms_norm(f"{name}.k_norm", key, config.norm_eps),
        norms_all_heads=True,
    )
