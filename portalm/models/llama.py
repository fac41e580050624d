"""The Llama architecture: Llama 1 to 3, SmolLM2 and what else has its config.

Touvron et al., "LLaMA", 2023. Pre-norm decoder layers of rotary grouped-query attention and a
gated MLP: what a `Decoder` is when nothing is changed.
"""

from __future__ import annotations

from portalm.models.decoder import Decoder


class Llama(Decoder):
    """Functions of a Llama-shaped model; see `portalm.models.model.Model`."""

    reads = frozenset({"attention_bias", "mlp_bias"})
