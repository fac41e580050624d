"""GLM-4.5 and 4.6: grouped-query attention with biases, and DeepSeek's kind of experts.

GLM team, "GLM-4.5: agentic, reasoning, and coding foundation models", 2025. A layer after the last
one predicts further tokens; it is not loaded.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from portalm.layers.attention import Attention
from portalm.models.grouped_experts import GroupedExperts
from portalm.models.layer_reader import LayerReader


class Glm4Moe(GroupedExperts):
    """GLM-4.5 decoder; see `portalm.models.model.Model`."""

    defaults = {
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 1408,
        "n_group": 1,
        "n_routed_experts": 128,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_experts_per_tok": 8,
        "num_key_value_heads": 8,
        "num_nextn_predict_layers": 1,
        "partial_rotary_factor": 0.5,
        "rms_norm_eps": 1e-5,
        "routed_scaling_factor": 1.0,
        "topk_group": 1,
        "use_qk_norm": False,
    }
    names = {"num_nextn_predict_layers": ("num_mtp_layers",)}
    reads = frozenset(
        {"attention_bias", "first_k_dense_replace", "n_routed_experts", "num_local_experts",
         "partial_rotary_factor", "use_qk_norm"}
    )  # fmt: skip

    def has_bias(self, part: Literal["qkv", "out", "mlp"]) -> bool:
        """Query, key and value, if config.json has attention_bias."""
        return part == "qkv" and self.config.attention_bias

    def attention(self, read: LayerReader, layer: int, name: str) -> Attention:
        """Read attention, with norms of each head if config.json has use_qk_norm."""
        attention = super().attention(read, layer, name)
        if not self.config.values["use_qk_norm"]:
            return attention
        size, eps = self.config.head_size, self.config.norm_eps
        return replace(
            attention,
            query_norm=read.rms_norm(f"{name}.q_norm", size, eps),
            key_norm=read.rms_norm(f"{name}.k_norm", size, eps),
        )
