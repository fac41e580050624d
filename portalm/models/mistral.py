"""Mistral: a Llama whose tokens see the last `sliding_window` tokens of every layer.

Jiang et al., "Mistral 7B", 2023. Later checkpoints have no window.
"""

from __future__ import annotations

from portalm.models.decoder import Decoder


class Mistral(Decoder):
    """Functions of a Mistral; see `portalm.models.model.Model`."""

    defaults = {"sliding_window": 4096}
    reads = frozenset({"sliding_window"})

    def has_window(self, layer: int) -> bool:
        """Every layer."""
        return True
