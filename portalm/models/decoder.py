"""The base class of decoder families, which override what is different.

`Decoder` itself is a Llama with Hugging Face's tensor names. `build` reads the weights layer by
layer; run without a checkpoint, it also lists the tensors that the model has (`shapes`).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import torch

from portalm.backend import KV, AttentionSpec, Backend, KVSpec, StepMeta, Weights
from portalm.config import ModelConfig, RopeConfig, Task
from portalm.errors import UnsupportedModel
from portalm.layers.attention import Attention
from portalm.layers.blocks import Block, SequentialBlock, add_norm
from portalm.layers.linear import Linear
from portalm.layers.mlp import (
    ACTIVATIONS,
    GATED,
    MLP,
    PLAIN,
    Activation,
    FeedForward,
    GatedMLP,
)
from portalm.layers.norms import Norm
from portalm.layers.rope import cos_sin_table
from portalm.models.layer_reader import LayerReader, NoDevice, ShapeRecorder
from portalm.models.loader.checkpoint import Checkpoint, LoadProgress, TensorReader
from portalm.models.loader.unread import check_all_read, check_tied
from portalm.models.model import AS_CAST, Quantization, bytes_of
from portalm.models.registry import has_head
from portalm.models.text_part import OTHER_PARTS, text_name

logger = logging.getLogger(__name__)

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "alibi": (False,),
    "attention_bias": (False,),
    "attention_multiplier": (),
    "attn_logit_softcapping": (),
    "clip_qkv": (),
    "embedding_multiplier": (1.0,),
    "final_logit_softcapping": (),
    "first_k_dense_replace": (0,),
    "layer_types": (),
    "logit_scale": (1.0,),
    "logits_scaling": (1.0,),
    "mlp_bias": (False,),
    "n_routed_experts": (0,),
    "no_rope_layers": (),
    "partial_rotary_factor": (1.0,),
    "num_experts": (0,),
    "num_local_experts": (0,),
    "qk_layernorm": (False,),
    "query_pre_attn_scalar": (),
    "residual_multiplier": (1.0,),
    "rope_parameters": (),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "sliding_window": (),
    "use_sliding_window": (True,),
    "use_bidirectional_attention": (False,),
    "use_qk_norm": (False,),
}
"""Keys of config.json that change what a model computes, with their neutral values. Null is always
neutral. Any other value needs the key in the family's `reads`."""


class Decoder:
    """A decoder-only model; see `portalm.models.model.Model`."""

    tasks: tuple[Task, ...] = ("generate", "embed")

    # families override these attributes, and the methods below
    defaults: ClassVar[Mapping[str, Any]] = {}
    """Defaults for keys that config.json does not set."""
    names: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """Names that the family's config.json has for a common key, in order of precedence. The common
    key itself comes last unless it is listed. Names of other families are never read."""
    nullable: ClassVar[frozenset[str]] = frozenset(
        {"head_dim", "num_key_value_heads", "original_max_position_embeddings",
         "partial_rotary_factor", "rope_theta", "sliding_window"}
    )  # fmt: skip
    """Keys of `defaults` with a number that may also be null."""
    reads: ClassVar[frozenset[str]] = frozenset()
    """Keys of `_NEUTRAL` that the family has code for."""
    unused: ClassVar[tuple[str, ...]] = ()
    """Regular expressions of tensor names that some checkpoints have and no answer depends on."""
    embedding = "model.embed_tokens"
    layer_prefix = "model.layers."
    last_norm = "model.norm"
    head = "lm_head"
    layer_names = ("input_layernorm", "self_attn", "post_attention_layernorm")
    """Names within a layer of the norm before attention, attention, and the feed-forward's norm."""
    out_name = "o_proj"
    feed_forward = "mlp"
    mlp_names = ("gate_proj", "up_proj", "down_proj")
    """Names of gate, up and down of a gated feed-forward."""
    optional_prefix = "model."
    """Prefix of all tensor names, which some checkpoints leave out."""
    is_interleaved = False
    """Rotary pairs are adjacent: (0, 1), (2, 3), ... See `Attention.is_interleaved`."""
    embedding_scale = 1.0
    logit_scale = 1.0
    has_head_bias = False
    """The output head has a bias."""
    has_normalized_head = False
    """The rows of the output head are scaled to length 1."""
    logit_cap: float | None = None
    """Logits become cap * tanh(logit / cap); None: no cap."""

    def __init__(self, config: ModelConfig, dtype: str) -> None:
        """Create the model for `config`, with weights and activations in `dtype`.

        Raises:
            UnsupportedModel: the config has a setting that the family does not support.
        """
        self.config = config
        self.dtype = dtype
        self._shapes: dict[str, tuple[int, ...]] = {}
        if config.pooling.is_purpose or not has_head(config.architecture):
            self.tasks = ("embed",)  # the checkpoint may have no output head
        for name, default in self.defaults.items():
            _check_number(name, config.values.get(name), default, name in self.nullable)
        for name, neutral in _NEUTRAL.items():
            value = _value(name, config.values)
            if name in self.reads or value is None or value in neutral or _is_off(name, config):
                continue
            raise UnsupportedModel(
                f"config.json: {name} is {value!r}, which is not supported for "
                f"{config.architecture}: ignoring it would make its answers wrong"
            )
        self.specs = [self.spec(layer) for layer in range(config.num_layers)]

    @classmethod
    def complete(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Add the family's defaults to the `values` of a config.json, under the common keys."""
        return {**cls.defaults, **values, **common_values(values, cls.names)}

    def activation(self, known: frozenset[Activation] = GATED) -> Activation:
        """The feed-forward's activation, from config.json's hidden_act; must be in `known`."""
        name = self.config.values.get("hidden_act", "silu")
        found = ACTIVATIONS.get(str(name))
        if found not in known:
            raise UnsupportedModel(
                f"config.json: hidden_act {name!r} is not supported for "
                f"{self.config.architecture}; supported: "
                f"{', '.join(n for n, a in ACTIVATIONS.items() if a in known)}"
            )
        return found

    def layer_type(self, layer: int) -> str:
        """A layer's type, from config.json's layer_types: sliding_attention or full_attention."""
        kinds = self.config.values.get("layer_types") or self.layer_types()
        kind = str(kinds[layer])
        if kind not in ("sliding_attention", "full_attention"):
            raise UnsupportedModel(
                f"config.json: layer_types has {kind!r}, which is not supported for "
                f"{self.config.architecture}; supported: sliding_attention, full_attention"
            )
        if kind == "sliding_attention" and self.config.sliding_window is None:
            raise UnsupportedModel(
                "config.json: layer_types has 'sliding_attention', but sliding_window is not set"
            )
        return kind

    def layer_types(self) -> list[str]:
        """Types of all layers according to `has_window`, for a config.json without layer_types."""
        has_window = self.config.sliding_window is not None
        return [
            "sliding_attention" if has_window and self.has_window(layer) else "full_attention"
            for layer in range(self.config.num_layers)
        ]

    def has_window(self, layer: int) -> bool:
        """True if the layer has config.json's sliding window."""
        return False

    def has_bias(self, part: Literal["qkv", "out", "mlp"]) -> bool:
        """True if these linear layers have biases."""
        return self.config.mlp_bias if part == "mlp" else self.config.attention_bias

    # -- shapes -------------------------------------------------------------------------------

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of all tensors of a Hugging Face checkpoint."""
        if not self._shapes:  # computed once: models with many experts have tens of thousands
            recorder = ShapeRecorder()
            self.build(LayerReader(recorder, NoDevice(), self.dtype))
            self._shapes = recorder.shapes
        return dict(self._shapes)

    def weight_bytes(self) -> int:
        """Bytes of all weights in `dtype`; a tied head is stored in addition to the embedding."""
        shapes = self.shapes()
        if self.config.tie_word_embeddings and "generate" in self.tasks:
            shapes[f"{self.head}.weight"] = shapes[f"{self.embedding}.weight"]
        return bytes_of(shapes, self.dtype)

    def spec(self, layer: int) -> AttentionSpec:
        """Parameters of a layer's attention."""
        config = self.config
        is_sliding = self.layer_type(layer) == "sliding_attention"
        return AttentionSpec(
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_size=config.head_size,
            scale=config.head_size**-0.5,
            sliding_window=config.sliding_window if is_sliding else None,
        )

    def attention_specs(self) -> list[AttentionSpec]:
        """Attention parameters of each layer."""
        return self.specs

    def kv_spec(self, block_size: int, kv_dtype: str) -> KVSpec:
        """The KV cache that the model needs."""
        return KVSpec(
            num_layers=self.config.num_layers,
            num_kv_heads=self.config.num_kv_heads,
            head_size=self.config.head_size,
            block_size=block_size,
            dtype=kv_dtype,
        )

    def ropes(self) -> tuple[RopeConfig, ...]:
        """Rotary settings; `Attention.rope` is an index into them."""
        return (self.config.rope,)

    # -- loading ------------------------------------------------------------------------------

    def load(
        self,
        checkpoint: Checkpoint,
        backend: Backend,
        *,
        quantization: Quantization = AS_CAST,
        progress: LoadProgress | None = None,
    ) -> Weights:
        """Read all weights: the result of `build`, and the rotary tables as "ropes"."""
        rename = self._rename(checkpoint)
        reader = TensorReader(checkpoint, len(checkpoint.names()), rename=rename, progress=progress)
        weights = self.build(LayerReader(reader, backend, self.dtype, quantization))
        head = rename(f"{self.head}.weight")
        if self.config.tie_word_embeddings:
            check_tied(checkpoint, head, rename(f"{self.embedding}.weight"))
        unused = [*self.unused]
        if "generate" not in self.tasks:
            unused.append(f"^{re.escape(head)}$")
        if self.config.text_part_of is not None:
            unused += OTHER_PARTS
            logger.warning(
                "only the text part of %s is loaded: images are not read", self.config.text_part_of
            )
        check_all_read(checkpoint, unused=unused)
        config = self.config
        weights["ropes"] = [
            cos_sin_table(rope, head_size=config.head_size, max_position=config.max_position).to(
                backend.device()
            )
            for rope in self.ropes()
        ]
        return weights

    def _rename(self, checkpoint: Checkpoint) -> Callable[[str], str]:
        """Return a function from the model's name of a tensor to the checkpoint's."""
        prefix, first = self.optional_prefix, f"{self.embedding}.weight"
        names = set(checkpoint.names())
        if self.config.text_part_of is not None:
            return lambda name: text_name(name, names)
        if first in names or first.removeprefix(prefix) not in names:
            return str
        return lambda name: name.removeprefix(prefix)

    def build(self, read: LayerReader) -> Weights:
        """Read weights by name: embedding, layers, norm, head."""
        config = self.config
        shape = (config.vocab_size, config.hidden_size)
        is_tied = config.tie_word_embeddings
        embedding = read.tensor(f"{self.embedding}.weight", *shape)
        weights: Weights = {
            "embedding": embedding,
            "layers": [
                self.block(read, i, f"{self.layer_prefix}{i}") for i in range(config.num_layers)
            ],
            "norm": self.norm(read, self.last_norm),
        }
        if "generate" in self.tasks:
            weights["head"] = read.head(
                f"{self.embedding if is_tied else self.head}.weight",
                *shape,
                tied=embedding if is_tied else None,
                is_normalized=self.has_normalized_head,
            )
            if self.has_head_bias:
                weights["head_bias"] = read.float32(f"{self.head}.bias", config.vocab_size)
        return weights

    def norm(self, read: LayerReader, name: str) -> Norm:
        """Read a norm of hidden states."""
        return read.rms_norm(name, self.config.hidden_size, self.config.norm_eps)

    def block(self, read: LayerReader, layer: int, name: str) -> Block:
        """Read layer number `layer`, whose tensors' names begin with `name`."""
        attention_norm, attention, mlp_norm = self.layer_names
        return SequentialBlock(
            attention_norm=self.norm(read, f"{name}.{attention_norm}"),
            attention=self.attention(read, layer, f"{name}.{attention}"),
            mlp_norm=self.norm(read, f"{name}.{mlp_norm}"),
            mlp=self.mlp(read, layer, f"{name}.{self.feed_forward}"),
        )

    def attention(self, read: LayerReader, layer: int, name: str) -> Attention:
        """Read a layer's attention."""
        config = self.config
        return Attention(
            layer=layer,
            spec=self.specs[layer],
            qkv=self.qkv(read, name),
            out=read.linear(
                f"{name}.{self.out_name}",
                rows=(config.hidden_size,),
                columns=config.num_heads * config.head_size,
                has_bias=self.has_bias("out"),
            ),
            is_interleaved=self.is_interleaved,
        )

    def qkv(self, read: LayerReader, name: str) -> Linear:
        """Read query, key and value projections, merged into one."""
        config = self.config
        query, kv = config.num_heads * config.head_size, config.num_kv_heads * config.head_size
        return read.linear(
            *(f"{name}.{part}_proj" for part in "qkv"),
            rows=(query, kv, kv),
            columns=config.hidden_size,
            has_bias=self.has_bias("qkv"),
        )

    def mlp(self, read: LayerReader, layer: int, name: str) -> FeedForward:
        """Read a layer's feed-forward."""
        return self.gated_mlp(read, name, self.config.intermediate_size)

    def gated_mlp(self, read: LayerReader, name: str, inner: int) -> GatedMLP:
        """Read a feed-forward with a gate; `inner` is its width."""
        hidden, has_bias = self.config.hidden_size, self.has_bias("mlp")
        gate, up, down = (f"{name}.{part}" for part in self.mlp_names)
        return GatedMLP(
            gate_up=read.linear(
                gate,
                up,
                rows=(inner, inner),
                columns=hidden,
                has_bias=has_bias,
            ),
            down=read.linear(down, rows=(hidden,), columns=inner, has_bias=has_bias),
            activation=self.activation(),
        )

    def merged_mlp(self, read: LayerReader, name: str) -> GatedMLP:
        """Read a feed-forward without biases, with gate and up merged, gate rows first."""
        hidden, inner = self.config.hidden_size, self.config.intermediate_size
        return GatedMLP(
            gate_up=read.linear(f"{name}.gate_up_proj", rows=(2 * inner,), columns=hidden),
            down=read.linear(f"{name}.down_proj", rows=(hidden,), columns=inner),
            activation=self.activation(),
        )

    def plain_mlp(self, read: LayerReader, up: str, down: str, *, is_transposed: bool) -> MLP:
        """Read a feed-forward without a gate from the layers `up` and `down`."""
        hidden, inner, has_bias = (
            self.config.hidden_size, self.config.intermediate_size, self.has_bias("mlp")
        )  # fmt: skip
        return MLP(
            up=read.linear(
                up, rows=(inner,), columns=hidden, has_bias=has_bias, is_transposed=is_transposed
            ),
            down=read.linear(
                down, rows=(hidden,), columns=inner, has_bias=has_bias, is_transposed=is_transposed
            ),
            activation=self.activation(PLAIN),
        )

    # -- running ------------------------------------------------------------------------------

    def embed(
        self, backend: Backend, weights: Weights, token_ids: torch.Tensor, meta: StepMeta
    ) -> torch.Tensor:
        """Embed the tokens: int32 [T] ids -> [T, C], the input of the first layer."""
        x = backend.embed(token_ids, weights["embedding"])
        return x if self.embedding_scale == 1.0 else x * self.embedding_scale

    def forward(
        self,
        backend: Backend,
        weights: Weights,
        kv: KV,
        token_ids: torch.Tensor,
        meta: StepMeta,
    ) -> tuple[KV, torch.Tensor]:
        """Run the layers on int32 [T] ids: hidden states [R, C] of meta.logits_rows, normalized."""
        layers: list[Block] = weights["layers"]
        residual = self.embed(backend, weights, token_ids, meta)  # [T, C]
        added: torch.Tensor | None = None
        for layer in layers:
            kv, added, residual = layer(backend, kv, added, residual, weights["ropes"], meta)
        assert added is not None
        added = backend.take_rows(added, meta.logits_rows)  # [R, C]
        residual = backend.take_rows(residual, meta.logits_rows)
        x, _ = add_norm(backend, weights["norm"], added, residual)
        return kv, x

    def logits(self, backend: Backend, weights: Weights, hidden: torch.Tensor) -> torch.Tensor:
        """Compute logits: [R, C] -> float32 [R, V]."""
        logits = backend.logits(hidden, weights["head"])
        if self.has_head_bias:
            logits = logits + weights["head_bias"]
        if self.logit_scale != 1.0:
            logits = logits * self.logit_scale
        if self.logit_cap is not None:
            logits = self.logit_cap * torch.tanh(logits / self.logit_cap)
        return logits


def common_values(
    values: Mapping[str, Any], names: Mapping[str, tuple[str, ...]]
) -> dict[str, Any]:
    """Find the `values` of a config.json for each common key of `names`; see `Decoder.names`."""
    found = {
        common: next((values[n] for n in (*own, common) if values.get(n) is not None), None)
        for common, own in names.items()
    }
    return {common: value for common, value in found.items() if value is not None}


def _value(name: str, values: Mapping[str, Any]) -> Any:
    """A value of config.json; rotary settings are also found within rope_parameters."""
    value = values.get(name)
    if value is not None or name != "partial_rotary_factor":
        return value
    settings = values.get("rope_parameters") or values.get("rope_scaling") or {}
    nested = [s for s in settings.values() if isinstance(s, Mapping)]
    return next((s[name] for s in (settings, *nested) if s.get(name) is not None), None)


def _check_number(name: str, value: Any, default: Any, is_nullable: bool) -> None:
    """Refuse a value of config.json that is no number, where the family's default is one."""
    if isinstance(default, bool) or not isinstance(default, int | float):
        return
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number and not (value is None and is_nullable):
        raise UnsupportedModel(
            f"config.json: {name} must be a number such as {default}, not {value!r}"
        )


def _is_off(name: str, config: ModelConfig) -> bool:
    """True if the value is neutral because of its content or of another value of config.json."""
    if name == "sliding_window":
        return config.sliding_window is None
    if name == "rope_parameters":  # settings for each type of layer: neutral if all are equal
        kinds = [v for v in config.values[name].values() if isinstance(v, Mapping)]
        return all(kind == kinds[0] for kind in kinds)
    if name == "use_sliding_window":  # false: counts only where a window is set
        return not config.values.get("sliding_window")
    if name == "layer_types":
        return set(config.values[name]) == {"full_attention"}
    if name == "no_rope_layers":
        return all(config.values[name])
    return False
