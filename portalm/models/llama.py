"""The Llama architecture: Llama 1 to 3, SmolLM2 and what else has its config.

Touvron et al., "LLaMA", 2023. Pre-norm decoder layers of rotary grouped-query attention and a
gated MLP. The residual is carried beside the normed input, so that adding and norming are one
operation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from portalm.backend import KV, AttentionSpec, Backend, KVSpec, QuantizedWeight, StepMeta, Weights
from portalm.config import ModelConfig, Task
from portalm.layers.attention import Attention
from portalm.layers.linear import Linear, pack_linear, pack_weight
from portalm.layers.mlp import GatedMLP
from portalm.layers.rope import cos_sin_table
from portalm.models.loader.checkpoint import Checkpoint, LoadProgress, TensorReader
from portalm.models.model import AS_CAST, Quantization, bytes_of

_EMBEDDING = "model.embed_tokens.weight"
_HEAD = "lm_head.weight"
_QKV = ("q_proj", "k_proj", "v_proj")
_GATE_UP = ("gate_proj", "up_proj")


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer's weights."""

    input_norm: torch.Tensor
    """[C]"""
    attention: Attention
    post_norm: torch.Tensor
    """[C]"""
    mlp: GatedMLP


class Llama:
    """Functions of a Llama-shaped model; see `portalm.models.model.Model`."""

    tasks: tuple[Task, ...] = ("generate", "embed")

    def __init__(self, config: ModelConfig, dtype: str) -> None:
        """A model of this shape, computed in `dtype`."""
        self.config = config
        self.dtype = dtype

    # -- shapes -------------------------------------------------------------------------------

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the checkpoint, with its shape."""
        config = self.config
        hidden = config.hidden_size
        shapes: dict[str, tuple[int, ...]] = {_EMBEDDING: (config.vocab_size, hidden)}
        for layer in range(config.num_layers):
            shapes |= self._layer_shapes(f"model.layers.{layer}")
        shapes["model.norm.weight"] = (hidden,)
        if not config.tie_word_embeddings:
            shapes[_HEAD] = (config.vocab_size, hidden)
        return shapes

    def _layer_shapes(self, prefix: str) -> dict[str, tuple[int, ...]]:
        config = self.config
        hidden, inner = config.hidden_size, config.intermediate_size
        query, kv = config.num_heads * config.head_size, config.num_kv_heads * config.head_size
        matrices = {
            "self_attn.q_proj": (query, hidden),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, query),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }
        shapes: dict[str, tuple[int, ...]] = {}
        for name, shape in matrices.items():
            shapes[f"{prefix}.{name}.weight"] = shape
            if self._has_bias(name):
                shapes[f"{prefix}.{name}.bias"] = shape[:1]
        shapes[f"{prefix}.input_layernorm.weight"] = (hidden,)
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
        return shapes

    def _has_bias(self, name: str) -> bool:
        return self.config.attention_bias if "self_attn" in name else self.config.mlp_bias

    def weight_bytes(self) -> int:
        """Bytes of all weights in `dtype`; a tied head is packed beside the embedding."""
        shapes = self.shapes()
        return bytes_of({**shapes, _HEAD: shapes[_EMBEDDING]}, self.dtype)

    def attention_specs(self) -> list[AttentionSpec]:
        """The same for every layer."""
        config = self.config
        spec = AttentionSpec(
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_size=config.head_size,
            scale=config.head_size**-0.5,
            sliding_window=config.sliding_window,
        )
        return [spec] * config.num_layers

    def kv_spec(self, block_size: int, kv_dtype: str) -> KVSpec:
        """The KV cache that the model needs."""
        return KVSpec(
            num_layers=self.config.num_layers,
            num_kv_heads=self.config.num_kv_heads,
            head_size=self.config.head_size,
            block_size=block_size,
            dtype=kv_dtype,
        )

    # -- loading ------------------------------------------------------------------------------

    def load(
        self,
        checkpoint: Checkpoint,
        backend: Backend,
        *,
        quantization: Quantization = AS_CAST,
        progress: LoadProgress | None = None,
    ) -> Weights:
        """Weights by name: embedding, cos_sin, layers, norm, head."""
        config, shapes, dtype = self.config, self.shapes(), getattr(torch, self.dtype)
        device = backend.device()
        reader = TensorReader(checkpoint, shapes, progress=progress)

        def matrix(name: str) -> torch.Tensor | QuantizedWeight:
            return reader.weight(name) if quantization.keep else reader.tensor(name)

        def linear(prefix: str, *names: str) -> Linear:
            full = [f"{prefix}.{name}" for name in names]
            biases = [reader.tensor(f"{n}.bias") for n in full if self._has_bias(n)]
            weights = [matrix(f"{n}.weight") for n in full]
            return pack_linear(backend, weights, biases, dtype, quantization.layers)

        def vector(name: str) -> torch.Tensor:
            return reader.tensor(name).to(dtype).to(device, copy=True)

        embedding = reader.tensor(_EMBEDDING).to(dtype).to(device, copy=True)
        if not config.tie_word_embeddings:
            head_weight = matrix(_HEAD)
        else:
            head_weight = matrix(_EMBEDDING) if quantization.keep else embedding
        head = pack_weight(backend, [head_weight], dtype, quantization.head, for_logits=True)
        layers = []
        for i, spec in enumerate(self.attention_specs()):
            prefix = f"model.layers.{i}"
            layers.append(
                Layer(
                    input_norm=vector(f"{prefix}.input_layernorm.weight"),
                    attention=Attention(
                        layer=i,
                        spec=spec,
                        qkv=linear(f"{prefix}.self_attn", *_QKV),
                        out=linear(f"{prefix}.self_attn", "o_proj"),
                        is_interleaved=config.rope.is_interleaved,
                    ),
                    post_norm=vector(f"{prefix}.post_attention_layernorm.weight"),
                    mlp=GatedMLP(
                        linear(f"{prefix}.mlp", *_GATE_UP), linear(f"{prefix}.mlp", "down_proj")
                    ),
                )
            )
        table = cos_sin_table(
            config.rope, head_size=config.head_size, max_position=config.max_position
        )
        return {
            "embedding": embedding,
            "cos_sin": table.to(device),
            "layers": layers,
            "norm": vector("model.norm.weight"),
            "head": head,
        }

    # -- running ------------------------------------------------------------------------------

    def forward(
        self,
        backend: Backend,
        weights: Weights,
        kv: KV,
        token_ids: torch.Tensor,
        meta: StepMeta,
    ) -> tuple[KV, torch.Tensor]:
        """Hidden states behind the last norm: [R, C] for meta.logits_rows of int32 [T] ids."""
        eps = self.config.rms_norm_eps
        cos_sin = weights["cos_sin"]
        layers: list[Layer] = weights["layers"]
        residual = backend.embed(token_ids, weights["embedding"])  # [T, C]
        x = backend.rms_norm(residual, layers[0].input_norm, eps)
        for i, layer in enumerate(layers):
            if i > 0:
                x, residual = backend.add_rms_norm(x, residual, layer.input_norm, eps)
            kv, x = layer.attention(backend, kv, x, cos_sin, meta)
            x, residual = backend.add_rms_norm(x, residual, layer.post_norm, eps)
            x = layer.mlp(backend, x)
        x = backend.take_rows(x, meta.logits_rows)  # [R, C]
        residual = backend.take_rows(residual, meta.logits_rows)
        x, _ = backend.add_rms_norm(x, residual, weights["norm"], eps)
        return kv, x

    def logits(self, backend: Backend, weights: Weights, hidden: torch.Tensor) -> torch.Tensor:
        """[R, C] -> float32 [R, V]."""
        return backend.logits(hidden, weights["head"])
