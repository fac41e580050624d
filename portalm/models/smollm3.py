"""SmolLM3: a Llama without rotary embedding in every fourth layer.

Bakouch et al., "SmolLM3", 2025, after Yang et al., "Rope to Nope and back again", 2025.
"""

from __future__ import annotations

from dataclasses import replace

from portalm.layers.attention import Attention
from portalm.models.decoder import Decoder
from portalm.models.layer_reader import LayerReader


class SmolLM3(Decoder):
    """SmolLM3 decoder; see `portalm.models.model.Model`."""

    defaults = {
        "num_key_value_heads": 4,
        "rope_theta": 2_000_000.0,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
    }
    reads = frozenset(
        {"attention_bias", "layer_types", "mlp_bias", "no_rope_layers", "sliding_window",
         "use_sliding_window"}
    )  # fmt: skip

    def has_rope(self, layer: int) -> bool:
        """True if the layer has a rotary embedding: no_rope_layers has a 1 for it."""
        listed = self.config.values.get("no_rope_layers")
        if listed is not None:
            return bool(listed[layer])
        return (layer + 1) % int(self.config.values.get("no_rope_layer_interval", 4)) != 0

    def has_window(self, layer: int) -> bool:
        """Layers without a rotary embedding, if config.json sets a window."""
        return not self.has_rope(layer)

    def attention(self, read: LayerReader, layer: int, name: str) -> Attention:
        """Read attention, without a rotary embedding where the layer has none."""
        return replace(
            super().attention(read, layer, name), rope=0 if self.has_rope(layer) else None
        )
