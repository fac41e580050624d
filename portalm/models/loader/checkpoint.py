"""A checkpoint: a model's shape and its tensors by name, whatever the files look like."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
        num_tensors: int,
        *,
        rename: Callable[[str], str] = str,
        progress: LoadProgress | None = None,
    ) -> None:
        """Nothing is read yet.

        Args:
            checkpoint: where they are.
            num_tensors: that will be read.
            rename: the checkpoint's name of a tensor, from the model's.
            progress: told the share of the tensors that are read.
        """
        self._checkpoint = checkpoint
        self._num_tensors = num_tensors
        self._rename = rename
        self._progress = progress
        self._read: set[str] = set()

    def tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The tensor; a `CheckpointError` naming it if it is not there or of another shape."""
        name = self._rename(name)
        tensor = self._checkpoint.tensor(name)
        self._took(name, tensor.shape, shape)
        return tensor

    def weight(self, name: str, shape: tuple[int, ...]) -> torch.Tensor | QuantizedWeight:
        """As `tensor`, of few bits where the file has it so."""
        name = self._rename(name)
        weight = self._checkpoint.weight(name)
        self._took(name, weight.shape, shape)
        return weight

    def _took(self, name: str, actual: torch.Size, shape: tuple[int, ...]) -> None:
        if tuple(actual) != shape:
            raise CheckpointError(
                self._checkpoint.path,
                f"tensor {name!r} is {list(actual)}, the model's config makes it {list(shape)}",
            )
        self._read.add(name)
        if self._progress is not None:
            self._progress(min(1.0, len(self._read) / self._num_tensors))

    def check_complete(self) -> None:
        """A `CheckpointError` for a bias that lies beside a weight and was not read.

        The config then does not speak of it, and the answers would be wrong without it.
        """
        for name in self._checkpoint.names():
            stem, _, kind = name.rpartition(".")
            if kind == "bias" and name not in self._read and f"{stem}.weight" in self._read:
                raise CheckpointError(
                    self._checkpoint.path,
                    f"tensor {name!r} is there, and the model's config makes none of it",
                )
