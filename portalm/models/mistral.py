"""Mistral: a Llama with a sliding window in every layer.

Jiang et al., "Mistral 7B", 2023. Later checkpoints have no window.
"""

from __future__ import annotations

from portalm.models.decoder import Decoder


class Mistral(Decoder):
    """Mistral decoder; see `portalm.models.model.Model`."""

    defaults = {"sliding_window": 4096}
    reads = frozenset({"sliding_window"})

    def has_window(self, layer: int) -> bool:
        """True: every layer has the window."""
        return True
