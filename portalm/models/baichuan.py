"""Baichuan 1 and 2: Llamas with merged query, key and value; the large sizes have ALiBi.

Yang et al., "Baichuan 2: open large-scale language models", 2023. The 7B models have a rotary
embedding, the 13B models ALiBi. Baichuan 2 scales the rows of the output head to length 1.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from portalm.backend import AttentionSpec
from portalm.config import ModelConfig
from portalm.errors import UnsupportedModel
from portalm.layers.attention import Attention
from portalm.layers.linear import Linear
from portalm.models.decoder import Decoder
from portalm.models.falcon import alibi_slopes
from portalm.models.layer_reader import LayerReader


class Baichuan(Decoder):
    """Baichuan decoder; see `portalm.models.model.Model`."""

    names = {"max_position_embeddings": ("max_position_embeddings", "model_max_length")}
    reads = frozenset({"alibi"})

    def __init__(self, config: ModelConfig, dtype: str) -> None:
        """Create the model for `config`; raise `UnsupportedModel` for unsupported settings."""
        super().__init__(config, dtype)
        # only the config of Baichuan 2 has this training setting
        self.has_normalized_head = "z_loss_weight" in config.values
        if config.values["alibi"] != (config.num_heads > 32):
            raise UnsupportedModel(
                f"config.json: {config.num_heads} attention heads "
                f"{'without' if config.values['alibi'] else 'with'} max_position_embeddings: "
                f"Baichuan's 7B models have 32 heads and that key, its 13B models 40 heads and "
                f"ALiBi instead"
            )

    @classmethod
    def complete(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Add defaults; configs of models with ALiBi have no max_position_embeddings."""
        has_rope = values.get("max_position_embeddings") is not None
        return {"alibi": not has_rope, **super().complete(values)}

    def spec(self, layer: int) -> AttentionSpec:
        """Attention, with ALiBi slopes in the 13B models."""
        spec = super().spec(layer)
        if not self.config.values["alibi"]:
            return spec
        return replace(spec, alibi_slopes=alibi_slopes(spec.num_heads))

    def attention(self, read: LayerReader, layer: int, name: str) -> Attention:
        """Read attention; ALiBi replaces the rotary embedding."""
        attention = super().attention(read, layer, name)
        return replace(attention, rope=None) if self.config.values["alibi"] else attention

    def qkv(self, read: LayerReader, name: str) -> Linear:
        """Read query, key and value, which the checkpoint has merged in this order."""
        hidden = self.config.hidden_size
        return read.linear(f"{name}.W_pack", rows=(3 * hidden,), columns=hidden)
