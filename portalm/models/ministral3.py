"""Ministral 3: a Mistral whose queries grow with the logarithm of their position.

Mistral AI, "Ministral 3", 2025. The scale of queries is that of Llama 4 (Nakanishi,
"Scalable-softmax is superior for attention", 2025).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from portalm.layers.attention import Attention, PositionScale
from portalm.models.layer_reader import LayerReader
from portalm.models.mistral import Mistral

_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1_000_000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale_all_dim": 1.0,
    "mscale": 1.0,
    "llama_4_scaling_beta": 0.1,
}


class Ministral3(Mistral):
    """Ministral 3 decoder; see `portalm.models.model.Model`."""

    defaults = {"head_dim": 128, "num_key_value_heads": 8, "rms_norm_eps": 1e-5}
    reads = frozenset({"sliding_window"})

    @classmethod
    def complete(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Add defaults; rope_parameters also has the settings of the queries' scale."""
        values = super().complete(values)
        rope = dict(values.get("rope_parameters") or _ROPE)
        rope.pop("max_position_embeddings", None)
        beta, original = rope.pop("llama_4_scaling_beta", None), "original_max_position_embeddings"
        return {
            **values,
            "rope_parameters": rope,
            "query_scaling": None if not beta else (float(beta), int(rope[original])),
        }

    def attention(self, read: LayerReader, layer: int, name: str) -> Attention:
        """Read attention whose queries are scaled by position."""
        attention = super().attention(read, layer, name)
        scaling = self.config.values["query_scaling"]
        if scaling is None:
            return attention
        return replace(attention, query_scale=PositionScale(beta=scaling[0], length=scaling[1]))
