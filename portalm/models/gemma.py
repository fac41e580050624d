"""Gemma 1, 2 and 3: Llamas with scaled embeddings, 1 + weight norms and a GELU gate.

Gemma team, "Gemma", 2024. "Gemma 2", 2024, adds soft caps of scores and logits, norms after
attention and feed-forward, and a window in every other layer. "Gemma 3", 2025, has no caps, adds
query and key norms, and has a window in five of every six layers, with another rotary base there.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from portalm.backend import AttentionSpec
from portalm.config import ModelConfig, RopeConfig
from portalm.errors import UnsupportedModel
from portalm.layers.attention import Attention
from portalm.layers.blocks import Block, SequentialBlock
from portalm.layers.norms import Norm
from portalm.models.decoder import Decoder
from portalm.models.layer_reader import LayerReader

_DEFAULTS = {
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
}


class Gemma(Decoder):
    """Gemma 1 decoder; see `portalm.models.model.Model`."""

    defaults = _DEFAULTS
    reads = frozenset({"attention_bias"})

    def __init__(self, config: ModelConfig, dtype: str) -> None:
        """Create the model for `config`; raise `UnsupportedModel` for unsupported settings."""
        super().__init__(config, dtype)
        # rounded to the model's dtype, as in training
        scale = torch.tensor(config.hidden_size**0.5, dtype=getattr(torch, dtype))
        self.embedding_scale = float(scale)

    @classmethod
    def complete(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Add defaults; the first checkpoints say gelu but use the tanh approximation."""
        values = super().complete(values)
        if values["hidden_act"] == "gelu":
            values["hidden_act"] = _DEFAULTS["hidden_act"]
        return values

    def norm(self, read: LayerReader, name: str) -> Norm:
        """Read a norm whose Hugging Face weight is stored minus 1."""
        config = self.config
        return read.rms_norm(name, config.hidden_size, config.norm_eps, is_shifted=True)


class Gemma2(Gemma):
    """Gemma 2 decoder."""

    defaults = {
        **_DEFAULTS,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
    }
    names = {"hidden_act": ("hidden_activation",)}
    reads = Gemma.reads | {
        "attn_logit_softcapping",
        "final_logit_softcapping",
        "layer_types",
        "query_pre_attn_scalar",
        "sliding_window",
    }

    def __init__(self, config: ModelConfig, dtype: str) -> None:
        """Create the model for `config`; raise `UnsupportedModel` for unsupported settings."""
        super().__init__(config, dtype)
        self.logit_cap = config.values["final_logit_softcapping"] or None

    def has_window(self, layer: int) -> bool:
        """Every other layer, starting with the first."""
        return layer % 2 == 0

    def spec(self, layer: int) -> AttentionSpec:
        """Attention with the scale query_pre_attn_scalar^-0.5 and a soft cap."""
        values = self.config.values
        return replace(
            super().spec(layer),
            scale=float(values["query_pre_attn_scalar"]) ** -0.5,
            soft_cap=values["attn_logit_softcapping"] or None,
        )

    def block(self, read: LayerReader, layer: int, name: str) -> Block:
        """Read a layer with norms before and after attention and feed-forward."""
        return SequentialBlock(
            attention_norm=self.norm(read, f"{name}.input_layernorm"),
            attention=self.attention(read, layer, f"{name}.self_attn"),
            attention_out_norm=self.norm(read, f"{name}.post_attention_layernorm"),
            mlp_norm=self.norm(read, f"{name}.pre_feedforward_layernorm"),
            mlp=self.mlp(read, layer, f"{name}.mlp"),
            mlp_out_norm=self.norm(read, f"{name}.post_feedforward_layernorm"),
        )


class Gemma3(Gemma2):
    """Gemma 3 decoder, text only."""

    defaults = {
        **Gemma2.defaults,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "rope_theta": 1_000_000.0,
    }
    reads = Gemma2.reads | {"rope_parameters"}

    def has_window(self, layer: int) -> bool:
        """All layers except every sixth, or every `sliding_window_pattern`-th."""
        return (layer + 1) % int(self.config.values.get("sliding_window_pattern", 6)) != 0

    def ropes(self) -> tuple[RopeConfig, ...]:
        """Rotary settings of layers without a window, then of layers with one."""
        values = self.config.values
        local = (values.get("rope_parameters") or {}).get("sliding_attention") or {}
        if local.get("rope_type", "default") != "default":
            raise UnsupportedModel(
                f"config.json: rope_type {local['rope_type']!r} for sliding_attention is not "
                f"supported"
            )
        theta = local.get("rope_theta") or values.get("rope_local_base_freq") or 10_000.0
        return self.config.rope, replace(self.config.rope, theta=float(theta), scaling=())

    def attention(self, read: LayerReader, layer: int, name: str) -> Attention:
        """Read attention with norms of each query and key head."""
        size, eps = self.config.head_size, self.config.norm_eps
        return replace(
            super().attention(read, layer, name),
            rope=1 if self.layer_type(layer) == "sliding_attention" else 0,
            query_norm=read.rms_norm(f"{name}.q_norm", size, eps, is_shifted=True),
            key_norm=read.rms_norm(f"{name}.k_norm", size, eps, is_shifted=True),
        )
