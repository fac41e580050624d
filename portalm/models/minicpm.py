"""MiniCPM: Llamas with multipliers for embeddings, layer outputs and logits.

Hu et al., "MiniCPM", 2024, and MiniCPM 4, 2025. MiniCPM 3 has DeepSeek's latent attention, without
experts and with rotated halves.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from portalm.config import ModelConfig
from portalm.errors import UnsupportedModel
from portalm.layers.blocks import Block, SequentialBlock
from portalm.layers.mlp import FeedForward
from portalm.models.decoder import Decoder
from portalm.models.deepseek import DeepseekV3
from portalm.models.layer_reader import LayerReader


class MiniCPM(Decoder):
    """MiniCPM 1, 2 and 4 decoder; see `portalm.models.model.Model`."""

    defaults = {
        "dim_model_base": 1,
        "scale_depth": 1,
        "scale_emb": 1,
        "tie_word_embeddings": True,
    }
    reads = frozenset({"attention_bias"})

    def __init__(self, config: ModelConfig, dtype: str) -> None:
        """Create the model for `config`; raise `UnsupportedModel` for sparse attention."""
        super().__init__(config, dtype)
        if config.values.get("sparse_config"):
            raise UnsupportedModel(
                f"config.json: sparse_config is set, and the sparse attention of "
                f"{config.architecture} is not supported: without it, answers to long texts differ"
            )
        self.embedding_scale, self.logit_scale = _scales(config)

    def block(self, read: LayerReader, layer: int, name: str) -> Block:
        """Read a layer whose outputs are scaled."""
        return _scaled(super().block(read, layer, name), self.config)


class MiniCPM3(DeepseekV3):
    """MiniCPM 3 decoder."""

    defaults = {
        "dim_model_base": 256,
        "kv_lora_rank": 256,
        "q_lora_rank": 768,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 32,
        "rms_norm_eps": 1e-5,
        "rope_interleave": False,
        "scale_depth": 1.4,
        "scale_emb": 12,
        "tie_word_embeddings": True,
    }
    reads = frozenset({"attention_bias"})
    routing = {}

    def __init__(self, config: ModelConfig, dtype: str) -> None:
        """Create the model for `config`; raise `UnsupportedModel` for unsupported settings."""
        super().__init__(config, dtype)
        self.embedding_scale, self.logit_scale = _scales(config)

    @classmethod
    def complete(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Add defaults; values have as many numbers as hidden states have per head."""
        size = values["hidden_size"] // values["num_attention_heads"]
        return super().complete({**values, "v_head_dim": values.get("v_head_dim") or size})

    def block(self, read: LayerReader, layer: int, name: str) -> Block:
        """Read a layer whose outputs are scaled."""
        return _scaled(super().block(read, layer, name), self.config)

    def mlp(self, read: LayerReader, layer: int, name: str) -> FeedForward:
        """Read a feed-forward without experts."""
        return Decoder.mlp(self, read, layer, name)


def _scales(config: ModelConfig) -> tuple[float, float]:
    """Multipliers of embeddings and of logits."""
    values = config.values
    return float(values["scale_emb"]), float(values["dim_model_base"]) / config.hidden_size


def _scaled(block: Block, config: ModelConfig) -> Block:
    assert isinstance(block, SequentialBlock)
    depth = float(config.values["scale_depth"])
    return replace(block, multiplier=depth / math.sqrt(config.num_layers))
