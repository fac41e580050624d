"""The interface of a quantization scheme, and helpers to unpack codes and apply scales."""

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
"""[N, K]: quantized, or float32 if no format of `QUANTIZED_FORMATS` has exactly its values."""


WORDS = (torch.int32,)
"""Dtype of packed codes."""
INDEXES = (torch.int32, torch.int64)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Dtypes of scales."""
FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)


class Tensors(Protocol):
    """Tensors of a checkpoint's files, by their names in the files."""

    path: Path

    def names(self) -> Sequence[str]:
        """Names of all tensors."""
        ...

    def tensor(self, name: str) -> torch.Tensor:
        """Read a tensor as stored; raise `CheckpointError` if it is missing."""
        ...


class LayerParts:
    """The tensors that store one layer's weight."""

    def __init__(
        self, tensors: Tensors, names: Container[str], layer: str, separator: str = "."
    ) -> None:
        """Access the tensors of `layer`.

        Args:
            tensors: reads a tensor.
            names: names of all tensors.
            layer: the layer's name.
            separator: between the name of the layer and that of a part.
        """
        self.layer = layer
        self._tensors = tensors
        self._names = names
        self._separator = separator

    def has(self, name: str) -> bool:
        """True if the layer has this part."""
        return f"{self.layer}{self._separator}{name}" in self._names

    def get(self, name: str, *shape: int | None, dtypes: tuple[torch.dtype, ...]) -> torch.Tensor:
        """Read a part.

        Args:
            name: name of the part.
            shape: sizes that it must have; None: any size. Without sizes, any shape.
            dtypes: it must have one of them.

        Raises:
            CheckpointError: the part is missing, or has another shape or dtype.
        """
        tensor = self._tensors.tensor(f"{self.layer}{self._separator}{name}")
        fits = len(shape) == tensor.ndim and all(
            wanted in (None, size) for wanted, size in zip(shape, tensor.shape, strict=False)
        )
        if shape and not fits:
            sizes = ["any" if size is None else size for size in shape]
            raise self.error(f"{name} has shape {list(tensor.shape)}, expected {sizes}")
        if tensor.dtype not in dtypes:
            named = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise self.error(f"{name} is {tensor.dtype}, expected {named}")
        return tensor

    def error(self, reason: str) -> CheckpointError:
        """An error about the layer's parts, for the caller to raise."""
        return CheckpointError(self._tensors.path, f"{self.layer}: {reason}")


class Scheme(Protocol):
    """Reads the quantized weights of one checkpoint format."""

    @property
    def name(self) -> str:
        """Name in `--quantization`."""
        ...

    @property
    def separator(self) -> str:
        """Text between the name of a layer and the name of its part."""
        ...

    @property
    def marks(self) -> tuple[str, ...]:
        """Parts that only quantized layers have; a layer without one is stored unquantized."""
        ...

    @property
    def parts(self) -> tuple[str, ...]:
        """All parts that `read` uses if a layer has them; they are not tensors of the model."""
        ...

    @property
    def unused(self) -> tuple[str, ...]:
        """Parts that do not change a weight, such as scales of activations."""
        ...

    def read(self, parts: LayerParts) -> Weight:
        """Read a layer's weight; raise `CheckpointError` if its parts do not fit together."""
        ...


E2M1_HALVES = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
"""Twice the value of each 4-bit float of the format e2m1 (Open Compute Project, MX, 2023)."""


def unpacked_e2m1(pairs: torch.Tensor) -> torch.Tensor:
    """Unpack 4-bit floats, two in a byte, low nibble first.

    Args:
        pairs: uint8 [..., C].

    Returns:
        uint8 [..., 2 C], 128 + twice the value.
    """
    nibbles = torch.stack((pairs & 0x0F, pairs >> 4), dim=-1).flatten(-2)
    return torch.tensor([128 + half for half in E2M1_HALVES], dtype=torch.uint8)[nibbles.int()]


def nvfp4(pairs: torch.Tensor, scales: torch.Tensor, scale: float) -> torch.Tensor:
    """Dequantize NVFP4: 4-bit floats with a scale for each 16 columns, and one for all.

    Args:
        pairs: uint8 [N, K / 2], two e2m1 floats in a byte, low nibble first.
        scales: float8_e4m3fn [N, K / 16].
        scale: multiplies all scales.

    Returns:
        float32 [N, K].
    """
    codes = unpacked_e2m1(pairs)
    return dequantized(codes, scales.float() * (scale / 2), 128)


def num_groups(parts: LayerParts, num_columns: int, group_size: int) -> int:
    """Groups of `group_size` columns that cover a row; a group size of -1: one for all columns."""
    if group_size == 0 or group_size < -1:
        raise parts.error(f"group_size {group_size} is not a positive number or -1")
    return 1 if group_size == -1 else -(-num_columns // group_size)


def setting(config: Mapping[str, Any], name: str, among: Sequence[T], default: T) -> T:
    """Read a value of quantization_config; raise `UnsupportedModel` if it is not in `among`."""
    value = config.get(name)
    if value is None:
        return default
    if value not in among:
        raise UnsupportedModel(
            f"config.json: quantization_config with {name} {value!r} is not supported; "
            f"supported: {', '.join(map(str, among))}"
        )
    found: T = value
    return found


def unpacked(words: torch.Tensor, bits: int, *, along_rows: bool) -> torch.Tensor:
    """Unpack uint8 codes from int32 words [R, C]; a word's first code is in its lowest bits.

    Args:
        words: each holds 32 / `bits` codes.
        bits: 4 or 8.
        along_rows: a word holds codes of one column, and the result is [R * 32 / bits, C].
            False: codes of one row, [R, C * 32 / bits].
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
    """Build the weight scale * (code - zero), with scales and zeros per group of columns.

    Args:
        codes: uint8 [N, K].
        scales: [N, G], G groups of the same size.
        bits: size of a code, 4 or 8.
        zeros: [N, G], the code that represents 0 in each group; None: 2^(bits - 1).

    Returns:
        [N, K]: quantized, or float32 if the group size is not a multiple of 32.
    """
    scales = scales.float()
    group = codes.shape[1] // scales.shape[1]
    half = 1 << (bits - 1)
    if group % QUANTIZED_FORMATS["int4"]:
        return dequantized(codes, scales, half if zeros is None else zeros)
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


def dequantized(
    codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | int
) -> torch.Tensor:
    """Compute scale * (code - zero) in float32 [N, K]; codes [N, K], scales and zeros [N, G]."""
    rows, columns = codes.shape
    by_group = codes.float().view(rows, scales.shape[1], -1)
    if isinstance(zeros, torch.Tensor):
        zeros = zeros.float()[:, :, None]
    return ((by_group - zeros) * scales[:, :, None]).view(rows, columns)


def dequantized_by_column(
    codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, groups: torch.Tensor
) -> torch.Tensor:
    """As `dequantized`, with column k in group groups[k]; groups int64 [K]."""
    return (codes.float() - zeros.float()[:, groups]) * scales.float()[:, groups]


def scaled_by_blocks(
    weight: torch.Tensor, scales: torch.Tensor, block: tuple[int, int] | None = None
) -> torch.Tensor:
    """Multiply weight [N, K] by scales [A, B] of its blocks, in float32.

    Args:
        weight: any float dtype.
        scales: one for each block.
        block: rows and columns of a block; the last ones may be smaller. None: N / A and K / B.
    """
    sizes = block or (weight.shape[0] // scales.shape[0], weight.shape[1] // scales.shape[1])
    if scales.numel() == 1:
        sizes = (weight.shape[0], weight.shape[1])
    for dim, size in enumerate(sizes):
        scales = scales.repeat_interleave(size, dim=dim).narrow(dim, 0, weight.shape[dim])
    return weight.float() * scales.float()
