"""Nemotron-Super and other DeciLM models: Llamas searched layer by layer.

Bercovich et al., "Puzzle: distillation-based NAS for inference-optimized LLMs", 2024. A layer may
have no attention or no feed-forward, and feed-forwards differ in width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from portalm.backend import AttentionSpec, KVSpec
from portalm.config import ModelConfig
from portalm.errors import UnsupportedModel
from portalm.layers.blocks import Block, PartialBlock
from portalm.models.decoder import Decoder
from portalm.models.layer_reader import LayerReader


class DeciLM(Decoder):
    """DeciLM decoder; see `portalm.models.model.Model`."""

    reads = frozenset({"attention_bias", "mlp_bias"})

    def __init__(self, config: ModelConfig, dtype: str) -> None:
        """Create the model for `config`; raise `UnsupportedModel` for unsupported layers."""
        blocks = config.values["block_configs"]
        if len(blocks) != config.num_layers:
            raise UnsupportedModel(
                f"config.json: block_configs has {len(blocks)} layers, and num_hidden_layers is "
                f"{config.num_layers}"
            )
        if all(blocks[0][part].get("no_op") for part in ("attention", "ffn")):
            raise UnsupportedModel("config.json: the first of block_configs has no part")
        self._layers = [i for i, block in enumerate(blocks) if not block["attention"].get("no_op")]
        super().__init__(config, dtype)
        self.specs = [self.spec(layer) for layer in self._layers]

    @classmethod
    def complete(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Find the number of KV heads, which all layers with attention share, and a width."""
        values = super().complete(values)
        blocks = values["block_configs"]
        for i, block in enumerate(blocks):
            for part in ("attention", "ffn"):
                _check(i, part, block[part])
        groups = {
            int(block["attention"]["n_heads_in_group"])
            for block in blocks
            if not block["attention"].get("no_op")
        }
        if len(groups) != 1:
            raise UnsupportedModel(
                f"config.json: the layers of block_configs have {sorted(groups)} query heads per "
                f"KV head; layers that differ are not supported, as their caches would too"
            )
        widths = [_width(block, values["hidden_size"]) for block in blocks]
        return {
            **values,
            "num_key_value_heads": values["num_attention_heads"] // groups.pop(),
            "intermediate_size": max(widths),
        }

    def attention_specs(self) -> list[AttentionSpec]:
        """Attention parameters of each layer that has attention."""
        return self.specs

    def kv_spec(self, block_size: int, kv_dtype: str) -> KVSpec:
        """The KV cache of the layers that have attention."""
        return replace(super().kv_spec(block_size, kv_dtype), num_layers=len(self._layers))

    def block(self, read: LayerReader, layer: int, name: str) -> Block:
        """Read a layer with the parts that it has."""
        block = self.config.values["block_configs"][layer]
        width = _width(block, self.config.hidden_size)
        has_attention = layer in self._layers
        return PartialBlock(
            attention_norm=self.norm(read, f"{name}.input_layernorm") if has_attention else None,
            attention=self.attention(read, self._layers.index(layer), f"{name}.self_attn")
            if has_attention
            else None,
            mlp_norm=self.norm(read, f"{name}.post_attention_layernorm") if width else None,
            mlp=self.gated_mlp(read, f"{name}.mlp", width) if width else None,
        )


def _check(layer: int, part: str, values: Mapping[str, Any]) -> None:
    """Refuse a part that neither is absent nor has the usual form."""
    unknown = [
        key
        for key, value in values.items()
        if value and key not in ("ffn_mult", "intermediate_size", "n_heads_in_group", "no_op",
                                 "hidden_act")
    ]  # fmt: skip
    if unknown:
        raise UnsupportedModel(
            f"config.json: {part} of layer {layer} in block_configs has {unknown[0]} "
            f"{values[unknown[0]]!r}, which is not supported"
        )


def _width(block: Mapping[str, Any], hidden_size: int) -> int:
    """Width of the feed-forward: 0 without one; ffn_mult is rounded up to a multiple of 256."""
    ffn = block["ffn"]
    if ffn.get("no_op"):
        return 0
    if ffn.get("intermediate_size"):
        return int(ffn["intermediate_size"])
    return -(-int(2 * float(ffn["ffn_mult"]) * hidden_size / 3) // 256) * 256
