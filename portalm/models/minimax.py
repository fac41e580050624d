"""MiniMax-M2: experts chosen by sigmoid scores and a bias, partial rotary embedding, query norms.

MiniMax, "MiniMax-M2", 2025. Query and key norms take all heads of a token as one vector.
"""

from __future__ import annotations

from typing import Any

from portalm.layers.attention import Attention
from portalm.layers.mlp import FeedForward
from portalm.layers.moe import GroupRouter, MoE
from portalm.models.decoder import Decoder
from portalm.models.layer_reader import LayerReader
from portalm.models.olmo2 import with_norms_of_all_heads


class MiniMaxM2(Decoder):
    """MiniMax-M2 decoder; see `portalm.models.model.Model`."""

    defaults = {
        "head_dim": 128,
        "num_experts_per_tok": 8,
        "num_key_value_heads": 8,
        "num_local_experts": 256,
        "rope_theta": 5_000_000.0,
    }
    reads = frozenset({"num_experts", "num_local_experts", "partial_rotary_factor", "use_qk_norm"})
    feed_forward = "block_sparse_moe"

    @classmethod
    def complete(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Add defaults; config.json gives the rotated part of a head as rotary_dim."""
        values = super().complete(values)
        if values.get("rotary_dim") and values.get("partial_rotary_factor") is None:
            values["partial_rotary_factor"] = values["rotary_dim"] / values["head_dim"]
        return values

    def attention(self, read: LayerReader, layer: int, name: str) -> Attention:
        """Read attention with query and key norms over all heads."""
        return with_norms_of_all_heads(
            super().attention(read, layer, name), read, name, self.config
        )

    def mlp(self, read: LayerReader, layer: int, name: str) -> FeedForward:
        """Read a router with its bias, and experts."""
        values, hidden = self.config.values, self.config.hidden_size
        num_experts = int(values["num_local_experts"])
        self.activation(frozenset({"silu"}))
        return MoE(
            router=GroupRouter(
                weight=read.scores(f"{name}.gate", num_experts, hidden),
                bias=read.float32(f"{name}.e_score_correction_bias", num_experts),
                scoring="sigmoid",
                top_k=int(values["num_experts_per_tok"]),
                is_normalized=True,
            ),
            experts=read.experts(
                f"{name}.experts",
                num_experts,
                inner=self.config.intermediate_size,
                columns=hidden,
                names=("w1", "w3", "w2"),
            ),
        )
