"""Phi-3 and Phi-4: Llamas with merged projections in checkpoints, and LongRoPE in some.

Abdin et al., "Phi-3 technical report", 2024. Some apply the rotary embedding to a
part of each head.
"""

from __future__ import annotations

from portalm.layers.linear import Linear
from portalm.layers.mlp import FeedForward
from portalm.models.decoder import Decoder
from portalm.models.layer_reader import LayerReader


class Phi3(Decoder):
    """Phi-3 decoder; see `portalm.models.model.Model`."""

    defaults = {"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096}
    reads = frozenset({"partial_rotary_factor", "sliding_window"})

    def has_window(self, layer: int) -> bool:
        """True: every layer has the window, if config.json sets one."""
        return True

    def qkv(self, read: LayerReader, name: str) -> Linear:
        """Read query, key and value, which the checkpoint has merged in this order."""
        config = self.config
        rows = (config.num_heads + 2 * config.num_kv_heads) * config.head_size
        return read.linear(f"{name}.qkv_proj", rows=(rows,), columns=config.hidden_size)

    def mlp(self, read: LayerReader, layer: int, name: str) -> FeedForward:
        """Read a feed-forward whose checkpoint has gate and up merged."""
        return self.merged_mlp(read, name)
