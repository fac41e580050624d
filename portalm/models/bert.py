"""BERT, RoBERTa and XLM-RoBERTa: encoders that embed texts, cross-encoders that score pairs.

Devlin et al., "BERT", 2019; Liu et al., "RoBERTa", 2019, whose positions start at the padding
token's id + 1; Reimers and Gurevych, "Sentence-BERT", 2019. Layers are post-norm: the sum of a
layer's input and output is normalized.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from portalm.backend import KV, Backend, StepMeta, Weights
from portalm.config import Task
from portalm.layers.linear import Linear
from portalm.layers.norms import Norm
from portalm.models.encoder import Encoder
from portalm.models.layer_reader import LayerReader

_QKV = ("attention.self.query", "attention.self.key", "attention.self.value")


@dataclass(frozen=True, slots=True)
class Layer:
    """One encoder layer's weights."""

    qkv: Linear
    """Query, key and value rows, in this order."""
    attention_out: Linear
    attention_norm: Norm
    up: Linear
    down: Linear
    norm: Norm


class Bert(Encoder):
    """BERT and RoBERTa encoder; see `portalm.models.model.Model`."""

    prefix = ""
    """Prefix of the encoder's tensor names."""
    unused = (*Encoder.unused, r"(^|\.)pooler\.", r"^(cls|lm_head)\.")

    def build(self, read: LayerReader) -> Weights:
        """Read weights by name: words, positions, types, norm, layers."""
        config, encoder, name = self.config, self.encoder, f"{self.prefix}embeddings"
        hidden = config.hidden_size
        num_positions = config.max_position + encoder.first_position
        return {
            "words": read.tensor(f"{name}.word_embeddings.weight", config.vocab_size, hidden),
            "positions": read.tensor(f"{name}.position_embeddings.weight", num_positions, hidden),
            "types": read.tensor(
                f"{name}.token_type_embeddings.weight", encoder.num_token_types, hidden
            ),
            "norm": self._norm(read, f"{name}.LayerNorm"),
            "layers": [
                self._layer(read, f"{self.prefix}encoder.layer.{i}")
                for i in range(config.num_layers)
            ],
        }

    def _layer(self, read: LayerReader, name: str) -> Layer:
        hidden, inner = self.config.hidden_size, self.config.intermediate_size
        return Layer(
            qkv=read.linear(
                *(f"{name}.{part}" for part in _QKV),
                rows=(hidden,) * 3,
                columns=hidden,
                has_bias=True,
            ),
            attention_out=read.linear(
                f"{name}.attention.output.dense", rows=(hidden,), columns=hidden, has_bias=True
            ),
            attention_norm=self._norm(read, f"{name}.attention.output.LayerNorm"),
            up=read.linear(
                f"{name}.intermediate.dense", rows=(inner,), columns=hidden, has_bias=True
            ),
            down=read.linear(f"{name}.output.dense", rows=(hidden,), columns=inner, has_bias=True),
            norm=self._norm(read, f"{name}.output.LayerNorm"),
        )

    def _norm(self, read: LayerReader, name: str) -> Norm:
        return read.layer_norm(name, self.config.hidden_size, self.encoder.layer_norm_eps)

    # -- running ------------------------------------------------------------------------------

    def forward(
        self,
        backend: Backend,
        weights: Weights,
        kv: KV,
        token_ids: torch.Tensor,
        meta: StepMeta,
    ) -> tuple[KV, torch.Tensor]:
        """Run the layers on int32 [T] ids: hidden states [R, C] of meta.logits_rows."""
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


class BertClassifier(Bert):
    """BERT cross-encoder: an encoder with a scoring head."""

    tasks: tuple[Task, ...] = ("score",)
    prefix = "bert."
    unused = Encoder.unused
    head_names = ("bert.pooler.dense", "classifier")

    def build(self, read: LayerReader) -> Weights:
        """Read the encoder, the dense layer of the first token's state, and the scoring layer."""
        hidden, (dense, scores) = self.config.hidden_size, self.head_names
        num_labels = self.encoder.num_labels
        return {
            **super().build(read),
            "dense": read.linear(dense, rows=(hidden,), columns=hidden, has_bias=True),
            "scores": read.linear(scores, rows=(num_labels,), columns=hidden, has_bias=True),
        }

    def logits(self, backend: Backend, weights: Weights, hidden: torch.Tensor) -> torch.Tensor:
        """Score first tokens' states by dense, tanh, dense: [R, C] -> float32 [R, N]."""
        states = torch.tanh(weights["dense"](backend, hidden))
        logits = weights["scores"](backend, states).float()
        return torch.sigmoid(logits) if self.encoder.has_sigmoid else logits


class RobertaClassifier(BertClassifier):
    """RoBERTa and XLM-RoBERTa cross-encoder: `BertClassifier` with other tensor names."""

    prefix = "roberta."
    unused = (*Encoder.unused, r"^roberta\.pooler\.")
    head_names = ("classifier.dense", "classifier.out_proj")
