"""The Llama architecture: Llama 1 to 3, SmolLM2 and other models with its config.

Touvron et al., "LLaMA", 2023. Pre-norm decoder layers of rotary grouped-query attention and a
gated MLP, which is `Decoder` unchanged.
"""

from __future__ import annotations

from portalm.models.decoder import Decoder


class Llama(Decoder):
    """Llama decoder; see `portalm.models.model.Model`."""

    reads = frozenset({"attention_bias", "mlp_bias"})
