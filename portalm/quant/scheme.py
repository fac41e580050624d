"""What a scheme is, and what several of them share: unpacking, and integers times scales."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias, TypeVar

import numpy as np
import torch

from portalm.backend import QUANTIZED_FORMATS, QuantizedWeight
from portalm.errors import CheckpointError, UnsupportedModel

T = TypeVar("T")

Weight: TypeAlias = QuantizedWeight | torch.Tensor
"""[N, K]: of few bits, or float32 where no format of `QUANTIZED_FORMATS` has exactly its values."""


class Tensors(Protocol):
    """The tensors of a checkpoint's files, by the names they have there."""

    path: Path

    def names(self) -> Sequence[str]:
        """Every tensor there is."""
        ...

    def tensor(self, name: str) -> torch.Tensor:
        """As it is in the file; `CheckpointError` if it is not there."""
        ...


class LayerParts:
    """The tensors that one layer's weight is made of."""

    def __init__(
        self, tensors: Tensors, names: Container[str], layer: str, separator: str = "."
    ) -> None:
        """Those of `tensors`, which has `names`, that begin with `layer`'s and `separator`."""
        self._tensors = tensors
        self._names = names
        self._layer = layer
        self._separator = separator

    def has(self, name: str) -> bool:
        """True if there is such a part."""
        return f"{self._layer}{self._separator}{name}" in self._names

    def get(self, name: str, *shape: int | None) -> torch.Tensor:
        """The part of this shape (None: any size; no shape at all: any).

        Raises:
            CheckpointError: it is not there, or of another shape.
        """
        tensor = self._tensors.tensor(f"{self._layer}{self._separator}{name}")
        fits = len(shape) == tensor.ndim and all(
            wanted in (None, size) for wanted, size in zip(shape, tensor.shape, strict=False)
        )
        if shape and not fits:
            sizes = ["any" if size is None else size for size in shape]
            raise self.error(f"{name} is {list(tensor.shape)}, its layer makes it {sizes}")
        return tensor

    def error(self, reason: str) -> CheckpointError:
        """To raise when parts do not go together."""
        return CheckpointError(self._tensors.path, f"{self._layer}: {reason}")


class Scheme(Protocol):
    """One way of writing weights of few bits."""

    @property
    def name(self) -> str:
        """What users call it."""
        ...

    @property
    def separator(self) -> str:
        """What stands between the name of a layer and that of its part."""
        ...

    @property
    def marks(self) -> tuple[str, ...]:
        """A layer that has one of these parts is written so; others are as they always are."""
        ...

    @property
    def parts(self) -> tuple[str, ...]:
        """All parts that its layers may have: no tensors of their own."""
        ...

    def read(self, parts: LayerParts) -> Weight:
        """The weight of a layer; `CheckpointError` if its parts do not go together."""
        ...


def setting(config: Mapping[str, Any], name: str, among: Sequence[T], default: T) -> T:
    """A value of quantization_config; `UnsupportedModel` if it is none of `among`."""
    value = config.get(name)
    if value is None:
        return default
    if value not in among:
        raise UnsupportedModel(
            f"config.json: quantization_config with {name} {value!r} is not supported; "
            f"{', '.join(map(str, among))} are"
        )
    found: T = value
    return found


def unpacked(words: torch.Tensor, bits: int, *, along_rows: bool) -> torch.Tensor:
    """Codes out of int32 [R, C], the first in the lowest bits: uint8.

    Args:
        words: each holds 32 / `bits` codes.
        bits: 4 or 8.
        along_rows: a word's codes are of one column: [R * 32 / bits, C]; else of one row.
    """
    per_word = 32 // bits
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    values = np.ascontiguousarray(words.numpy()).view(np.uint32)
    mask = np.uint32((1 << bits) - 1)
    rows, columns = values.shape
    if along_rows:
        codes = (values[:, None, :] >> shifts[None, :, None]) & mask
        shape = (rows * per_word, columns)
    else:
        codes = (values[:, :, None] >> shifts[None, None, :]) & mask
        shape = (rows, columns * per_word)
    return torch.from_numpy(codes.reshape(shape).astype(np.uint8))


def grouped(
    codes: torch.Tensor, scales: torch.Tensor, *, bits: int, zeros: torch.Tensor | None = None
) -> Weight:
    """scale * (code - zero) by groups of K.

    Args:
        codes: uint8 [N, K]
        scales: [N, G], G groups of the same size.
        bits: of a code: 4 or 8.
        zeros: [N, G] the code that stands for 0 in each group; None: half of all codes.
    """
    scales = scales.float()
    group = codes.shape[1] // scales.shape[1]
    half = 1 << (bits - 1)
    if group % QUANTIZED_FORMATS["int4"]:
        return widened(codes, scales, half if zeros is None else zeros)
    repeats = group // QUANTIZED_FORMATS["int4"]
    repeated = scales.repeat_interleave(repeats, dim=1)
    if zeros is None:
        name = "int4" if bits == 4 else "int8"
        return QuantizedWeight(format=name, codes=codes.contiguous(), scales=repeated, zero=half)
    minimums = (-scales * zeros).repeat_interleave(repeats, dim=1)
    return QuantizedWeight(
        format="int4_min" if bits == 4 else "int8_min",
        codes=codes.contiguous(),
        scales=repeated,
        minimums=minimums,
    )


def widened(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | int) -> torch.Tensor:
    """scale * (code - zero) of codes [N, K], scales and zeros [N, G], in float32: [N, K]."""
    rows, columns = codes.shape
    by_group = codes.float().view(rows, scales.shape[1], -1)
    if isinstance(zeros, torch.Tensor):
        zeros = zeros.float()[:, :, None]
    return ((by_group - zeros) * scales[:, :, None]).view(rows, columns)


def of_columns(
    codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, groups: torch.Tensor
) -> torch.Tensor:
    """The same, where column k of K is of group groups[k]: float32 [N, K]."""
    return (codes.float() - zeros.float()[:, groups]) * scales.float()[:, groups]


def scaled_by_blocks(
    weight: torch.Tensor, scales: torch.Tensor, block: tuple[int, int] | None = None
) -> torch.Tensor:
    """weight [N, K] times scales [A, B], float32.

    Args:
        weight: of any float type.
        scales: one for each block.
        block: its rows and columns, the last ones may be smaller; None: A and B divide N and K.
    """
    sizes = block or (weight.shape[0] // scales.shape[0], weight.shape[1] // scales.shape[1])
    if scales.numel() == 1:
        sizes = (weight.shape[0], weight.shape[1])
    for dim, size in enumerate(sizes):
        scales = scales.repeat_interleave(size, dim=dim).narrow(dim, 0, weight.shape[dim])
    return weight.float() * scales.float()
