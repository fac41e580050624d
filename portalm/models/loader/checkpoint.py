"""A checkpoint: a model's shape and its tensors by name, whatever the files look like."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from portalm.backend import QuantizedWeight
from portalm.config import ModelConfig
from portalm.errors import CheckpointError

if TYPE_CHECKING:
    import torch


class Checkpoint(Protocol):
    """Named tensors on the host. Names are Hugging Face's, also where the file has others."""

    path: Path
    config: ModelConfig

    def names(self) -> Sequence[str]:
        """Every tensor there is."""
        ...

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor, in the file's dtype (dequantised, where it was quantised).

        Raises:
            CheckpointError: there is no such tensor, or the file is broken.
        """
        ...

    def weight(self, name: str) -> torch.Tensor | QuantizedWeight:
        """As `tensor`, but a matrix of few bits as it is, if its format is one of ours."""
        ...

    def close(self) -> None:
        """Let go of the files; tensors given out stay valid."""
        ...


def checked_tensor(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The tensor `name`; a `CheckpointError` naming it if it is not of `shape`."""
    tensor = checkpoint.tensor(name)
    _check_shape(checkpoint, name, tensor.shape, shape)
    return tensor


def checked_weight(
    checkpoint: Checkpoint, name: str, shape: tuple[int, ...]
) -> torch.Tensor | QuantizedWeight:
    """As `checked_tensor`, of few bits where the file has it so."""
    weight = checkpoint.weight(name)
    _check_shape(checkpoint, name, weight.shape, shape)
    return weight


def _check_shape(
    checkpoint: Checkpoint, name: str, actual: torch.Size, expected: tuple[int, ...]
) -> None:
    if tuple(actual) != expected:
        raise CheckpointError(
            checkpoint.path,
            f"tensor {name!r} is {list(actual)}, the model's config makes it {list(expected)}",
        )
