"""DeepSeek V2 and V3: latent attention, small experts in groups, and shared experts.

DeepSeek-AI, "DeepSeek-V2" and "DeepSeek-V3 technical report", 2024; R1 is a V3. Layers that predict
further tokens (`num_nextn_predict_layers`, after the last of `num_hidden_layers`) are not loaded:
answers do not depend on them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch

from portalm.backend import AttentionSpec, KVSpec
from portalm.config import ModelConfig, RopeConfig
from portalm.errors import UnsupportedModel
from portalm.layers.blocks import Block, SequentialBlock
from portalm.layers.latent_attention import LatentAttention
from portalm.layers.moe import GroupRouter
from portalm.models.grouped_experts import GroupedExperts
from portalm.models.layer_reader import LayerReader
from portalm.models.loader.checkpoint import RowOrder

_INNER_EPS = 1e-6
"""Epsilon of the norms of latent vectors and compressed queries, in every checkpoint."""


class DeepseekV3(GroupedExperts):
    """DeepSeek-V3 decoder; see `portalm.models.model.Model`."""

    defaults = {
        "first_k_dense_replace": 3,
        "kv_lora_rank": 512,
        "moe_intermediate_size": 2048,
        "n_group": 8,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_experts_per_tok": 8,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "rope_interleave": True,
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "topk_group": 4,
        "topk_method": "noaux_tc",
        "v_head_dim": 128,
    }
    nullable = GroupedExperts.nullable | {"n_shared_experts", "q_lora_rank"}
    reads = frozenset(
        {"attention_bias", "first_k_dense_replace", "n_routed_experts", "num_experts",
         "num_local_experts"}
    )  # fmt: skip
    routing: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "scoring_func": ("sigmoid",),
        "topk_method": ("noaux_tc",),
        "moe_layer_freq": (1,),
    }
    """Supported values of config.json, the default first."""

    def __init__(self, config: ModelConfig, dtype: str) -> None:
        """Create the model for `config`; raise `UnsupportedModel` for unsupported routing."""
        super().__init__(config, dtype)
        for name, known in self.routing.items():
            if config.values.get(name, known[0]) not in known:
                raise UnsupportedModel(
                    f"config.json: {name} is {config.values[name]!r}, which is not supported for "
                    f"{config.architecture}; supported: {', '.join(map(str, known))}"
                )

    @classmethod
    def complete(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Add defaults; attention and cache have one KV head, which is the latent vector."""
        values = super().complete(values)
        size = int(values["kv_lora_rank"]) + int(values["qk_rope_head_dim"])
        return {**values, "head_dim": size, "num_key_value_heads": 1}

    def ropes(self) -> tuple[RopeConfig, ...]:
        """Rotary settings of the keys' rotary part."""
        return (replace(self.config.rope, rotary_dim=self._size("qk_rope_head_dim")),)

    def spec(self, layer: int) -> AttentionSpec:
        """Attention over the latent vector, with the scale of full heads and YaRN's temperature."""
        size = self._size("qk_nope_head_dim") + self._size("qk_rope_head_dim")
        return replace(
            super().spec(layer),
            scale=size**-0.5 * _temperature(self.config.rope),
            value_size=self._size("kv_lora_rank"),
        )

    def kv_spec(self, block_size: int, kv_dtype: str) -> KVSpec:
        """The KV cache of the model: values are the first numbers of keys."""
        return replace(super().kv_spec(block_size, kv_dtype), shares_values=True)

    def block(self, read: LayerReader, layer: int, name: str) -> Block:
        """Read layer number `layer`, whose tensors' names begin with `name`."""
        return SequentialBlock(
            attention_norm=self.norm(read, f"{name}.input_layernorm"),
            attention=self.latent_attention(read, layer, f"{name}.self_attn"),
            mlp_norm=self.norm(read, f"{name}.post_attention_layernorm"),
            mlp=self.mlp(read, layer, f"{name}.mlp"),
        )

    def latent_attention(self, read: LayerReader, layer: int, name: str) -> LatentAttention:
        """Read attention; the two parts of kv_b_proj are applied to queries and to outputs."""
        config, heads = self.config, self.config.num_heads
        plain, rotary, value, rank = (
            self._size(n)
            for n in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank")
        )
        query_rank = int(config.values["q_lora_rank"] or 0)
        has_bias = self.has_bias("qkv")
        compressing = [f"{name}.q_a_proj"] if query_rank else []
        up = read.matrix(f"{name}.kv_b_proj", heads * (plain + value), rank)
        up = up.view(heads, plain + value, rank)
        return LatentAttention(
            layer=layer,
            spec=self.specs[layer],
            rotary_dim=rotary,
            down=read.linear(
                *compressing,
                f"{name}.kv_a_proj_with_mqa",
                rows=(*([query_rank] if query_rank else []), rank + rotary),
                columns=config.hidden_size,
                has_bias=has_bias,
            ),
            query=read.linear(
                f"{name}.{'q_b_proj' if query_rank else 'q_proj'}",
                rows=(heads * (plain + rotary),),
                columns=query_rank or config.hidden_size,
                order=_plain_first(heads, plain),
            ),
            query_norm=read.rms_norm(f"{name}.q_a_layernorm", query_rank, _INNER_EPS)
            if query_rank
            else None,
            latent_norm=read.rms_norm(f"{name}.kv_a_layernorm", rank, _INNER_EPS),
            key_heads=read.heads(up[:, :plain].transpose(1, 2)),
            value_heads=read.heads(up[:, plain:]),
            out=read.linear(
                f"{name}.o_proj",
                rows=(config.hidden_size,),
                columns=heads * value,
                has_bias=self.has_bias("out"),
            ),
            is_interleaved=bool(config.values["rope_interleave"]),
        )


class DeepseekV2(DeepseekV3):
    """DeepSeek-V2 decoder; see `portalm.models.model.Model`."""

    defaults = {
        **DeepseekV3.defaults,
        "first_k_dense_replace": 0,
        "moe_intermediate_size": 1407,
        "n_group": None,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
        "scoring_func": "softmax",
        "topk_group": None,
        "topk_method": "greedy",
    }
    reads = DeepseekV3.reads | {"mlp_bias"}
    # norm_topk_prob true: no published checkpoint has it, and published implementations disagree
    # on whether routed_scaling_factor then applies
    routing = {
        "scoring_func": ("softmax",),
        "topk_method": ("greedy", "group_limited_greedy"),
        "moe_layer_freq": (1,),
        "norm_topk_prob": (False, None),
    }

    def router(self, read: LayerReader, name: str) -> GroupRouter:
        """Read a softmax router; a group's score is that of its best expert."""
        values = self.config.values
        has_groups = values["topk_method"] == "group_limited_greedy"
        return GroupRouter(
            weight=read.scores(name, self._size("n_routed_experts"), self.config.hidden_size),
            scoring="softmax",
            top_k=self._size("num_experts_per_tok"),
            num_groups=self._size("n_group") if has_groups else 1,
            num_chosen_groups=self._size("topk_group") if has_groups else 1,
            num_best=1,
            is_normalized=False,
            factor=float(values["routed_scaling_factor"]),
        )


def _plain_first(heads: int, plain: int) -> RowOrder:
    """Reorder rows grouped by head: the plain rows of all heads, then all rotary rows."""

    def order(rows: torch.Tensor) -> torch.Tensor:
        by_head = rows.view(heads, -1, *rows.shape[1:])
        parts = (by_head[:, :plain], by_head[:, plain:])
        return torch.cat([part.flatten(0, 1) for part in parts])

    return order


def _temperature(rope: RopeConfig) -> float:
    """Factor by which YaRN's mscale_all_dim scales scores (Peng et al., "YaRN", 2023)."""
    scaling = dict(rope.scaling)
    weight, factor = scaling.get("mscale_all_dim"), scaling.get("factor")
    if not weight or not factor or float(factor) <= 1:
        return 1.0
    return float((0.1 * float(weight) * math.log(float(factor)) + 1.0) ** 2)
