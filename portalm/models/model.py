"""What a model family is to the rest: shapes, loading, and a forward pass over the seam."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from portalm.backend import KV, AttentionSpec, Backend, KVSpec, StepMeta, Weights
from portalm.config import ModelConfig, Task
from portalm.models.loader.checkpoint import Checkpoint, LoadProgress


@dataclass(frozen=True, slots=True)
class Quantization:
    """What becomes of a model's linear weights at load."""

    keep: bool = False
    """Those of few bits stay as the checkpoint has them."""
    layers: str | None = None
    """The format that others are rounded to; None: they stay in the model's dtype."""
    head: str | None = None
    """The same for the output head."""


AS_CAST = Quantization()
"""All weights in the model's dtype."""


class Model(Protocol):
    """Functions over weights: nothing of a model lives in the object but its shape."""

    config: ModelConfig
    dtype: str
    """What weights and activations are computed in."""
    tasks: tuple[Task, ...]
    """What may be asked of it."""

    def __init__(self, config: ModelConfig, dtype: str) -> None:
        """A model of this shape.

        Raises:
            UnsupportedModel: the config says what the family has no code for.
        """
        ...

    @classmethod
    def complete(cls, values: dict[str, Any]) -> dict[str, Any]:
        """The `values` of a config.json, with what the family takes for granted filled in."""
        ...

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor that `load` reads from a checkpoint, with its shape."""
        ...

    def attention_specs(self) -> list[AttentionSpec]:
        """One for each layer that attends over the KV cache."""
        ...

    def kv_spec(self, block_size: int, kv_dtype: str) -> KVSpec | None:
        """The KV cache that the model needs; None: an encoder, which sees whole prompts at once."""
        ...

    def load(
        self,
        checkpoint: Checkpoint,
        backend: Backend,
        *,
        quantization: Quantization = AS_CAST,
        progress: LoadProgress | None = None,
    ) -> Weights:
        """The checkpoint's tensors in the device's layout, cast one at a time."""
        ...

    def forward(
        self,
        backend: Backend,
        weights: Weights,
        kv: KV,
        token_ids: torch.Tensor,
        meta: StepMeta,
    ) -> tuple[KV, torch.Tensor]:
        """Hidden states behind the last norm: [R, C] for meta.logits_rows of int32 [T] ids."""
        ...

    def logits(self, backend: Backend, weights: Weights, hidden: torch.Tensor) -> torch.Tensor:
        """[R, C] -> float32 [R, V]; of a model that scores, its scores [R, N]."""
        ...

    def weight_bytes(self) -> int:
        """Bytes of all weights in `dtype`."""
        ...


def bytes_of(shapes: dict[str, tuple[int, ...]], dtype: str) -> int:
    """Bytes of tensors of these shapes in `dtype`."""
    item = int(getattr(torch, dtype).itemsize)
    return item * sum(math.prod(shape) for shape in shapes.values())
