"""Seed-OSS: a Llama with biases of query, key and value, and another bias of attention's output.

ByteDance Seed, "Seed-OSS open-source models", 2025.
"""

from __future__ import annotations

from typing import Literal

from portalm.models.decoder import Decoder


class SeedOss(Decoder):
    """Seed-OSS decoder; see `portalm.models.model.Model`."""

    defaults = {"attention_bias": True, "head_dim": 128, "num_key_value_heads": 8}
    reads = frozenset({"attention_bias", "mlp_bias"})

    def has_bias(self, part: Literal["qkv", "out", "mlp"]) -> bool:
        """Attention's output has a setting of its own, attention_out_bias."""
        if part == "out":
            return bool(self.config.values.get("attention_out_bias", False))
        return super().has_bias(part)
