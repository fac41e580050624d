"""Qwen2-MoE and Qwen3-MoE: Qwens with small experts, and in Qwen2-MoE a shared expert.

Yang et al., "Qwen2 technical report", 2024, and "Qwen3 technical report", 2025.
"""

from __future__ import annotations

from typing import Any, Literal

from portalm.layers.mlp import FeedForward
from portalm.layers.moe import MoE, SoftmaxRouter
from portalm.models.decoder import Decoder
from portalm.models.layer_reader import LayerReader
from portalm.models.qwen import Qwen2, Qwen3


def _experts(model: Decoder, read: LayerReader, layer: int, name: str) -> MoE | None:
    """Read the experts of a layer; None if the layer has a plain feed-forward."""
    values, hidden = model.config.values, model.config.hidden_size
    num_experts = int(values["num_experts"])
    is_dense = layer in (values.get("mlp_only_layers") or ())
    if is_dense or not num_experts or (layer + 1) % int(values["decoder_sparse_step"]):
        return None
    model.activation(frozenset({"silu"}))
    shared = int(values.get("shared_expert_intermediate_size") or 0)
    return MoE(
        router=SoftmaxRouter(
            read.router(f"{name}.gate", num_experts, hidden),
            top_k=int(values["num_experts_per_tok"]),
            is_normalized=bool(values["norm_topk_prob"]),
        ),
        experts=read.experts(
            f"{name}.experts",
            num_experts,
            inner=int(values["moe_intermediate_size"]),
            columns=hidden,
            names=("gate_proj", "up_proj", "down_proj"),
        ),
        shared=model.gated_mlp(read, f"{name}.shared_expert", shared) if shared else None,
        shared_gate=read.router(f"{name}.shared_expert_gate", 1, hidden) if shared else None,
    )


class Qwen2Moe(Qwen2):
    """Qwen2-MoE decoder; see `portalm.models.model.Model`."""

    defaults = {
        **Qwen2.defaults,
        "decoder_sparse_step": 1,
        "moe_intermediate_size": 1408,
        "norm_topk_prob": False,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "qkv_bias": True,
        "shared_expert_intermediate_size": 5632,
    }
    nullable = Qwen2.nullable | {"shared_expert_intermediate_size"}
    reads = Qwen2.reads | {"num_experts"}

    def has_bias(self, part: Literal["qkv", "out", "mlp"]) -> bool:
        """Query, key and value, if config.json has qkv_bias."""
        return part == "qkv" and bool(self.config.values["qkv_bias"])

    def has_window(self, layer: int) -> bool:
        """Every other layer below number `max_window_layers`."""
        return layer % 2 == 0 and layer < int(self.config.values.get("max_window_layers", 28))

    def mlp(self, read: LayerReader, layer: int, name: str) -> FeedForward:
        """Read experts, or a plain feed-forward."""
        return _experts(self, read, layer, name) or super().mlp(read, layer, name)


class Qwen3Moe(Qwen3):
    """Qwen3-MoE decoder; see `portalm.models.model.Model`."""

    defaults = {
        "use_sliding_window": False,
        "decoder_sparse_step": 1,
        "moe_intermediate_size": 768,
        "norm_topk_prob": False,
        "num_experts": 128,
        "num_experts_per_tok": 8,
    }
    reads = frozenset(
        {"attention_bias", "num_experts", "num_local_experts", "sliding_window",
         "use_sliding_window"}
    )  # fmt: skip

    @classmethod
    def complete(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Add defaults; newer files name the number of experts num_local_experts."""
        values = super().complete(values)
        return {**values, "num_experts": values.get("num_local_experts") or values["num_experts"]}

    def has_window(self, layer: int) -> bool:
        """True: every layer has the window, if config.json sets one."""
        return True

    def mlp(self, read: LayerReader, layer: int, name: str) -> FeedForward:
        """Read experts, or a plain feed-forward."""
        return _experts(self, read, layer, name) or super().mlp(read, layer, name)
