"""A checkpoint: a model's shape and its tensors by name, whatever the files look like."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch

from portalm.config import ModelConfig
from portalm.errors import CheckpointError


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

    def close(self) -> None:
        """Let go of the files; tensors given out stay valid."""
        ...


def checked_tensor(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The tensor `name`; a `CheckpointError` naming it if it is not of `shape`."""
    tensor = checkpoint.tensor(name)
    if tuple(tensor.shape) != shape:
        raise CheckpointError(
            checkpoint.path,
            f"tensor {name!r} is {list(tensor.shape)}, the model's config makes it {list(shape)}",
        )
    return tensor
