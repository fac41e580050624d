"""Arcee AFM: a Llama whose feed-forward has no gate and uses squared ReLU.

Arcee AI, "AFM-4.5B", 2025; So et al., "Primer", 2021, for the activation.
"""

from __future__ import annotations

from portalm.layers.mlp import FeedForward
from portalm.models.decoder import Decoder
from portalm.models.layer_reader import LayerReader


class Arcee(Decoder):
    """Arcee AFM decoder; see `portalm.models.model.Model`."""

    defaults = {"hidden_act": "relu2", "rms_norm_eps": 1e-5}
    reads = frozenset({"attention_bias", "mlp_bias"})

    def mlp(self, read: LayerReader, layer: int, name: str) -> FeedForward:
        """Read a feed-forward without a gate."""
        return self.plain_mlp(read, f"{name}.up_proj", f"{name}.down_proj", is_transposed=False)
