"""ChatGLM and GLM-4: Llamas that rotate half of each head, in adjacent pairs, gate and up merged.

GLM team, "ChatGLM: a family of large language models from GLM-130B to GLM-4 all tools", 2024.
Checkpoints of 2024 are `Glm`; those of 2025 (GLM-4-0414) also normalize the outputs of attention
and feed-forward. `ChatGLM` is the form in which ChatGLM 2, ChatGLM 3 and GLM-4-9B were published,
with their own code.
"""

from __future__ import annotations

from typing import Any, Literal

from portalm.config import ModelConfig
from portalm.errors import UnsupportedModel
from portalm.layers.blocks import Block, SequentialBlock
from portalm.layers.linear import Linear
from portalm.layers.mlp import FeedForward, GatedMLP
from portalm.models.decoder import Decoder
from portalm.models.layer_reader import LayerReader


class Glm(Decoder):
    """GLM-4 decoder of 2024; see `portalm.models.model.Model`."""

    defaults = {
        "attention_bias": True,
        "head_dim": 128,
        "num_key_value_heads": 2,
        "partial_rotary_factor": 0.5,
        "rms_norm_eps": 1.5625e-7,
    }
    reads = frozenset({"attention_bias", "partial_rotary_factor"})
    is_interleaved = True

    def has_bias(self, part: Literal["qkv", "out", "mlp"]) -> bool:
        """Query, key and value, if config.json has attention_bias."""
        return part == "qkv" and self.config.attention_bias

    def mlp(self, read: LayerReader, layer: int, name: str) -> FeedForward:
        """Read a feed-forward whose checkpoint has gate and up merged."""
        return self.merged_mlp(read, name)


class Glm4(Glm):
    """GLM-4-0414 decoder."""

    def block(self, read: LayerReader, layer: int, name: str) -> Block:
        """Read a layer with norms before and after attention and feed-forward."""
        return SequentialBlock(
            attention_norm=self.norm(read, f"{name}.input_layernorm"),
            attention=self.attention(read, layer, f"{name}.self_attn"),
            attention_out_norm=self.norm(read, f"{name}.post_self_attn_layernorm"),
            mlp_norm=self.norm(read, f"{name}.post_attention_layernorm"),
            mlp=self.mlp(read, layer, f"{name}.mlp"),
            mlp_out_norm=self.norm(read, f"{name}.post_mlp_layernorm"),
        )


class ChatGLM(Glm):
    """ChatGLM 2, ChatGLM 3 and GLM-4-9B decoder, with the keys and tensor names of their code."""

    defaults = {
        "add_bias_linear": False,
        "add_qkv_bias": False,
        "multi_query_attention": False,
        "partial_rotary_factor": 0.5,
        "rms_norm_eps": 1e-5,
        "rope_ratio": 1.0,
    }
    names = {
        "head_dim": ("kv_channels",),
        "intermediate_size": ("ffn_hidden_size",),
        "max_position_embeddings": ("seq_length",),
        "num_hidden_layers": ("num_layers",),
        "num_key_value_heads": ("multi_query_group_num",),
        "rms_norm_eps": ("layernorm_epsilon",),
        "vocab_size": ("padded_vocab_size",),
    }
    nullable = Glm.nullable | {"rope_ratio"}
    embedding = "transformer.embedding.word_embeddings"
    layer_prefix = "transformer.encoder.layers."
    last_norm = "transformer.encoder.final_layernorm"
    head = "transformer.output_layer"
    layer_names = ("input_layernorm", "self_attention", "post_attention_layernorm")
    out_name = "dense"
    optional_prefix = "transformer."

    def __init__(self, config: ModelConfig, dtype: str) -> None:
        """Create the model for `config`; raise `UnsupportedModel` for settings of other models."""
        super().__init__(config, dtype)
        for name, known in _CHATGLM.items():
            if config.values.get(name, known) != known:
                raise UnsupportedModel(
                    f"config.json: {name} is {config.values[name]!r}, which is not supported for "
                    f"{config.architecture}; supported: {known!r}"
                )

    @classmethod
    def complete(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Add defaults; rope_ratio scales the rotary base."""
        values = super().complete(values)
        if not values["multi_query_attention"]:
            values["num_key_value_heads"] = values["num_attention_heads"]
        return {**values, "rope_theta": 10_000.0 * float(values["rope_ratio"] or 1.0)}

    def has_bias(self, part: Literal["qkv", "out", "mlp"]) -> bool:
        """Query, key and value, if config.json has add_qkv_bias; all, if it has add_bias_linear."""
        values = self.config.values
        return bool(values["add_bias_linear"] or (part == "qkv" and values["add_qkv_bias"]))

    def qkv(self, read: LayerReader, name: str) -> Linear:
        """Read query, key and value, which the checkpoint has merged in this order."""
        config = self.config
        return read.linear(
            f"{name}.query_key_value",
            rows=((config.num_heads + 2 * config.num_kv_heads) * config.head_size,),
            columns=config.hidden_size,
            has_bias=self.has_bias("qkv"),
        )

    def mlp(self, read: LayerReader, layer: int, name: str) -> FeedForward:
        """Read a feed-forward whose checkpoint has gate and up merged."""
        hidden, inner = self.config.hidden_size, self.config.intermediate_size
        up, down, has_bias = "dense_h_to_4h", "dense_4h_to_h", self.has_bias("mlp")
        return GatedMLP(
            gate_up=read.linear(
                f"{name}.{up}", rows=(2 * inner,), columns=hidden, has_bias=has_bias
            ),
            down=read.linear(f"{name}.{down}", rows=(hidden,), columns=inner, has_bias=has_bias),
            activation=self.activation(),
        )


_CHATGLM = {
    "apply_residual_connection_post_layernorm": False,
    "original_rope": True,
    "post_layer_norm": True,
    "rmsnorm": True,
}
"""Settings of ChatGLM's code with the values that published checkpoints have."""
