"""The base class of encoders: a prompt is computed whole in one step, without a KV cache."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch

from portalm.backend import KV, AttentionSpec, Backend, KVSpec, StepMeta, Weights
from portalm.config import EncoderConfig, ModelConfig, Task
from portalm.errors import UnsupportedModel
from portalm.models.layer_reader import LayerReader, NoDevice, ShapeRecorder
from portalm.models.loader.checkpoint import Checkpoint, LoadProgress, TensorReader
from portalm.models.loader.unread import check_all_read
from portalm.models.model import AS_CAST, Quantization, bytes_of


class Encoder(ABC):
    """An encoder without its layers, which a family adds; see `portalm.models.model.Model`."""

    tasks: tuple[Task, ...] = ("embed",)
    unused: ClassVar[tuple[str, ...]] = (r"(^|\.)position_ids$",)
    """Regular expressions of tensor names that some checkpoints have and no output depends on."""

    def __init__(self, config: ModelConfig, dtype: str) -> None:
        """Create the model for `config`, with weights and activations in `dtype`.

        Raises:
            UnsupportedModel: it is a classifier with more than one label.
        """
        self.config = config
        self.dtype = dtype
        self.encoder = config.encoder or EncoderConfig()
        self.spec = AttentionSpec(
            num_heads=config.num_heads,
            num_kv_heads=config.num_heads,
            head_size=config.head_size,
            scale=config.head_size**-0.5,
        )
        if "score" in self.tasks and self.encoder.num_labels != 1:
            raise UnsupportedModel(
                f"{config.architecture} with {self.encoder.num_labels} labels is not supported: "
                f"only cross-encoders, which have 1 label and score pairs of texts, are"
            )

    @classmethod
    def complete(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Return `values` unchanged."""
        return values

    @abstractmethod
    def build(self, read: LayerReader) -> Weights:
        """Read weights by name; the first tensor read must be the word embeddings."""

    @abstractmethod
    def forward(
        self,
        backend: Backend,
        weights: Weights,
        kv: KV,
        token_ids: torch.Tensor,
        meta: StepMeta,
    ) -> tuple[KV, torch.Tensor]:
        """Run the layers on int32 [T] ids: hidden states [R, C] of meta.logits_rows."""

    def logits(self, backend: Backend, weights: Weights, hidden: torch.Tensor) -> torch.Tensor:
        """Compute a classifier's scores: first tokens' states [R, C] -> float32 [R, N]."""
        raise UnsupportedModel(f"{self.config.architecture} has no scores: it embeds texts")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of all tensors of a Hugging Face checkpoint."""
        recorder = ShapeRecorder()
        self.build(LayerReader(recorder, NoDevice(), self.dtype))
        return recorder.shapes

    def load(
        self,
        checkpoint: Checkpoint,
        backend: Backend,
        *,
        quantization: Quantization = AS_CAST,
        progress: LoadProgress | None = None,
    ) -> Weights:
        """Read all weights; see `build`."""
        names, first = checkpoint.names(), next(iter(self.shapes()))
        prefix = _find_prefix(set(names), first)
        reader = TensorReader(
            checkpoint, len(names), rename=lambda name: prefix + name, progress=progress
        )
        weights = self.build(LayerReader(reader, backend, self.dtype, quantization))
        check_all_read(checkpoint, unused=(*self.unused, *_other_heads(prefix)))
        return weights

    def weight_bytes(self) -> int:
        """Bytes of all weights in `dtype`."""
        return bytes_of(self.shapes(), self.dtype)

    def attention_specs(self) -> list[AttentionSpec]:
        """Empty: there is no KV cache."""
        return []

    def kv_spec(self, block_size: int, kv_dtype: str) -> KVSpec | None:
        """None: there is no KV cache."""
        return None


def _find_prefix(names: set[str], wanted: str) -> str:
    """Find the prefix of `wanted` among the checkpoint's names; empty if there is none.

    Checkpoints with another head, such as one for masked tokens, prefix the encoder's names.
    """
    if wanted in names:
        return ""
    found = [name.removesuffix(wanted) for name in names if name.endswith(f".{wanted}")]
    return found[0] if len(found) == 1 else ""


def _other_heads(prefix: str) -> tuple[str, ...]:
    """Regular expressions of names outside the encoder, whose names begin with `prefix`."""
    return (f"^(?!{re.escape(prefix)})",) if prefix else ()
