"""Mixtral: a Mistral whose feed-forward is a mixture of experts.

Jiang et al., "Mixtral of experts", 2024.
"""

from __future__ import annotations

from portalm.layers.mlp import FeedForward
from portalm.layers.moe import MoE, SoftmaxRouter
from portalm.models.layer_reader import LayerReader
from portalm.models.mistral import Mistral


class Mixtral(Mistral):
    """Mixtral decoder; see `portalm.models.model.Model`."""

    defaults = {
        "num_experts_per_tok": 2,
        "num_local_experts": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1_000_000.0,
    }
    reads = frozenset({"num_local_experts", "sliding_window"})
    feed_forward = "block_sparse_moe"

    def mlp(self, read: LayerReader, layer: int, name: str) -> FeedForward:
        """Read a router and experts; a token's weights are normalized to sum to 1."""
        values, hidden = self.config.values, self.config.hidden_size
        num_experts = int(values["num_local_experts"])
        self.activation(frozenset({"silu"}))
        return MoE(
            router=SoftmaxRouter(
                read.router(f"{name}.gate", num_experts, hidden),
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
