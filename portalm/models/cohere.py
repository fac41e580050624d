"""Command R and Command R7B: parallel layers with one norm without a bias, and scaled logits.

Sources: Cohere's release notes of both. Rotary pairs are adjacent. Command R+ has query and key
norms. Command R7B ("Cohere2") has windows in three of every four layers, and a rotary embedding
only in those.
"""

from __future__ import annotations

from dataclasses import replace

from portalm.config import ModelConfig
from portalm.layers.attention import Attention
from portalm.layers.blocks import Block, ParallelBlock
from portalm.layers.norms import EachHeadNorm, Norm
from portalm.models.decoder import Decoder
from portalm.models.layer_reader import LayerReader


class Cohere(Decoder):
    """Command R decoder; see `portalm.models.model.Model`."""

    defaults = {
        "logit_scale": 0.0625,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "tie_word_embeddings": True,
    }
    names = {"rms_norm_eps": ("layer_norm_eps",)}
    reads = frozenset({"attention_bias", "logit_scale", "use_qk_norm"})
    is_interleaved = True

    def __init__(self, config: ModelConfig, dtype: str) -> None:
        """Create the model for `config`; raise `UnsupportedModel` for unsupported settings."""
        super().__init__(config, dtype)
        self.logit_scale = float(config.values["logit_scale"])

    def norm(self, read: LayerReader, name: str) -> Norm:
        """Read a layer norm without a bias."""
        config = self.config
        return read.layer_norm(name, config.hidden_size, config.norm_eps, has_bias=False)

    def block(self, read: LayerReader, layer: int, name: str) -> Block:
        """Read a parallel layer with one norm."""
        return ParallelBlock(
            attention_norm=self.norm(read, f"{name}.input_layernorm"),
            attention=self.attention(read, layer, f"{name}.self_attn"),
            mlp=self.mlp(read, layer, f"{name}.mlp"),
        )

    def attention(self, read: LayerReader, layer: int, name: str) -> Attention:
        """Read attention, with query and key norms if config.json has use_qk_norm."""
        attention = super().attention(read, layer, name)
        if not self.config.values.get("use_qk_norm"):
            return attention
        return replace(
            attention,
            query_norm=self._head_norm(read, f"{name}.q_norm", self.config.num_heads),
            key_norm=self._head_norm(read, f"{name}.k_norm", self.config.num_kv_heads),
        )

    def _head_norm(self, read: LayerReader, name: str, num_heads: int) -> EachHeadNorm:
        weight = read.tensor(f"{name}.weight", num_heads, self.config.head_size)
        return EachHeadNorm.of(weight, self.config.norm_eps)


class Cohere2(Cohere):
    """Command R7B decoder; see `portalm.models.model.Model`."""

    defaults = {**Cohere.defaults, "rope_theta": 10_000.0, "sliding_window": 4096}
    reads = frozenset({"attention_bias", "layer_types", "logit_scale", "sliding_window"})

    def has_window(self, layer: int) -> bool:
        """All layers except every fourth, or every `sliding_window_pattern`-th."""
        return (layer + 1) % int(self.config.values.get("sliding_window_pattern", 4)) != 0

    def attention(self, read: LayerReader, layer: int, name: str) -> Attention:
        """Read attention; layers without a window have no rotary embedding."""
        attention = super().attention(read, layer, name)
        return attention if attention.spec.sliding_window else replace(attention, rope=None)
