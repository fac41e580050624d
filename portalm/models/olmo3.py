"""OLMo 3: an OLMo 2 with windows in three of every four layers.

OLMo team, "OLMo 3", 2025. A rotary scaling applies only to the layers without a window.
"""

from __future__ import annotations

from dataclasses import replace

from portalm.config import RopeConfig
from portalm.errors import UnsupportedModel
from portalm.layers.attention import Attention
from portalm.models.layer_reader import LayerReader
from portalm.models.olmo2 import Olmo2


class Olmo3(Olmo2):
    """OLMo 3 decoder; see `portalm.models.model.Model`."""

    defaults = {"rms_norm_eps": 1e-5, "rope_theta": 500_000.0, "sliding_window": 4096}
    reads = Olmo2.reads | {"layer_types", "rope_parameters", "sliding_window"}

    def has_window(self, layer: int) -> bool:
        """All layers except every fourth."""
        return (layer + 1) % 4 != 0

    def ropes(self) -> tuple[RopeConfig, ...]:
        """Rotary settings of layers without a window, then of layers with one."""
        local = (self.config.values.get("rope_parameters") or {}).get("sliding_attention") or {}
        if local.get("rope_type", "default") != "default":
            raise UnsupportedModel(
                f"config.json: rope_type {local['rope_type']!r} for sliding_attention is not "
                f"supported"
            )
        theta = float(local.get("rope_theta") or self.config.rope.theta)
        return self.config.rope, replace(self.config.rope, theta=theta, scaling=())

    def attention(self, read: LayerReader, layer: int, name: str) -> Attention:
        """Read attention with the rotary table of the layer's type."""
        attention = super().attention(read, layer, name)
        return replace(attention, rope=0 if attention.spec.sliding_window is None else 1)
