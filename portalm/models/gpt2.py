"""GPT-2: learned positions, layer norms, and transposed linear weights in checkpoints.

Radford et al., "Language models are unsupervised multitask learners", 2019.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch

from portalm.backend import AttentionSpec, Backend, StepMeta, Weights
from portalm.config import RopeConfig
from portalm.layers.attention import Attention
from portalm.layers.blocks import Block, SequentialBlock
from portalm.layers.norms import Norm
from portalm.models.decoder import Decoder
from portalm.models.layer_reader import LayerReader


class GPT2(Decoder):
    """GPT-2 decoder; see `portalm.models.model.Model`."""

    defaults = {"hidden_act": "gelu_new", "rms_norm_eps": 1e-5, "tie_word_embeddings": True}
    names = {
        "hidden_act": ("activation_function",),
        "hidden_size": ("hidden_size", "n_embd"),
        "intermediate_size": ("n_inner",),
        "max_position_embeddings": ("max_position_embeddings", "n_positions"),
        "num_attention_heads": ("num_attention_heads", "n_head"),
        "num_hidden_layers": ("num_hidden_layers", "n_layer"),
        "rms_norm_eps": ("layer_norm_epsilon",),
    }
    reads = frozenset({"scale_attn_by_inverse_layer_idx"})
    unused = (r"\.attn\.(masked_)?bias$",)  # the causal mask
    optional_prefix = "transformer."
    embedding = "transformer.wte"
    layer_prefix = "transformer.h."
    last_norm = "transformer.ln_f"

    @classmethod
    def complete(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Add defaults; n_inner is 4 * hidden_size if not set."""
        values = super().complete(values)
        values["num_key_value_heads"] = values["num_attention_heads"]
        return {"intermediate_size": 4 * int(values["hidden_size"]), **values}

    def has_bias(self, part: Literal["qkv", "out", "mlp"]) -> bool:
        """True: every linear layer has a bias."""
        return True

    def spec(self, layer: int) -> AttentionSpec:
        """Attention; some checkpoints divide the scale by the layer's number."""
        spec = super().spec(layer)
        if not self.config.values.get("scale_attn_by_inverse_layer_idx"):
            return spec
        return replace(spec, scale=spec.scale / (layer + 1))

    def ropes(self) -> tuple[RopeConfig, ...]:
        """Empty: positions are learned."""
        return ()

    def build(self, read: LayerReader) -> Weights:
        """Read all weights, including the position embeddings."""
        shape = (self.config.max_position, self.config.hidden_size)
        positions = read.tensor("transformer.wpe.weight", *shape)
        return {**super().build(read), "positions": positions}

    def norm(self, read: LayerReader, name: str) -> Norm:
        """Read a layer norm."""
        return read.layer_norm(name, self.config.hidden_size, self.config.norm_eps)

    def block(self, read: LayerReader, layer: int, name: str) -> Block:
        """Read a layer with norms before attention and feed-forward."""
        return SequentialBlock(
            attention_norm=self.norm(read, f"{name}.ln_1"),
            attention=self.attention(read, layer, f"{name}.attn"),
            mlp_norm=self.norm(read, f"{name}.ln_2"),
            mlp=self.plain_mlp(read, f"{name}.mlp.c_fc", f"{name}.mlp.c_proj", is_transposed=True),
        )

    def attention(self, read: LayerReader, layer: int, name: str) -> Attention:
        """Read attention without a rotary embedding."""
        hidden = self.config.hidden_size
        return Attention(
            layer=layer,
            spec=self.specs[layer],
            qkv=read.linear(
                f"{name}.c_attn",
                rows=(3 * hidden,),
                columns=hidden,
                has_bias=True,
                is_transposed=True,
            ),
            out=read.linear(
                f"{name}.c_proj",
                rows=(hidden,),
                columns=hidden,
                has_bias=True,
                is_transposed=True,
            ),
            rope=None,
        )

    def embed(
        self, backend: Backend, weights: Weights, token_ids: torch.Tensor, meta: StepMeta
    ) -> torch.Tensor:
        """Add token and position embeddings: int32 [T] ids -> [T, C]."""
        tokens = backend.embed(token_ids, weights["embedding"])
        return tokens + backend.embed(meta.positions, weights["positions"])
