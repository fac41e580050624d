"""StableLM: layer norms, a partial rotary embedding, and in some sizes parallel layers.

Bellagente et al., "Stable LM 2 1.6B technical report", 2024. The 12B model also has a layer norm of
each query and key head.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch

from portalm.layers.attention import Attention
from portalm.layers.blocks import Block, ParallelBlock
from portalm.layers.norms import EachHeadNorm, Norm
from portalm.models.decoder import Decoder
from portalm.models.layer_reader import LayerReader


class StableLm(Decoder):
    """StableLM decoder; see `portalm.models.model.Model`."""

    defaults = {
        "num_key_value_heads": 32,
        "partial_rotary_factor": 0.25,
        "qk_layernorm": False,
        "rms_norm_eps": 1e-5,
        "use_parallel_residual": False,
        "use_qkv_bias": False,
    }
    names = {"partial_rotary_factor": ("rope_pct",), "rms_norm_eps": ("layer_norm_eps", "norm_eps")}
    reads = frozenset({"partial_rotary_factor", "qk_layernorm"})

    def has_bias(self, part: Literal["qkv", "out", "mlp"]) -> bool:
        """Query, key and value, if config.json has use_qkv_bias."""
        return part == "qkv" and bool(self.config.values["use_qkv_bias"])

    def norm(self, read: LayerReader, name: str) -> Norm:
        """Read a layer norm."""
        return read.layer_norm(name, self.config.hidden_size, self.config.norm_eps)

    def block(self, read: LayerReader, layer: int, name: str) -> Block:
        """Read a sequential layer, or a parallel one with one norm."""
        if not self.config.values["use_parallel_residual"]:
            return super().block(read, layer, name)
        return ParallelBlock(
            attention_norm=self.norm(read, f"{name}.input_layernorm"),
            attention=self.attention(read, layer, f"{name}.self_attn"),
            mlp=self.mlp(read, layer, f"{name}.mlp"),
        )

    def attention(self, read: LayerReader, layer: int, name: str) -> Attention:
        """Read attention, with norms of each head if config.json has qk_layernorm."""
        config, attention = self.config, super().attention(read, layer, name)
        if not config.values["qk_layernorm"]:
            return attention
        return replace(
            attention,
            query_norm=self._head_norms(read, f"{name}.q_layernorm", config.num_heads),
            key_norm=self._head_norms(read, f"{name}.k_layernorm", config.num_kv_heads),
        )

    def _head_norms(self, read: LayerReader, name: str, num_heads: int) -> EachHeadNorm:
        size, eps = self.config.head_size, self.config.norm_eps
        if read.form.has_stacked_norms:
            return EachHeadNorm.of(read.tensor(f"{name}.norms.weight", num_heads, size), eps)
        weights = [read.tensor(f"{name}.norms.{i}.weight", size) for i in range(num_heads)]
        return EachHeadNorm.of(torch.stack(weights), eps)
