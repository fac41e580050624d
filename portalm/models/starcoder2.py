"""StarCoder2: a Llama with layer norms, biases, a feed-forward without a gate, and a window.

Lozhkov et al., "StarCoder 2 and The Stack v2", 2024.
"""

from __future__ import annotations

from typing import Literal

from portalm.layers.mlp import FeedForward
from portalm.layers.norms import Norm
from portalm.models.decoder import Decoder
from portalm.models.layer_reader import LayerReader


class Starcoder2(Decoder):
    """StarCoder2 decoder; see `portalm.models.model.Model`."""

    defaults = {
        "hidden_act": "gelu_pytorch_tanh",
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "use_bias": True,
    }
    names = {"rms_norm_eps": ("norm_epsilon",)}
    reads = frozenset({"sliding_window"})

    def has_bias(self, part: Literal["qkv", "out", "mlp"]) -> bool:
        """All linear layers, if config.json has use_bias."""
        return bool(self.config.values["use_bias"])

    def has_window(self, layer: int) -> bool:
        """True: every layer has the window, if config.json sets one."""
        return True

    def norm(self, read: LayerReader, name: str) -> Norm:
        """Read a layer norm."""
        return read.layer_norm(name, self.config.hidden_size, self.config.norm_eps)

    def mlp(self, read: LayerReader, layer: int, name: str) -> FeedForward:
        """Read a feed-forward without a gate."""
        return self.plain_mlp(read, f"{name}.c_fc", f"{name}.c_proj", is_transposed=False)
