"""Phi-1, 1.5 and 2: parallel layers with one layer norm, biases, partial rotary embedding.

Gunasekar et al., "Textbooks are all you need", 2023; Javaheripi et al., "Phi-2", 2023.
"""

from __future__ import annotations

from typing import Literal

from portalm.layers.blocks import Block, ParallelBlock
from portalm.layers.norms import Norm
from portalm.models.decoder import Decoder
from portalm.models.layer_reader import LayerReader


class Phi(Decoder):
    """Phi-2 decoder; see `portalm.models.model.Model`."""

    defaults = {
        "hidden_act": "gelu_new",
        "partial_rotary_factor": 0.5,
        "rms_norm_eps": 1e-5,
    }
    names = {"rms_norm_eps": ("layer_norm_eps",)}
    reads = frozenset({"partial_rotary_factor"})
    last_norm = "model.final_layernorm"
    out_name = "dense"
    has_head_bias = True

    def has_bias(self, part: Literal["qkv", "out", "mlp"]) -> bool:
        """True: all linear layers have biases."""
        return True

    def norm(self, read: LayerReader, name: str) -> Norm:
        """Read a layer norm."""
        return read.layer_norm(name, self.config.hidden_size, self.config.norm_eps)

    def block(self, read: LayerReader, layer: int, name: str) -> Block:
        """Read a parallel layer with one norm."""
        return ParallelBlock(
            attention_norm=self.norm(read, f"{name}.input_layernorm"),
            attention=self.attention(read, layer, f"{name}.self_attn"),
            mlp=self.plain_mlp(read, f"{name}.mlp.fc1", f"{name}.mlp.fc2", is_transposed=False),
        )
