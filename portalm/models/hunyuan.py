"""Hunyuan, dense sizes: a Llama with query and key norms after the rotary embedding.

Tencent, "Hunyuan 7B, 4B, 1.8B and 0.5B", 2025. A scaling alpha raises the rotary base
("NTK-aware" scaling: bloc97, 2023).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from portalm.config import ModelConfig
from portalm.errors import UnsupportedModel
from portalm.layers.attention import Attention
from portalm.models.decoder import Decoder
from portalm.models.layer_reader import LayerReader


class HunyuanDense(Decoder):
    """Hunyuan decoder; see `portalm.models.model.Model`."""

    defaults = {"rms_norm_eps": 1e-5, "use_qk_norm": True}
    names = {"head_dim": ("head_dim", "attention_head_dim")}
    reads = frozenset({"attention_bias", "num_experts", "use_qk_norm"})

    def __init__(self, config: ModelConfig, dtype: str) -> None:
        """Create the model for `config`; raise `UnsupportedModel` for unsupported settings."""
        values = config.values
        for name, neutral in (("num_experts", (None, 0, 1)), ("use_cla", (None, False)),
                              ("use_qk_norm", (True,))):  # fmt: skip
            if values.get(name) not in neutral:
                raise UnsupportedModel(
                    f"config.json: {name} is {values[name]!r}, which is not supported for "
                    f"{config.architecture}"
                )
        super().__init__(config, dtype)

    @classmethod
    def complete(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Add defaults; a dynamic scaling with alpha is a larger rotary base, at every length."""
        values = super().complete(values)
        key = "rope_parameters" if values.get("rope_parameters") else "rope_scaling"
        scaling = values.get(key) or {}
        alpha = scaling.get("alpha")
        if (scaling.get("rope_type") or scaling.get("type")) != "dynamic" or not alpha:
            return values
        size = values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"]
        theta = scaling.get("rope_theta") or values.get("rope_theta") or 10_000.0
        theta = float(theta) * float(alpha) ** (size / (size - 2))
        return {**values, "rope_parameters": None, "rope_scaling": None, "rope_theta": theta}

    def attention(self, read: LayerReader, layer: int, name: str) -> Attention:
        """Read attention with norms of each query and key head."""
        size, eps = self.config.head_size, self.config.norm_eps
        return replace(
            super().attention(read, layer, name),
            query_norm=read.rms_norm(f"{name}.query_layernorm", size, eps),
            key_norm=read.rms_norm(f"{name}.key_layernorm", size, eps),
            norms_after_rope=True,
        )
