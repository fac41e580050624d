"""ModernBERT: a pre-norm encoder with rotary embeddings, windows and gated feed-forwards.

Warner et al., "Smarter, better, faster, longer", 2024. Every third layer attends to the whole text,
the others to half of `local_attention` tokens on each side. Each type of layer has its own rotary
base.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from portalm.backend import KV, AttentionSpec, Backend, StepMeta, Weights
from portalm.config import ModelConfig, RopeConfig, Task
from portalm.errors import Unsupported, UnsupportedModel
from portalm.layers.linear import Linear
from portalm.layers.norms import Norm
from portalm.layers.rope import cos_sin_table
from portalm.models.decoder import common_values
from portalm.models.encoder import Encoder
from portalm.models.layer_reader import LayerReader
from portalm.models.loader.checkpoint import Checkpoint, LoadProgress
from portalm.models.model import AS_CAST, Quantization

_WORDS = "embeddings.tok_embeddings.weight"


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer's weights."""

    spec: AttentionSpec
    rope: int
    """Index of the layer's rotary table in "ropes"."""
    attention_norm: Norm | None
    """None in the first layer, whose input is normalized already."""
    qkv: Linear
    attention_out: Linear
    mlp_norm: Norm
    gate_up: Linear
    down: Linear


class ModernBert(Encoder):
    """ModernBERT encoder; see `portalm.models.model.Model`."""

    prefix = ""
    """Prefix of the encoder's tensor names."""
    unused = (*Encoder.unused, r"^(head|decoder)\.")

    def __init__(self, config: ModelConfig, dtype: str) -> None:
        """Create the model for `config`; raise `UnsupportedModel` for unsupported settings."""
        super().__init__(config, dtype)
        values = config.values
        kinds = values["layer_types"]
        if len(kinds) != config.num_layers or set(kinds) - {"full_attention", "sliding_attention"}:
            raise UnsupportedModel(
                f"config.json: layer_types is {kinds!r}; it must name full_attention or "
                f"sliding_attention for each of the {config.num_layers} layers"
            )
        self._is_local = [kind == "sliding_attention" for kind in kinds]
        self._local = replace(self.spec, sliding_window=int(values["local_attention"]) // 2 + 1)

    @classmethod
    def complete(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Add defaults, and convert older keys to layer_types and rope_parameters."""
        values = {
            "local_attention": 128,
            "hidden_act": "gelu",
            **values,
            **common_values(values, {"hidden_act": ("hidden_activation",)}),
        }
        every = values.get("global_attn_every_n_layers", 3)
        if not values.get("layer_types"):
            values["layer_types"] = [
                "sliding_attention" if i % every else "full_attention"
                for i in range(values["num_hidden_layers"])
            ]
        if not values.get("rope_parameters"):
            values["rope_parameters"] = {
                "full_attention": {"rope_theta": values.get("global_rope_theta", 160_000.0)},
                "sliding_attention": {"rope_theta": values.get("local_rope_theta", 10_000.0)},
            }
        return values

    # -- loading ------------------------------------------------------------------------------

    def load(
        self,
        checkpoint: Checkpoint,
        backend: Backend,
        *,
        quantization: Quantization = AS_CAST,
        progress: LoadProgress | None = None,
    ) -> Weights:
        """Read all weights: the result of `build`, and the two rotary tables as "ropes"."""
        if any(self._is_local) and "sliding_window" not in backend.capabilities.features:
            raise Unsupported(
                f"backend {backend.name!r} does not support sliding windows, which this model needs"
            )
        weights = super().load(checkpoint, backend, quantization=quantization, progress=progress)
        config = self.config
        local = config.values["rope_parameters"]["sliding_attention"]
        weights["ropes"] = [
            cos_sin_table(rope, head_size=config.head_size, max_position=config.max_position).to(
                backend.device()
            )
            for rope in (config.rope, RopeConfig(theta=float(local["rope_theta"])))
        ]
        return weights

    def build(self, read: LayerReader) -> Weights:
        """Read weights by name: words, norm, layers, last_norm."""
        config = self.config
        return {
            "words": read.tensor(self.prefix + _WORDS, config.vocab_size, config.hidden_size),
            "norm": self.norm(read, f"{self.prefix}embeddings.norm"),
            "layers": [self._layer(read, i) for i in range(config.num_layers)],
            "last_norm": self.norm(read, f"{self.prefix}final_norm"),
        }

    def norm(self, read: LayerReader, name: str) -> Norm:
        """Read a norm of hidden states."""
        values = self.config.values
        return read.layer_norm(
            name,
            self.config.hidden_size,
            float(values.get("norm_eps", 1e-5)),
            has_bias=bool(values.get("norm_bias", False)),
        )

    def _layer(self, read: LayerReader, layer: int) -> Layer:
        config, name, is_local = self.config, f"{self.prefix}layers.{layer}", self._is_local[layer]
        hidden, inner = config.hidden_size, config.intermediate_size
        attention, mlp = config.attention_bias, config.mlp_bias
        return Layer(
            spec=self._local if is_local else self.spec,
            rope=int(is_local),
            attention_norm=None if layer == 0 else self.norm(read, f"{name}.attn_norm"),
            qkv=read.linear(
                f"{name}.attn.Wqkv", rows=(3 * hidden,), columns=hidden, has_bias=attention
            ),
            attention_out=read.linear(
                f"{name}.attn.Wo", rows=(hidden,), columns=hidden, has_bias=attention
            ),
            mlp_norm=self.norm(read, f"{name}.mlp_norm"),
            gate_up=read.linear(f"{name}.mlp.Wi", rows=(2 * inner,), columns=hidden, has_bias=mlp),
            down=read.linear(f"{name}.mlp.Wo", rows=(hidden,), columns=inner, has_bias=mlp),
        )

    # -- running ------------------------------------------------------------------------------

    def forward(
        self,
        backend: Backend,
        weights: Weights,
        kv: KV,
        token_ids: torch.Tensor,
        meta: StepMeta,
    ) -> tuple[KV, torch.Tensor]:
        """Run the layers on int32 [T] ids: hidden states [R, C] of meta.logits_rows, normalized."""
        x = weights["norm"](backend, backend.embed(token_ids, weights["words"]))  # [T, C]
        layers: list[Layer] = weights["layers"]
        for layer in layers:
            spec = layer.spec
            normalized = x if layer.attention_norm is None else layer.attention_norm(backend, x)
            heads = layer.qkv(backend, normalized).view(len(x), 3, spec.num_heads, spec.head_size)
            query, key, value = heads.unbind(1)  # [T, H, D]
            query, key = backend.rope(
                query, key, meta.positions, weights["ropes"][layer.rope], is_interleaved=False
            )
            attended = backend.attend_encoder(query, key, value, meta, spec)
            x = x + layer.attention_out(backend, attended.view(x.shape))
            gate, up = layer.gate_up(backend, layer.mlp_norm(backend, x)).chunk(2, dim=-1)
            x = x + layer.down(backend, backend.gelu(gate) * up)
        states = backend.take_rows(x, meta.logits_rows)
        return kv, weights["last_norm"](backend, states)


class ModernBertClassifier(ModernBert):
    """ModernBERT cross-encoder: scores the state of the first token, or the mean of all states."""

    tasks: tuple[Task, ...] = ("score",)
    prefix = "model."
    unused = Encoder.unused

    def __init__(self, config: ModelConfig, dtype: str) -> None:
        """Create the model for `config`; raise `UnsupportedModel` for unsupported settings."""
        super().__init__(config, dtype)
        pooling = config.values.get("classifier_pooling", "cls")
        activation = config.values.get("classifier_activation", "gelu")
        if pooling not in ("cls", "mean") or activation != "gelu":
            raise UnsupportedModel(
                f"config.json: classifier_pooling {pooling!r} with classifier_activation "
                f"{activation!r} is not supported; supported: 'cls' or 'mean', with 'gelu'"
            )
        self._pools_mean = pooling == "mean"

    def build(self, read: LayerReader) -> Weights:
        """Read the encoder's weights, the head's dense layer and norm, and the scoring layer."""
        hidden = self.config.hidden_size
        return {
            **super().build(read),
            "dense": read.linear(
                "head.dense",
                rows=(hidden,),
                columns=hidden,
                has_bias=bool(self.config.values.get("classifier_bias", False)),
            ),
            "head_norm": self.norm(read, "head.norm"),
            "scores": read.linear("classifier", rows=(1,), columns=hidden, has_bias=True),
        }

    def forward(
        self,
        backend: Backend,
        weights: Weights,
        kv: KV,
        token_ids: torch.Tensor,
        meta: StepMeta,
    ) -> tuple[KV, torch.Tensor]:
        """Run the encoder on int32 [T] ids: pooled states [R, C] of meta.logits_rows."""
        if not self._pools_mean:
            return super().forward(backend, weights, kv, token_ids, meta)
        starts = meta.query_start_loc
        rows = torch.arange(len(token_ids), dtype=torch.int32, device=token_ids.device)
        kv, states = super().forward(
            backend, weights, kv, token_ids, replace(meta, logits_rows=rows)
        )
        request = (rows[:, None] >= starts[None, 1:]).sum(dim=1)  # [T]; padding tokens: S
        sums = states.new_zeros((len(starts), states.shape[1]), dtype=torch.float32)
        sums = sums.index_add(0, request, states.float())
        lengths = torch.diff(starts).clamp(min=1)
        means = (sums[:-1] / lengths[:, None]).to(states.dtype)  # [S, C]
        return kv, means[request[meta.logits_rows.long()]]

    def logits(self, backend: Backend, weights: Weights, hidden: torch.Tensor) -> torch.Tensor:
        """Compute scores of pooled states: [R, C] -> float32 [R, 1]."""
        states = backend.gelu(weights["dense"](backend, hidden))
        logits = weights["scores"](backend, weights["head_norm"](backend, states)).float()
        return torch.sigmoid(logits) if self.encoder.has_sigmoid else logits
