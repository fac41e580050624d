"""Nemotron and Minitron: layer norms with 1 + weight, squared ReLU, partial rotary embedding.

Parmar et al., "Nemotron-4 15B technical report", 2024.
"""

from __future__ import annotations

from portalm.layers.mlp import FeedForward
from portalm.layers.norms import Norm
from portalm.models.decoder import Decoder
from portalm.models.layer_reader import LayerReader


class Nemotron(Decoder):
    """Nemotron decoder; see `portalm.models.model.Model`."""

    defaults = {"hidden_act": "relu2", "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-5}
    names = {
        "partial_rotary_factor": ("partial_rotary_factor", "rope_percent"),
        "rms_norm_eps": ("norm_eps",),
    }
    reads = frozenset({"attention_bias", "mlp_bias", "partial_rotary_factor"})

    def norm(self, read: LayerReader, name: str) -> Norm:
        """Read a layer norm whose Hugging Face weight is stored minus 1."""
        config = self.config
        return read.layer_norm(name, config.hidden_size, config.norm_eps, is_shifted=True)

    def mlp(self, read: LayerReader, layer: int, name: str) -> FeedForward:
        """Read a feed-forward without a gate."""
        return self.plain_mlp(read, f"{name}.up_proj", f"{name}.down_proj", is_transposed=False)
