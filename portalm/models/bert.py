"""BERT and its kin: encoders that embed a text, and cross-encoders that score a pair of texts.

Devlin et al., "BERT", 2019; Liu et al., "RoBERTa", 2019, whose positions begin behind the padding
token's id; Reimers and Gurevych, "Sentence-BERT", 2019. Post-norm layers: what a layer adds is
normed together with its input.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from portalm.backend import KV, Backend, StepMeta, Weights
from portalm.config import Task
from portalm.layers.linear import Linear, pack_linear
from portalm.layers.norms import LayerNorm
from portalm.models.encoder import Encoder, added_prefix
from portalm.models.loader.checkpoint import Checkpoint, LoadProgress, TensorReader
from portalm.models.model import AS_CAST, Quantization

_QKV = ("attention.self.query", "attention.self.key", "attention.self.value")


@dataclass(frozen=True, slots=True)
class Layer:
    """One encoder layer's weights."""

    qkv: Linear
    """Query, key and value rows, in this order."""
    attention_out: Linear
    attention_norm: LayerNorm
    up: Linear
    down: Linear
    norm: LayerNorm


class Bert(Encoder):
    """Functions of an encoder; see `portalm.models.model.Model`."""

    prefix = ""
    """Of tensors' names, before the encoder's own."""

    # -- shapes -------------------------------------------------------------------------------

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the checkpoint, with its shape."""
        config, encoder = self.config, self.encoder
        hidden, inner = config.hidden_size, config.intermediate_size
        num_positions = config.max_position + encoder.first_position
        shapes: dict[str, tuple[int, ...]] = {
            "embeddings.word_embeddings.weight": (config.vocab_size, hidden),
            "embeddings.position_embeddings.weight": (num_positions, hidden),
            "embeddings.token_type_embeddings.weight": (encoder.num_token_types, hidden),
            **_norm_shapes("embeddings.LayerNorm", hidden),
        }
        for layer in range(config.num_layers):
            name = f"encoder.layer.{layer}"
            for qkv in _QKV:
                shapes |= _linear_shapes(f"{name}.{qkv}", hidden, hidden)
            shapes |= _linear_shapes(f"{name}.attention.output.dense", hidden, hidden)
            shapes |= _norm_shapes(f"{name}.attention.output.LayerNorm", hidden)
            shapes |= _linear_shapes(f"{name}.intermediate.dense", inner, hidden)
            shapes |= _linear_shapes(f"{name}.output.dense", hidden, inner)
            shapes |= _norm_shapes(f"{name}.output.LayerNorm", hidden)
        return {f"{self.prefix}{name}": shape for name, shape in shapes.items()} | self.head()

    def head(self) -> dict[str, tuple[int, ...]]:
        """Tensors behind the encoder: the layer that makes a state, then the one that scores."""
        return {}

    # -- loading ------------------------------------------------------------------------------

    def load(
        self,
        checkpoint: Checkpoint,
        backend: Backend,
        *,
        quantization: Quantization = AS_CAST,
        progress: LoadProgress | None = None,
    ) -> Weights:
        """Weights by name: words, positions, types, norm, layers, and head where there is one."""
        shapes, dtype = self.shapes(), getattr(torch, self.dtype)
        device = backend.device()
        added = added_prefix(set(checkpoint.names()), next(iter(shapes)))
        reader = TensorReader(
            checkpoint, len(shapes), rename=lambda name: added + name, progress=progress
        )

        def table(name: str) -> torch.Tensor:
            return reader.tensor(name, shapes[name]).to(dtype).to(device, copy=True)

        def linear(*full: str) -> Linear:
            weights, biases = (
                [reader.tensor(name, shapes[name]) for name in (f"{n}.{kind}" for n in full)]
                for kind in ("weight", "bias")
            )
            return pack_linear(backend, weights, biases, dtype, quantization.layers)

        def norm(name: str) -> LayerNorm:
            eps = self.encoder.layer_norm_eps
            return LayerNorm(table(f"{name}.weight"), table(f"{name}.bias"), eps)

        embeddings = f"{self.prefix}embeddings"
        weights: Weights = {
            "words": table(f"{embeddings}.word_embeddings.weight"),
            "positions": table(f"{embeddings}.position_embeddings.weight"),
            "types": table(f"{embeddings}.token_type_embeddings.weight"),
            "norm": norm(f"{embeddings}.LayerNorm"),
            "layers": [],
        }
        for i in range(self.config.num_layers):
            name = f"{self.prefix}encoder.layer.{i}"
            weights["layers"].append(
                Layer(
                    qkv=linear(*(f"{name}.{qkv}" for qkv in _QKV)),
                    attention_out=linear(f"{name}.attention.output.dense"),
                    attention_norm=norm(f"{name}.attention.output.LayerNorm"),
                    up=linear(f"{name}.intermediate.dense"),
                    down=linear(f"{name}.output.dense"),
                    norm=norm(f"{name}.output.LayerNorm"),
                )
            )
        head = [name.removesuffix(".weight") for name in self.head() if name.endswith(".weight")]
        weights["head"] = [linear(name) for name in head]
        return weights

    # -- running ------------------------------------------------------------------------------

    def forward(
        self,
        backend: Backend,
        weights: Weights,
        kv: KV,
        token_ids: torch.Tensor,
        meta: StepMeta,
    ) -> tuple[KV, torch.Tensor]:
        """Hidden states behind the last layer: [R, C] for meta.logits_rows of int32 [T] ids."""
        assert meta.token_types is not None
        spec = self.spec
        shape = (len(token_ids), spec.num_heads, spec.head_size)
        positions = meta.positions + self.encoder.first_position
        x = (
            backend.embed(token_ids, weights["words"])
            + backend.embed(meta.token_types, weights["types"])
            + backend.embed(positions, weights["positions"])
        )  # [T, C]
        x = weights["norm"](backend, x)
        layers: list[Layer] = weights["layers"]
        for layer in layers:
            projected = layer.qkv(backend, x)  # [T, 3 C]
            query, key, value = (part.view(shape) for part in projected.chunk(3, dim=-1))
            attended = backend.attend_encoder(query, key, value, meta, spec)  # [T, H, D]
            x = layer.attention_norm(
                backend, layer.attention_out(backend, attended.view(x.shape)) + x
            )
            x = layer.norm(backend, layer.down(backend, backend.gelu(layer.up(backend, x))) + x)
        return kv, backend.take_rows(x, meta.logits_rows)

    def logits(self, backend: Backend, weights: Weights, hidden: torch.Tensor) -> torch.Tensor:
        """Scores, float32 [R, N], of the first token's states [R, C]: dense, tanh, dense."""
        dense, scores = weights["head"]
        logits = scores(backend, torch.tanh(dense(backend, hidden))).float()
        return torch.sigmoid(logits) if self.encoder.has_sigmoid else logits


class BertClassifier(Bert):
    """BERT with a layer that scores; a cross-encoder if it scores one thing."""

    tasks: tuple[Task, ...] = ("score",)
    prefix = "bert."
    head_names = ("bert.pooler.dense", "classifier")

    def head(self) -> dict[str, tuple[int, ...]]:
        """The layer that makes a state of the first token, and the one that scores it."""
        hidden = self.config.hidden_size
        dense, scores = self.head_names
        return {
            **_linear_shapes(dense, hidden, hidden),
            **_linear_shapes(scores, self.encoder.num_labels, hidden),
        }


class RobertaClassifier(BertClassifier):
    """The same of RoBERTa and XLM-RoBERTa: other names."""

    prefix = "roberta."
    head_names = ("classifier.dense", "classifier.out_proj")


def _linear_shapes(name: str, n: int, k: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (n, k), f"{name}.bias": (n,)}


def _norm_shapes(name: str, size: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (size,), f"{name}.bias": (size,)}
