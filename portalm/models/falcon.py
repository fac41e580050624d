"""Falcon: one key and value for all queries or for groups of them, parallel layers, ALiBi in some.

Almazrouei et al., "The Falcon series of open language models", 2023. Falcon-7B has a norm for both
parts of a layer, 40B and 180B ("new decoder architecture") one for each, and Falcon-RW is
sequential with ALiBi instead of a rotation.
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
from portalm.models.layer_reader import LayerReader, qkv_of_groups


class Falcon(Decoder):
    """Functions of a Falcon; see `portalm.models.model.Model`."""

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
    reads = frozenset({"alibi"})
    embedding = "transformer.word_embeddings"
    layer_prefix = "transformer.h."
    last_norm = "transformer.ln_f"
    out_name = "dense"

    @classmethod
    def complete(cls, values: dict[str, Any]) -> dict[str, Any]:
        """With defaults; the number of KV heads counts only in the new architecture."""
        values = super().complete(values)
        values.setdefault("intermediate_size", 4 * int(values["hidden_size"]))
        if values["new_decoder_architecture"]:
            return values
        num_kv_heads = 1 if values["multi_query"] else values["num_attention_heads"]
        return {**values, "num_key_value_heads": num_kv_heads}

    def has_bias(self, part: Literal["qkv", "out", "mlp"]) -> bool:
        """All or none."""
        return bool(self.config.values["bias"])

    def spec(self, layer: int) -> AttentionSpec:
        """ALiBi is added before scores are scaled."""
        spec = super().spec(layer)
        if not self.config.values["alibi"]:
            return spec
        slopes = tuple(slope * spec.scale for slope in alibi_slopes(spec.num_heads))
        return replace(spec, alibi_slopes=slopes)

    def norm(self, read: LayerReader, name: str) -> Norm:
        """A layer norm."""
        return read.layer_norm(name, self.config.hidden_size, self.config.norm_eps)

    def block(self, read: LayerReader, layer: int, name: str) -> Block:
        """Sequential, or parallel with one norm or two."""
        values = self.config.values
        is_new = values["new_decoder_architecture"]
        attention = self.attention(read, layer, f"{name}.self_attention")
        up, down = f"{name}.mlp.dense_h_to_4h", f"{name}.mlp.dense_4h_to_h"
        mlp = self.plain_mlp(read, up, down, is_transposed=False)
        if not values["parallel_attn"]:
            if is_new:
                raise UnsupportedModel(
                    "config.json: parallel_attn false with new_decoder_architecture is no Falcon "
                    "that is known"
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
                f"config.json: num_ln_in_parallel_attn is {num_norms}, which no Falcon that is "
                f"known has"
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
        """Nothing is rotated where there is ALiBi."""
        attention = super().attention(read, layer, name)
        return replace(attention, rope=None) if self.config.values["alibi"] else attention

    def qkv(self, read: LayerReader, name: str) -> Linear:
        """Merged in the checkpoint, KV head by KV head."""
        config = self.config
        return read.linear(
            f"{name}.query_key_value",
            rows=((config.num_heads + 2 * config.num_kv_heads) * config.head_size,),
            columns=config.hidden_size,
            has_bias=self.has_bias("qkv"),
            order=qkv_of_groups(config.num_kv_heads, config.head_size),
        )


def alibi_slopes(num_heads: int) -> tuple[float, ...]:
    """A slope for each head: 2^(-8 i / n) where n is a power of 2.

    Press et al., "Train short, test long", 2022: other numbers of heads take every other slope of
    the next power of 2 for what is missing.
    """
    n = 2 ** math.floor(math.log2(num_heads))
    slopes = [2 ** (-8 * i / n) for i in range(1, n + 1)]
    between = [2 ** (-4 * i / n) for i in range(1, 2 * (num_heads - n), 2)]
    return tuple(slopes + between)
