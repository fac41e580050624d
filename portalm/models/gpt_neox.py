"""GPT-NeoX and Pythia: partial rotary embedding, attention and feed-forward in parallel.

Black et al., "GPT-NeoX-20B", 2022; Biderman et al., "Pythia", 2023.
"""

from __future__ import annotations

from typing import Any, Literal

from portalm.layers.blocks import Block, ParallelBlock, SequentialBlock
from portalm.layers.linear import Linear
from portalm.layers.norms import Norm
from portalm.models.decoder import Decoder
from portalm.models.layer_reader import LayerReader, ungroup_qkv


class GPTNeoX(Decoder):
    """GPT-NeoX decoder; see `portalm.models.model.Model`."""

    defaults = {
        "attention_bias": True,
        "hidden_act": "gelu",
        "partial_rotary_factor": 0.25,
        "rms_norm_eps": 1e-5,
        "use_parallel_residual": True,
    }
    names = {
        "partial_rotary_factor": ("rotary_pct",),
        "rms_norm_eps": ("layer_norm_eps",),
        "rope_theta": ("rotary_emb_base",),
    }
    reads = frozenset({"attention_bias", "partial_rotary_factor"})
    unused = (r"\.attention\.(masked_)?bias$",)  # the causal mask
    embedding = "gpt_neox.embed_in"
    layer_prefix = "gpt_neox.layers."
    last_norm = "gpt_neox.final_layer_norm"
    head = "embed_out"
    out_name = "dense"

    @classmethod
    def complete(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Add defaults; there are as many KV heads as query heads."""
        values = super().complete(values)
        return {**values, "num_key_value_heads": values["num_attention_heads"]}

    def has_bias(self, part: Literal["qkv", "out", "mlp"]) -> bool:
        """Feed-forward layers always; attention, if config.json has attention_bias."""
        return part == "mlp" or self.config.attention_bias

    def norm(self, read: LayerReader, name: str) -> Norm:
        """Read a layer norm."""
        return read.layer_norm(name, self.config.hidden_size, self.config.norm_eps)

    def block(self, read: LayerReader, layer: int, name: str) -> Block:
        """Read a parallel or sequential layer; both kinds have two norms."""
        is_parallel = self.config.values["use_parallel_residual"]
        return (ParallelBlock if is_parallel else SequentialBlock)(
            attention_norm=self.norm(read, f"{name}.input_layernorm"),
            attention=self.attention(read, layer, f"{name}.attention"),
            mlp_norm=self.norm(read, f"{name}.post_attention_layernorm"),
            mlp=self.plain_mlp(
                read,
                f"{name}.mlp.dense_h_to_4h",
                f"{name}.mlp.dense_4h_to_h",
                is_transposed=False,
            ),
        )

    def qkv(self, read: LayerReader, name: str) -> Linear:
        """Read query, key and value, which the checkpoint has merged and grouped by head."""
        config = self.config
        return read.linear(
            f"{name}.query_key_value",
            rows=(3 * config.hidden_size,),
            columns=config.hidden_size,
            has_bias=self.has_bias("qkv"),
            order=ungroup_qkv(config.num_heads, config.head_size),
        )
