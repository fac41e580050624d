"""The interface of model families: shapes, loading, and a forward pass over `Backend`."""

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
    """How linear weights are quantized while loading."""

    keep: bool = False
    """Keep weights quantized that are quantized in the checkpoint."""
    layers: str | None = None
    """Format to quantize other weights to; None: keep them in the model's dtype."""
    head: str | None = None
    """Format to quantize the output head to; None: keep it in the model's dtype."""


AS_CAST = Quantization()
"""Cast all weights to the model's dtype."""


class Model(Protocol):
    """A model's functions. Weights are passed in: the object holds only config and shapes."""

    config: ModelConfig
    dtype: str
    """Data type of weights and activations."""
    tasks: tuple[Task, ...]
    """Tasks that the model supports."""

    def __init__(self, config: ModelConfig, dtype: str) -> None:
        """Create the model for `config`.

        Raises:
            UnsupportedModel: the config has a setting that the family does not support.
        """
        ...

    @classmethod
    def complete(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Add the family's defaults to the `values` of a config.json."""
        ...

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of all tensors that `load` reads from a Hugging Face checkpoint."""
        ...

    def attention_specs(self) -> list[AttentionSpec]:
        """Attention of each layer that uses the KV cache."""
        ...

    def kv_spec(self, block_size: int, kv_dtype: str) -> KVSpec | None:
        """The KV cache that the model needs; None: it needs none, as an encoder."""
        ...

    def load(
        self,
        checkpoint: Checkpoint,
        backend: Backend,
        *,
        quantization: Quantization = AS_CAST,
        progress: LoadProgress | None = None,
    ) -> Weights:
        """Read the checkpoint's tensors, one at a time, into the device's layout."""
        ...

    def forward(
        self,
        backend: Backend,
        weights: Weights,
        kv: KV,
        token_ids: torch.Tensor,
        meta: StepMeta,
    ) -> tuple[KV, torch.Tensor]:
        """Run the layers on int32 [T] ids: hidden states [R, C] of meta.logits_rows, normalized."""
        ...

    def logits(self, backend: Backend, weights: Weights, hidden: torch.Tensor) -> torch.Tensor:
        """Compute logits: [R, C] -> float32 [R, V], or a classifier's scores [R, N]."""
        ...

    def weight_bytes(self) -> int:
        """Bytes of all weights in `dtype`, unquantized."""
        ...


def bytes_of(shapes: dict[str, tuple[int, ...]], dtype: str) -> int:
    """Bytes of tensors with these shapes in `dtype`."""
    item = int(getattr(torch, dtype).itemsize)
    return item * sum(math.prod(shape) for shape in shapes.values())
