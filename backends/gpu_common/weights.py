"""Linear weights in the layouts that the kernels read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from portalm.backend import QUANTIZED_FORMATS, QuantizedWeight
from portalm.errors import BackendError
from portalm_backends.portable.rounding import round_to

QUANTIZATIONS = frozenset(QUANTIZED_FORMATS)
"""Formats that `pack` accepts, or quantizes to, on every device."""

FP8 = "fp8"
"""Format that `pack` also quantizes to on devices that multiply float8 with a scale per row and
per column (`kernels.fp8.dtype_of`)."""


@dataclass(slots=True)
class PackedQuantized:
    """A quantized weight [N, K] in the layout of kernels/matmul.py; activations are not quantized.

    The groups of K are the outermost dimension, so that the rows of one program are contiguous.
    """

    codes: torch.Tensor
    """int8 [K / group, N, bytes per group]. 4-bit codes are two per byte, the first in the low
    half. Without minimums, codes are signed: the zero point is already subtracted."""
    scales: torch.Tensor
    """float16 [K / group, N]; float32 if float16 cannot represent all of them, or all of those
    of another expert in the same layer."""
    minimums: torch.Tensor | None
    """Same shape and rule for the dtype as `scales`; None if the format has no minimums."""
    bits: int
    """4 or 8"""
    group: int
    """Columns that share a scale."""
    k: int
    """Columns of the weight; the last group may be padded with zeros beyond them."""


@dataclass(frozen=True, slots=True)
class Fp8Weight:
    """A weight [N, K] in float8; activations are quantized to float8 as well, per row."""

    values: torch.Tensor
    """[N, K] of a float8 dtype."""
    scales: torch.Tensor
    """float32 [1, N]"""


GpuWeight = torch.Tensor | PackedQuantized | Fp8Weight


class Parts(NamedTuple):
    """A weight [N, K] as the arguments of a kernel."""

    values: torch.Tensor
    """[N, K], or the codes of `PackedQuantized`."""
    scales: torch.Tensor | None
    minimums: torch.Tensor | None
    bits: int
    """4 or 8 for codes, 16 for floats of any size."""
    group: int | None
    """Columns that share a scale; None for floats."""
    n: int
    k: int


def parts_of(weight: GpuWeight) -> Parts:
    """Split a packed weight into the arguments of a kernel."""
    if isinstance(weight, PackedQuantized):
        codes, n = weight.codes, weight.codes.shape[1]
        return Parts(codes, weight.scales, weight.minimums, weight.bits, weight.group, n, weight.k)
    if isinstance(weight, Fp8Weight):
        return Parts(weight.values, weight.scales, None, 16, None, *weight.values.shape)
    return Parts(weight, None, None, 16, None, *weight.shape)


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """The weights [N, K] of E experts, equal in format, shape and dtypes, for kernels/moe.py.

    It holds addresses only: the weights stay in their own tensors.
    """

    addresses: torch.Tensor
    """int64 [3, E]: addresses of values, scales and minimums; 0 if the format has none."""
    first: Parts
    """Weight of the first expert."""
    alignment: int
    """All addresses are multiples of this many bytes."""


def pack(
    weight: torch.Tensor | QuantizedWeight,
    device: torch.device,
    *,
    quantization: str | None = None,
    for_logits: bool = False,
    fp8: torch.dtype | None = None,
) -> GpuWeight:
    """Copy a linear weight [N, K] to `device` and quantize it if asked to; see `Backend.pack`.

    Args:
        weight: on the host; a `QuantizedWeight` keeps its codes and ignores `quantization`.
        device: target; quantization runs there.
        quantization: format to quantize a tensor to, one of `QUANTIZATIONS` or `FP8`.
        for_logits: the weight is used by `logits`, which does not support `FP8`.
        fp8: the device's float8 dtype, None if it cannot multiply float8.

    Raises:
        BackendError: the shape, the device or `for_logits` rules out `quantization`.
    """
    if isinstance(weight, QuantizedWeight):
        return pack_quantized(_on(weight, device))
    weight = weight.to(device).contiguous()
    if quantization is None:
        return weight
    if quantization == FP8 and not for_logits:
        return _as_fp8(weight, fp8)
    if quantization not in QUANTIZATIONS:
        raise BackendError("unsupported", f"cannot quantize this weight to {quantization!r}")
    columns = weight.shape[1]
    padded = F.pad(weight, (0, -columns % QUANTIZED_FORMATS[quantization]))  # to whole groups
    return pack_quantized(round_to(padded, quantization), columns)


def _on(weight: QuantizedWeight, device: torch.device) -> QuantizedWeight:
    return QuantizedWeight(
        format=weight.format,
        codes=weight.codes.to(device),
        scales=weight.scales.to(device),
        zero=weight.zero,
        minimums=None if weight.minimums is None else weight.minimums.to(device),
    )


def pack_quantized(weight: QuantizedWeight, k: int | None = None) -> PackedQuantized:
    """Convert `weight` to the layout of the kernels, with `k` columns (None: all)."""
    rows, columns = weight.codes.shape
    group = QUANTIZED_FORMATS[weight.format]
    bits = 8 if weight.format.startswith("int8") else 4
    codes = weight.codes.view(rows, columns // group, group).transpose(
        0, 1
    )  # [K / group, N, group]
    minimums, zero = weight.minimums, weight.zero
    if bits == 8 and minimums is not None:  # make the codes signed, as int8 is in the kernels
        minimums, zero = minimums + 128 * weight.scales, 128
    codes = codes - zero  # uint8 wraps around, which gives two's complement
    if bits == 4:
        codes = (codes[..., 0::2] & 15) | (codes[..., 1::2] << 4)
    return PackedQuantized(
        codes=codes.contiguous().view(torch.int8),
        scales=_by_group(weight.scales),
        minimums=None if minimums is None else _by_group(minimums),
        bits=bits,
        group=group,
        k=columns if k is None else k,
    )


def _by_group(x: torch.Tensor) -> torch.Tensor:
    """Transpose float32 [N, K / group] to [K / group, N]; in float16 if that is lossless."""
    half = x.half()
    return (half if torch.equal(half.float(), x) else x).t().contiguous()


def _as_fp8(weight: torch.Tensor, fp8: torch.dtype | None) -> Fp8Weight:
    if fp8 is None:
        raise BackendError("unsupported", "this device cannot multiply float8 with a scale per row")
    if weight.dtype != torch.bfloat16:
        raise BackendError(
            "unsupported",
            f"float8 weights need a bfloat16 model, this one is {weight.dtype}: "
            f"use --dtype bfloat16",
        )
    if weight.shape[0] % 16 or weight.shape[1] % 16:
        raise BackendError(
            "unsupported",
            f"a weight of shape {list(weight.shape)} cannot be float8: rows and columns must be "
            f"multiples of 16",
        )
    wide = weight.float()
    scales = (wide.abs().amax(dim=1) / torch.finfo(fp8).max).clamp(min=1e-12)  # [N]
    return Fp8Weight((wide / scales[:, None]).to(fp8), scales[None, :])


def group_experts(
    weights: Sequence[GpuWeight], put: Callable[[npt.NDArray[np.int64]], torch.Tensor]
) -> ExpertWeights | None:
    """Group the packed weights of experts for one launch; None if format, shape or dtypes differ.

    The weights must outlive the result. If scales or minimums are float32 in some of the experts,
    those of the others are converted to float32 in place, which loses nothing.

    Args:
        weights: packed weight of each expert.
        put: copies an array to the device.
    """
    _match_scale_dtypes([weight for weight in weights if isinstance(weight, PackedQuantized)])
    parts = [parts_of(weight) for weight in weights]
    if len({_signature(part) for part in parts}) > 1:
        return None
    addresses = np.array(
        [[0 if x is None else x.data_ptr() for x in part[:3]] for part in parts], np.int64
    )
    alignment = 1 if (addresses % 16).any() else 16
    return ExpertWeights(put(np.ascontiguousarray(addresses.T)), parts[0], alignment)


def _match_scale_dtypes(weights: Sequence[PackedQuantized]) -> None:
    if len({weight.scales.dtype for weight in weights}) > 1:
        for weight in weights:
            weight.scales = weight.scales.float()
    if len({weight.minimums.dtype for weight in weights if weight.minimums is not None}) > 1:
        for weight in weights:
            weight.minimums = None if weight.minimums is None else weight.minimums.float()


def _signature(part: Parts) -> tuple[Any, ...]:
    """Everything about a weight that the kernel assumes to be equal for all experts."""
    tensors = tuple(None if x is None else (x.dtype, x.shape) for x in part[:3])
    return (*tensors, *part[3:])
