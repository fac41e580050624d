"""Apertus: query and key norms, and a feed-forward without a gate that learns its activation.

Project Apertus, "Apertus: democratizing open and compliant LLMs", 2025. The activation is xIELU:
Huang and Schlag, "Deriving activation functions using integration", 2024.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from portalm.errors import UnsupportedModel
from portalm.layers.attention import Attention
from portalm.layers.mlp import FeedForward, XieluMLP
from portalm.models.decoder import Decoder
from portalm.models.layer_reader import LayerReader

_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 12_000_000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 8192,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}


class Apertus(Decoder):
    """Apertus decoder; see `portalm.models.model.Model`."""

    defaults = {"hidden_act": "xielu", "rms_norm_eps": 1e-5, "rope_theta": 12_000_000.0}
    reads = frozenset({"attention_bias"})
    layer_names = ("attention_layernorm", "self_attn", "feedforward_layernorm")

    @classmethod
    def complete(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Add defaults; without rotary settings the context is scaled by 8."""
        values = super().complete(values)
        if values.get("rope_parameters") is None and values.get("rope_scaling") is None:
            values["rope_parameters"] = _ROPE
        return values

    def attention(self, read: LayerReader, layer: int, name: str) -> Attention:
        """Read attention with norms of each query and key head."""
        size, eps = self.config.head_size, self.config.norm_eps
        return replace(
            super().attention(read, layer, name),
            query_norm=read.rms_norm(f"{name}.q_norm", size, eps),
            key_norm=read.rms_norm(f"{name}.k_norm", size, eps),
        )

    def mlp(self, read: LayerReader, layer: int, name: str) -> FeedForward:
        """Read a feed-forward and the parameters of its activation."""
        hidden, inner = self.config.hidden_size, self.config.intermediate_size
        if self.config.values["hidden_act"] != "xielu":
            raise UnsupportedModel(
                f"config.json: hidden_act {self.config.values['hidden_act']!r} is not supported "
                f"for {self.config.architecture}; supported: xielu"
            )
        act = f"{name}.act_fn"
        return XieluMLP.of(
            read.linear(f"{name}.up_proj", rows=(inner,), columns=hidden),
            read.linear(f"{name}.down_proj", rows=(hidden,), columns=inner),
            alpha_p=read.float32(f"{act}.alpha_p", 1),
            alpha_n=read.float32(f"{act}.alpha_n", 1),
            beta=read.float32(f"{act}.beta"),
            eps=read.float32(f"{act}.eps"),
        )
