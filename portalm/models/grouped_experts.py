"""Feed-forwards of DeepSeek's kind, which other families have, too: small experts in groups.

DeepSeek-AI, "DeepSeek-V3 technical report", 2024.
"""

from __future__ import annotations

from portalm.layers.mlp import FeedForward
from portalm.layers.moe import GroupRouter, MoE
from portalm.models.decoder import Decoder
from portalm.models.layer_reader import LayerReader


class GroupedExperts(Decoder):
    """A decoder whose layers, except the first ones, have routed experts and shared ones."""

    def mlp(self, read: LayerReader, layer: int, name: str) -> FeedForward:
        """Read a plain feed-forward in the first layers, experts in the others."""
        values, hidden = self.config.values, self.config.hidden_size
        if layer < int(values["first_k_dense_replace"]):
            return super().mlp(read, layer, name)
        self.activation(frozenset({"silu"}))
        inner, num_shared = (
            self._size("moe_intermediate_size"),
            int(values["n_shared_experts"] or 0),
        )
        return MoE(
            router=self.router(read, f"{name}.gate"),
            experts=read.experts(
                f"{name}.experts",
                self._size("n_routed_experts"),
                inner=inner,
                columns=hidden,
                names=("gate_proj", "up_proj", "down_proj"),
            ),
            shared=self.gated_mlp(read, f"{name}.shared_experts", inner * num_shared)
            if num_shared
            else None,
        )

    def router(self, read: LayerReader, name: str) -> GroupRouter:
        """Read a sigmoid router whose load-balancing bias takes part in choosing experts."""
        values, num_experts = self.config.values, self._size("n_routed_experts")
        return GroupRouter(
            weight=read.scores(name, num_experts, self.config.hidden_size),
            bias=read.float32(f"{name}.e_score_correction_bias", num_experts),
            scoring="sigmoid",
            top_k=self._size("num_experts_per_tok"),
            num_groups=self._size("n_group"),
            num_chosen_groups=self._size("topk_group"),
            num_best=2,
            is_normalized=bool(values["norm_topk_prob"]),
            factor=float(values["routed_scaling_factor"]),
        )

    def _size(self, name: str) -> int:
        return int(self.config.values[name])
