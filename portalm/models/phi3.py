"""Phi-3 and Phi-4: Llamas whose checkpoints have merged projections; long texts by LongRoPE.

Abdin et al., "Phi-3 technical report", 2024. Some rotate only a part of each head.
"""

from __future__ import annotations

from portalm.layers.linear import Linear
from portalm.layers.mlp import FeedForward
from portalm.models.decoder import Decoder
from portalm.models.layer_reader import LayerReader


class Phi3(Decoder):
    """Functions of a Phi-3; see `portalm.models.model.Model`."""

    defaults = {"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096}
    reads = frozenset({"sliding_window"})

    def has_window(self, layer: int) -> bool:
        """Every layer, where the config has one."""
        return True

    def qkv(self, read: LayerReader, name: str) -> Linear:
        """Merged in the checkpoint, in our order."""
        config = self.config
        rows = (config.num_heads + 2 * config.num_kv_heads) * config.head_size
        return read.linear(f"{name}.qkv_proj", rows=(rows,), columns=config.hidden_size)

    def mlp(self, read: LayerReader, layer: int, name: str) -> FeedForward:
        """Gate and up are merged too."""
        return self.merged_mlp(read, name)
