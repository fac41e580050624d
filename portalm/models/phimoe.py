"""Phi-3.5-MoE: layer norms, biases of attention, and two experts chosen one after the other.

Abdin et al., "Phi-3 technical report", 2024; the router is that of Liu et al., "GRIN:
gradient-informed MoE", 2024, without its randomness in training.
"""

from __future__ import annotations

from typing import Any

from portalm.config import ModelConfig
from portalm.errors import UnsupportedModel
from portalm.layers.mlp import FeedForward
from portalm.layers.moe import MoE, SparseMixerRouter
from portalm.layers.norms import Norm
from portalm.models.decoder import Decoder
from portalm.models.layer_reader import LayerReader


class PhiMoe(Decoder):
    """Phi-3.5-MoE decoder; see `portalm.models.model.Model`."""

    defaults = {
        "lm_head_bias": False,
        "num_experts_per_tok": 2,
        "num_key_value_heads": 8,
        "num_local_experts": 16,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1_000_000.0,
        "router_jitter_noise": 0.01,
    }
    reads = frozenset({"attention_bias", "num_local_experts", "sliding_window"})
    feed_forward = "block_sparse_moe"

    def __init__(self, config: ModelConfig, dtype: str) -> None:
        """Create the model for `config`; raise `UnsupportedModel` for unsupported settings."""
        super().__init__(config, dtype)
        self.has_head_bias = bool(config.values["lm_head_bias"])
        if int(config.values["num_experts_per_tok"]) != 2:
            raise UnsupportedModel(
                f"config.json: num_experts_per_tok is {config.values['num_experts_per_tok']}; "
                f"{config.architecture} supports 2 only"
            )

    @classmethod
    def complete(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Add defaults; longrope has its attention factor as two equal values."""
        values = super().complete(values)
        key = "rope_parameters" if values.get("rope_parameters") else "rope_scaling"
        scaling = dict(values.get(key) or {})
        factors = [scaling.pop(name, None) for name in ("short_mscale", "long_mscale")]
        if factors == [None, None]:
            return values
        if factors[0] != factors[1]:
            raise UnsupportedModel(
                f"config.json: short_mscale and long_mscale are {factors[0]} and {factors[1]}; "
                f"values that differ are not supported"
            )
        return {**values, key: {**scaling, "attention_factor": factors[0]}}

    def has_window(self, layer: int) -> bool:
        """True: every layer has the window, if config.json sets one."""
        return True

    def norm(self, read: LayerReader, name: str) -> Norm:
        """Read a layer norm."""
        return read.layer_norm(name, self.config.hidden_size, self.config.norm_eps)

    def mlp(self, read: LayerReader, layer: int, name: str) -> FeedForward:
        """Read a router and experts."""
        values, hidden = self.config.values, self.config.hidden_size
        num_experts = int(values["num_local_experts"])
        self.activation(frozenset({"silu"}))
        return MoE(
            router=SparseMixerRouter(
                read.router(f"{name}.gate", num_experts, hidden),
                jitter=float(values["router_jitter_noise"]),
            ),
            experts=read.experts(
                f"{name}.experts",
                num_experts,
                inner=self.config.intermediate_size,
                columns=hidden,
                names=("w1", "w3", "w2"),
            ),
        )
