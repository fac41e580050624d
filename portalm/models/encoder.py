"""What encoders have in common: a prompt is computed whole in one step, nothing of it is kept."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch

from portalm.backend import KV, AttentionSpec, Backend, KVSpec, StepMeta, Weights
from portalm.config import EncoderConfig, ModelConfig, Task
from portalm.errors import UnsupportedModel
from portalm.models.layer_reader import LayerReader, NoDevice, ShapeRecorder
from portalm.models.loader.checkpoint import Checkpoint, LoadProgress, TensorReader
from portalm.models.model import AS_CAST, Quantization, bytes_of


class Encoder(ABC):
    """Functions of an encoder but for its layers; see `portalm.models.model.Model`."""

    tasks: tuple[Task, ...] = ("embed",)

    def __init__(self, config: ModelConfig, dtype: str) -> None:
        """A model of this shape, computed in `dtype`.

        Raises:
            UnsupportedModel: it is a classifier, and scores more than one thing.
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
                f"{config.architecture} with {self.encoder.num_labels} labels is not supported: a "
                f"cross-encoder, which scores pairs of texts, has one"
            )

    @classmethod
    def complete(cls, values: dict[str, Any]) -> dict[str, Any]:
        """The config as it is."""
        return values

    @abstractmethod
    def build(self, read: LayerReader) -> Weights:
        """Weights by name; what it reads first is the table of words."""

    @abstractmethod
    def forward(
        self,
        backend: Backend,
        weights: Weights,
        kv: KV,
        token_ids: torch.Tensor,
        meta: StepMeta,
    ) -> tuple[KV, torch.Tensor]:
        """Hidden states behind the last layer: [R, C] for meta.logits_rows of int32 [T] ids."""

    def logits(self, backend: Backend, weights: Weights, hidden: torch.Tensor) -> torch.Tensor:
        """A classifier's scores, float32 [R, N], of the first token's states [R, C]."""
        raise UnsupportedModel(f"{self.config.architecture} embeds texts: it has no scores")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the checkpoint, with its shape."""
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
        """What `build` gives."""
        names, first = checkpoint.names(), next(iter(self.shapes()))
        added = _added_prefix(set(names), first)
        reader = TensorReader(
            checkpoint, len(names), rename=lambda name: added + name, progress=progress
        )
        weights = self.build(LayerReader(reader, backend, self.dtype, quantization))
        reader.check_complete()
        return weights

    def weight_bytes(self) -> int:
        """Bytes of all weights in `dtype`."""
        return bytes_of(self.shapes(), self.dtype)

    def attention_specs(self) -> list[AttentionSpec]:
        """None: there is no KV cache."""
        return []

    def kv_spec(self, block_size: int, kv_dtype: str) -> KVSpec | None:
        """None: there is no KV cache."""
        return None


def _added_prefix(names: set[str], wanted: str) -> str:
    """What stands before `wanted` in a checkpoint of these names; empty if nothing ends so.

    A checkpoint that has a head which is not ours has its family's prefix before all else.
    """
    if wanted in names:
        return ""
    found = [name.removesuffix(wanted) for name in names if name.endswith(f".{wanted}")]
    return found[0] if len(found) == 1 else ""
