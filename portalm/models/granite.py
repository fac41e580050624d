"""Granite 3: a Llama with multipliers for embeddings, scores, layer outputs and logits.

IBM, "Granite 3.0 language models", 2024.
"""

from __future__ import annotations

from dataclasses import replace

from portalm.backend import AttentionSpec
from portalm.config import ModelConfig
from portalm.layers.blocks import Block, SequentialBlock
from portalm.models.decoder import Decoder
from portalm.models.layer_reader import LayerReader


class Granite(Decoder):
    """Granite decoder; see `portalm.models.model.Model`."""

    defaults = {
        "attention_multiplier": 1.0,
        "embedding_multiplier": 1.0,
        "logits_scaling": 1.0,
        "residual_multiplier": 1.0,
    }
    reads = frozenset({*defaults, "attention_bias", "mlp_bias"})

    def __init__(self, config: ModelConfig, dtype: str) -> None:
        """Create the model for `config`; raise `UnsupportedModel` for unsupported settings."""
        super().__init__(config, dtype)
        self.embedding_scale = float(config.values["embedding_multiplier"])
        self.logit_scale = 1 / float(config.values["logits_scaling"])

    def spec(self, layer: int) -> AttentionSpec:
        """Attention with the scale `attention_multiplier`."""
        return replace(super().spec(layer), scale=float(self.config.values["attention_multiplier"]))

    def block(self, read: LayerReader, layer: int, name: str) -> Block:
        """Read a layer whose outputs are scaled by `residual_multiplier`."""
        block = super().block(read, layer, name)
        assert isinstance(block, SequentialBlock)
        return replace(block, multiplier=float(self.config.values["residual_multiplier"]))
