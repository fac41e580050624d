"""ERNIE 4.5, text only: Llamas that rotate adjacent pairs, dense or with experts.

Baidu, "ERNIE 4.5 technical report", 2025.
"""

from __future__ import annotations

from typing import Literal

from portalm.layers.mlp import FeedForward
from portalm.layers.moe import GroupRouter, MoE
from portalm.models.decoder import Decoder
from portalm.models.layer_reader import LayerReader


class Ernie45(Decoder):
    """ERNIE 4.5 decoder; see `portalm.models.model.Model`."""

    defaults = {
        "head_dim": 128,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "tie_word_embeddings": True,
        "use_bias": False,
    }
    is_interleaved = True

    def has_bias(self, part: Literal["qkv", "out", "mlp"]) -> bool:
        """All linear layers, if config.json has use_bias."""
        return bool(self.config.values["use_bias"])


class Ernie45Moe(Ernie45):
    """ERNIE 4.5 decoder with experts."""

    defaults = {
        **{name: value for name, value in Ernie45.defaults.items() if name != "head_dim"},
        "moe_intermediate_size": 1536,
        "moe_layer_end_index": -1,
        "moe_layer_interval": 1,
        "moe_layer_start_index": 1,
        "moe_num_shared_experts": 2,
        "num_experts": 64,
        "num_experts_per_tok": 6,
        "num_key_value_heads": 4,
    }
    names = {"num_experts": ("moe_num_experts",), "num_experts_per_tok": ("moe_k",)}
    reads = frozenset({"num_experts"})

    def has_experts(self, layer: int) -> bool:
        """True if the layer has experts instead of a plain feed-forward."""
        values = self.config.values
        last = int(values["moe_layer_end_index"])
        last = self.config.num_layers - 1 if last == -1 else last
        is_within = int(values["moe_layer_start_index"]) <= layer <= last
        return is_within and (layer + 1) % int(values["moe_layer_interval"]) == 0

    def mlp(self, read: LayerReader, layer: int, name: str) -> FeedForward:
        """Read experts and shared ones, or a plain feed-forward."""
        if not self.has_experts(layer):
            return super().mlp(read, layer, name)
        values, hidden = self.config.values, self.config.hidden_size
        num_experts, inner = int(values["num_experts"]), int(values["moe_intermediate_size"])
        num_shared = int(values["moe_num_shared_experts"] or 0)
        self.activation(frozenset({"silu"}))
        bias = f"{name}.moe_statics.e_score_correction_bias"
        return MoE(
            router=GroupRouter(
                weight=read.scores(f"{name}.gate", num_experts, hidden),
                bias=read.float32(bias, 1, num_experts)[0],
                scoring="softmax",
                top_k=int(values["num_experts_per_tok"]),
                is_normalized=True,
            ),
            experts=read.experts(
                f"{name}.experts",
                num_experts,
                inner=inner,
                columns=hidden,
                names=("gate_proj", "up_proj", "down_proj"),
            ),
            shared=self.gated_mlp(read, f"{name}.shared_experts", inner * num_shared)
            if num_shared
            else None,
        )
