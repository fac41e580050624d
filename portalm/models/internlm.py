"""InternLM 2 and 3: Llamas with other tensor names, or with biases that config.json switches.

InternLM team, "InternLM2 technical report", 2024; InternLM 3, 2025. InternLM 2 and 2.5 store query,
key and value in one matrix, grouped by KV head.
"""

from __future__ import annotations

from typing import Literal

from portalm.layers.linear import Linear
from portalm.models.decoder import Decoder
from portalm.models.layer_reader import LayerReader, ungroup_qkv


class InternLM2(Decoder):
    """InternLM 2 and 2.5 decoder; see `portalm.models.model.Model`."""

    defaults = {"bias": True}
    embedding = "model.tok_embeddings"
    head = "output"
    layer_names = ("attention_norm", "attention", "ffn_norm")
    feed_forward = "feed_forward"
    out_name = "wo"
    mlp_names = ("w1", "w3", "w2")

    def has_bias(self, part: Literal["qkv", "out", "mlp"]) -> bool:
        """Attention projections, if config.json has bias."""
        return part != "mlp" and bool(self.config.values["bias"])

    def qkv(self, read: LayerReader, name: str) -> Linear:
        """Read query, key and value, which the checkpoint has merged and grouped by KV head."""
        config = self.config
        return read.linear(
            f"{name}.wqkv",
            rows=((config.num_heads + 2 * config.num_kv_heads) * config.head_size,),
            columns=config.hidden_size,
            has_bias=self.has_bias("qkv"),
            order=ungroup_qkv(config.num_kv_heads, config.head_size),
        )


class InternLM3(Decoder):
    """InternLM 3 decoder."""

    defaults = {"bias": False, "qkv_bias": False}

    def has_bias(self, part: Literal["qkv", "out", "mlp"]) -> bool:
        """Query, key and value, if config.json has qkv_bias; the others, if it has bias."""
        return bool(self.config.values["qkv_bias" if part == "qkv" else "bias"])
