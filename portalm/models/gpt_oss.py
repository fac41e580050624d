"""GPT-OSS: experts with biases and a clamped gate, attention sinks, windows in half the layers.

OpenAI, "gpt-oss-120b and gpt-oss-20b model card", 2025. In the published checkpoints the experts'
weights are MXFP4 (portalm/quant/mxfp4.py), with the rows of all experts in one matrix.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from portalm.backend import AttentionSpec, Experts
from portalm.layers.attention import Attention
from portalm.layers.mlp import FeedForward
from portalm.layers.moe import MoE, SoftmaxRouter
from portalm.models.decoder import Decoder
from portalm.models.layer_reader import LayerReader


class GptOss(Decoder):
    """GPT-OSS decoder; see `portalm.models.model.Model`."""

    defaults = {
        "attention_bias": True,
        "head_dim": 64,
        "num_experts_per_tok": 4,
        "num_local_experts": 128,
        "rms_norm_eps": 1e-5,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "original_max_position_embeddings": 4096,
            "truncate": False,
        },
        "rope_theta": 150_000.0,
        "sliding_window": 128,
        "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
    }
    reads = frozenset({"attention_bias", "layer_types", "num_local_experts", "sliding_window"})

    def has_window(self, layer: int) -> bool:
        """Every other layer, starting with the first."""
        return layer % 2 == 0

    def spec(self, layer: int) -> AttentionSpec:
        """Attention with a sink in every head."""
        return replace(super().spec(layer), has_sinks=True)

    def attention(self, read: LayerReader, layer: int, name: str) -> Attention:
        """Read attention with the sinks' scores."""
        sinks = read.tensor(f"{name}.sinks", self.config.num_heads).float()
        return replace(super().attention(read, layer, name), sinks=sinks)

    def mlp(self, read: LayerReader, layer: int, name: str) -> FeedForward:
        """Read a router with a bias, and experts; a token's weights sum to 1."""
        values, hidden = self.config.values, self.config.hidden_size
        num_experts = int(values["num_local_experts"])
        experts = self._experts(read, f"{name}.experts", num_experts)
        return MoE(
            router=SoftmaxRouter(
                read.router(f"{name}.router", num_experts, hidden, has_bias=True),
                top_k=int(values["num_experts_per_tok"]),
                is_normalized=True,
            ),
            experts=replace(
                experts,
                swiglu_alpha=float(values["swiglu_alpha"]),
                swiglu_limit=float(values["swiglu_limit"]),
            ),
        )

    def _experts(self, read: LayerReader, name: str, num_experts: int) -> Experts:
        """Read experts in the form that the checkpoint stores them."""
        inner, hidden = self.config.intermediate_size, self.config.hidden_size
        if read.form.has_separate_experts:
            return read.experts(
                name,
                num_experts,
                inner=inner,
                columns=hidden,
                names=("gate_proj", "up_proj", "down_proj"),
                has_bias=True,
            )
        quantized = self.config.values.get("quantization_config") or {}
        is_mxfp4 = quantized.get("quant_method") == "mxfp4"
        return (read.experts_by_rows if is_mxfp4 else read.stacked_experts)(
            name, num_experts, inner=inner, columns=hidden, order=_gate_first
        )


def _gate_first(rows: torch.Tensor) -> torch.Tensor:
    """Reorder rows that alternate gate and up: all gate rows, then all up rows."""
    return torch.cat((rows[0::2], rows[1::2]))
