"""OLMoE: a Llama with query and key norms over all heads, and many small experts.

Muennighoff et al., "OLMoE: open mixture-of-experts language models", 2024.
"""

from __future__ import annotations

from portalm.layers.attention import Attention
from portalm.layers.mlp import FeedForward
from portalm.layers.moe import MoE, SoftmaxRouter
from portalm.models.decoder import Decoder
from portalm.models.layer_reader import LayerReader
from portalm.models.olmo2 import with_norms_of_all_heads


class Olmoe(Decoder):
    """OLMoE decoder; see `portalm.models.model.Model`."""

    defaults = {
        "norm_topk_prob": False,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "rms_norm_eps": 1e-5,
    }
    reads = frozenset({"attention_bias", "num_experts", "num_local_experts"})

    def attention(self, read: LayerReader, layer: int, name: str) -> Attention:
        """Read attention with query and key norms over all heads."""
        return with_norms_of_all_heads(
            super().attention(read, layer, name), read, name, self.config
        )

    def mlp(self, read: LayerReader, layer: int, name: str) -> FeedForward:
        """Read a router and experts."""
        values, hidden = self.config.values, self.config.hidden_size
        num_experts = int(values["num_experts"])
        self.activation(frozenset({"silu"}))
        return MoE(
            router=SoftmaxRouter(
                read.router(f"{name}.gate", num_experts, hidden),
                top_k=int(values["num_experts_per_tok"]),
                is_normalized=bool(values["norm_topk_prob"]),
            ),
            experts=read.experts(
                f"{name}.experts",
                num_experts,
                inner=self.config.intermediate_size,
                columns=hidden,
                names=("gate_proj", "up_proj", "down_proj"),
            ),
        )
