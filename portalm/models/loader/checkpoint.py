"""The interface of checkpoints: a model's config and its tensors by name, in any file format."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from portalm.backend import QuantizedWeight
from portalm.config import ModelConfig
from portalm.errors import CheckpointError

if TYPE_CHECKING:
    import torch


LoadProgress = Callable[[float], None]
"""Called with the share of the tensors that are loaded, 0 to 1."""


RowOrder = Callable[["torch.Tensor"], "torch.Tensor"]
"""Reorders the rows of a tensor [N, ...], or selects some of them."""


def reorder_rows(
    weight: torch.Tensor | QuantizedWeight, order: RowOrder
) -> torch.Tensor | QuantizedWeight:
    """Apply `order` to the rows of a weight [N, K], quantized or not."""
    if not isinstance(weight, QuantizedWeight):
        return order(weight)
    return replace(
        weight,
        codes=order(weight.codes),
        scales=order(weight.scales),
        minimums=None if weight.minimums is None else order(weight.minimums),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredForm:
    """Which tensors of a checkpoint already have the form that the model computes with.

    Hugging Face checkpoints of some families store tensors in another form, which `LayerReader`
    converts while loading. A file format that stores the model's form sets the fields below, and
    the conversion is skipped.
    """

    has_model_row_order: bool = False
    """Rows of merged projections are in the model's order: all queries, all keys, all values.
    False: in the order of the family's Hugging Face checkpoints."""
    has_full_norms: bool = False
    """Norm weights are stored as they are multiplied. False: as the family's Hugging Face
    checkpoints have them, which may be minus 1."""
    has_rows_first: bool = False
    """Linear weights are [N, K]. False: as the family's Hugging Face checkpoints have them, which
    may be [K, N]."""
    has_separate_experts: bool = False
    """Each expert has gate, up and down tensors of its own. False: as the family's Hugging Face
    checkpoints have them, which may be one tensor for all experts."""
    has_stacked_norms: bool = False
    """The norms of all heads of a layer are one tensor. False: each head has a tensor."""


HF_FORM = StoredForm()
"""Every tensor has the form of the family's Hugging Face checkpoints."""


class Checkpoint(Protocol):
    """Named tensors on the host. Names are Hugging Face's, in every file format."""

    path: Path
    config: ModelConfig
    form: StoredForm

    def names(self) -> Sequence[str]:
        """Names of all tensors."""
        ...

    def tensor(self, name: str) -> torch.Tensor:
        """Read a tensor in the file's dtype; a quantized one is dequantized to float32.

        Raises:
            CheckpointError: there is no such tensor, or the file is broken.
        """
        ...

    def weight(self, name: str) -> torch.Tensor | QuantizedWeight:
        """Read a tensor, keeping a quantized matrix quantized if `QuantizedWeight` can hold it."""
        ...

    def unread(self) -> Sequence[str]:
        """Names of the tensors that were not read; one that `names` omits by its name in the file.

        A part of a quantized weight counts as a tensor.
        """
        ...

    def close(self) -> None:
        """Close the files; tensors returned earlier stay valid."""
        ...


_PLAIN_DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "bool")


def check_dtype(path: Path, name: str, dtype: str) -> None:
    """Check that a weight is not quantized: its numbers are the model's, without a scale.

    Raises:
        CheckpointError: `dtype`, by torch's name, is not one that unquantized weights have.
    """
    if dtype not in _PLAIN_DTYPES:
        raise CheckpointError(
            path,
            f"tensor {name!r} is {dtype}, which only quantized weights are, but no quantization "
            f"settings with its scale were found (quantization_config in config.json, or "
            f"hf_quant_config.json)",
        )


class TensorReader:
    """Reads a model's tensors one by one, checks their shapes and reports progress."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        num_tensors: int,
        *,
        rename: Callable[[str], str] = str,
        progress: LoadProgress | None = None,
    ) -> None:
        """Read tensors of `checkpoint`.

        Args:
            checkpoint: holds the tensors.
            num_tensors: number of tensors that will be read, for `progress`.
            rename: maps the model's name of a tensor to the checkpoint's.
            progress: called with the share of the tensors read so far.
        """
        self.form = checkpoint.form
        self._checkpoint = checkpoint
        self._num_tensors = num_tensors
        self._rename = rename
        self._progress = progress
        self._read: set[str] = set()

    def tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Read a tensor.

        Raises:
            CheckpointError: it is missing, its shape is not `shape`, or its dtype is not that of
                an unquantized weight.
        """
        name = self._rename(name)
        tensor = self._checkpoint.tensor(name)
        self._record(name, tensor, shape)
        return tensor

    def weight(self, name: str, shape: tuple[int, ...]) -> torch.Tensor | QuantizedWeight:
        """Read a tensor, keeping it quantized as `Checkpoint.weight` does.

        Raises:
            CheckpointError: as `tensor`.
        """
        name = self._rename(name)
        weight = self._checkpoint.weight(name)
        self._record(name, weight, shape)
        return weight

    def _record(
        self, name: str, tensor: torch.Tensor | QuantizedWeight, shape: tuple[int, ...]
    ) -> None:
        """Check the shape and the dtype of a tensor that was read, and report progress."""
        if tuple(tensor.shape) != shape:
            raise CheckpointError(
                self._checkpoint.path,
                f"tensor {name!r} has shape {list(tensor.shape)}, but the model's config requires "
                f"{list(shape)}",
            )
        if not isinstance(tensor, QuantizedWeight):
            check_dtype(self._checkpoint.path, name, str(tensor.dtype).removeprefix("torch."))
        self._read.add(name)
        if self._progress is not None:
            self._progress(min(1.0, len(self._read) / self._num_tensors))
