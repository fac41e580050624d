"""Falcon: multi-query or grouped-query attention, parallel layers, ALiBi in some models.

Almazrouei et al., "The Falcon series of open language models", 2023. Falcon-7B has one norm for
attention and feed-forward; 40B and 180B ("new decoder architecture") have one for each; Falcon-RW
has sequential layers, and ALiBi instead of a rotary embedding.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal

from portalm.backend import AttentionSpec
from portalm.errors import UnsupportedModel
from portalm.layers.attention import Attention
from portalm.layers.blocks import Block, ParallelBlock, SequentialBlock
from portalm.layers.linear import Linear
from portalm.layers.norms import Norm
from portalm.models.decoder import Decoder
from portalm.models.layer_reader import LayerReader, ungroup_qkv


class Falcon(Decoder):
    """Falcon decoder; see `portalm.models.model.Model`."""

    defaults = {
        "alibi": False,
        "bias": False,
        "hidden_act": "gelu",
        "max_position_embeddings": 2048,
        "multi_query": True,
        "new_decoder_architecture": False,
        "parallel_attn": True,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    }
    names = {
        "hidden_act": ("activation",),
        "hidden_size": ("n_embed", "hidden_size"),
        "intermediate_size": ("ffn_hidden_size",),
        "num_attention_heads": ("num_attention_heads", "n_head"),
        "num_hidden_layers": ("num_hidden_layers", "n_layer"),
        "num_key_value_heads": ("num_kv_heads", "n_head_kv"),
        "rms_norm_eps": ("layer_norm_epsilon",),
    }
    reads = frozenset({"alibi"})
    embedding = "transformer.word_embeddings"
    layer_prefix = "transformer.h."
    last_norm = "transformer.ln_f"
    out_name = "dense"

    @classmethod
    def complete(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Add defaults; only the new decoder architecture has a configurable number of KV heads."""
        values = super().complete(values)
        values.setdefault("intermediate_size", 4 * int(values["hidden_size"]))
        if values["new_decoder_architecture"]:
            return values
        num_kv_heads = 1 if values["multi_query"] else values["num_attention_heads"]
        return {**values, "num_key_value_heads": num_kv_heads}

    def has_bias(self, part: Literal["qkv", "out", "mlp"]) -> bool:
        """All linear layers, if config.json has bias."""
        return bool(self.config.values["bias"])

    def spec(self, layer: int) -> AttentionSpec:
        """Attention, with ALiBi slopes scaled as the scores are, if config.json has alibi."""
        spec = super().spec(layer)
        if not self.config.values["alibi"]:
            return spec
        slopes = tuple(slope * spec.scale for slope in alibi_slopes(spec.num_heads))
        return replace(spec, alibi_slopes=slopes)

    def norm(self, read: LayerReader, name: str) -> Norm:
        """Read a layer norm."""
        return read.layer_norm(name, self.config.hidden_size, self.config.norm_eps)

    def block(self, read: LayerReader, layer: int, name: str) -> Block:
        """Read a sequential layer, or a parallel one with one norm or two."""
        values = self.config.values
        is_new = values["new_decoder_architecture"]
        attention = self.attention(read, layer, f"{name}.self_attention")
        up, down = f"{name}.mlp.dense_h_to_4h", f"{name}.mlp.dense_4h_to_h"
        mlp = self.plain_mlp(read, up, down, is_transposed=False)
        if not values["parallel_attn"]:
            if is_new:
                raise UnsupportedModel(
                    "config.json: parallel_attn false is not supported with "
                    "new_decoder_architecture true"
                )
            return SequentialBlock(
                attention_norm=self.norm(read, f"{name}.input_layernorm"),
                attention=attention,
                mlp_norm=self.norm(read, f"{name}.post_attention_layernorm"),
                mlp=mlp,
            )
        num_norms = values.get("num_ln_in_parallel_attn") or (2 if is_new else 1)
        if num_norms not in ((1, 2) if is_new else (1,)):
            raise UnsupportedModel(
                f"config.json: num_ln_in_parallel_attn is {num_norms}, which is not supported; "
                f"supported: 1, and 2 with new_decoder_architecture"
            )
        if num_norms == 2:
            return ParallelBlock(
                attention_norm=self.norm(read, f"{name}.ln_attn"),
                attention=attention,
                mlp_norm=self.norm(read, f"{name}.ln_mlp"),
                mlp=mlp,
            )
        norm = self.norm(read, f"{name}.input_layernorm")
        return ParallelBlock(attention_norm=norm, attention=attention, mlp=mlp)

    def attention(self, read: LayerReader, layer: int, name: str) -> Attention:
        """Read attention; ALiBi replaces the rotary embedding."""
        attention = super().attention(read, layer, name)
        return replace(attention, rope=None) if self.config.values["alibi"] else attention

    def qkv(self, read: LayerReader, name: str) -> Linear:
        """Read query, key and value, which the checkpoint has merged and grouped by KV head."""
        config = self.config
        return read.linear(
            f"{name}.query_key_value",
            rows=((config.num_heads + 2 * config.num_kv_heads) * config.head_size,),
            columns=config.hidden_size,
            has_bias=self.has_bias("qkv"),
            order=ungroup_qkv(config.num_kv_heads, config.head_size),
        )


def alibi_slopes(num_heads: int) -> tuple[float, ...]:
    """ALiBi slope of each head: 2^(-8 i / n) if n is a power of 2.

    Press et al., "Train short, test long", 2022. Any other number of heads takes the slopes of the
    previous power of 2, and for the rest every other slope of the next power of 2.
    """
    n = 2 ** math.floor(math.log2(num_heads))
    slopes = [2 ** (-8 * i / n) for i in range(1, n + 1)]
    between = [2 ** (-4 * i / n) for i in range(1, 2 * (num_heads - n), 2)]
    return tuple(slopes + between)
