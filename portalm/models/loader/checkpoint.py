"""A checkpoint: a model's shape and its tensors by name, whatever the files look like."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from portalm.backend import QuantizedWeight
from portalm.config import ModelConfig
from portalm.errors import CheckpointError

if TYPE_CHECKING:
    import torch


LoadProgress = Callable[[float], None]
"""Called with the share of the tensors that are loaded, 0 to 1."""


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


class TensorReader:
    """Reads a model's tensors one by one: of the right shapes, and telling how far it is."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        shapes: Mapping[str, tuple[int, ...]],
        *,
        prefix: str = "",
        progress: LoadProgress | None = None,
    ) -> None:
        """Nothing is read yet.

        Args:
            checkpoint: where they are.
            shapes: of all that will be read, by the model's names.
            prefix: what the checkpoint's names have before those.
            progress: told the share of the tensors that are read.
        """
        self._checkpoint = checkpoint
        self._shapes = shapes
        self._prefix = prefix
        self._progress = progress
        self._num_read = 0

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor; a `CheckpointError` naming it if it is not there or of another shape."""
        tensor = self._checkpoint.tensor(self._prefix + name)
        self._took(name, tensor.shape)
        return tensor

    def weight(self, name: str) -> torch.Tensor | QuantizedWeight:
        """As `tensor`, of few bits where the file has it so."""
        weight = self._checkpoint.weight(self._prefix + name)
        self._took(name, weight.shape)
        return weight

    def _took(self, name: str, actual: torch.Size) -> None:
        if tuple(actual) != self._shapes[name]:
            raise CheckpointError(
                self._checkpoint.path,
                f"tensor {self._prefix + name!r} is {list(actual)}, the model's config makes it "
                f"{list(self._shapes[name])}",
            )
        self._num_read += 1
        if self._progress is not None:
            # a tied embedding is read twice
            self._progress(min(1.0, self._num_read / len(self._shapes)))
