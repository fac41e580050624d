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
"""What `pack` takes as it is, or rounds to, on every device."""

FP8 = "fp8"
"""What `pack` rounds to where the device multiplies float8 by rows and columns of their own scale
(`kernels.fp8.dtype_of`)."""


@dataclass(slots=True)
class FewBitWeight:
    """A weight [N, K] of few bits: kernels/matmul.py multiplies activations as they are with it.

    Group by group of K, so that the rows of one program lie end to end.
    """

    codes: torch.Tensor
    """int8 [K / group, N, bytes of a group]: two codes of 4 bits a byte, the first one low; where
    there are no minimums, two's complement: less the code that stands for 0."""
    scales: torch.Tensor
    """float16 [K / group, N]; float32 where float16 has not all of its values, or not those of
    the experts it is one of"""
    minimums: torch.Tensor | None
    """The same."""
    bits: int
    """4 or 8"""
    group: int
    k: int
    """Columns; the last group may have more, of zeros."""


@dataclass(frozen=True, slots=True)
class Fp8Weight:
    """A weight [N, K] in float8: activations are rounded to float8 as well, row by row."""

    values: torch.Tensor
    """[N, K] of a float8 dtype."""
    scales: torch.Tensor
    """float32 [1, N]"""


GpuWeight = torch.Tensor | FewBitWeight | Fp8Weight


class Parts(NamedTuple):
    """What kernels are given of a weight [N, K]."""

    values: torch.Tensor
    """[N, K], or codes of few bits."""
    scales: torch.Tensor | None
    minimums: torch.Tensor | None
    bits: int
    """4 or 8 for codes of few bits, 16 for floats of any size."""
    group: int | None
    """Columns that share a scale, of few bits."""
    n: int
    k: int


def parts_of(weight: GpuWeight) -> Parts:
    """A packed weight, taken apart."""
    if isinstance(weight, FewBitWeight):
        codes, n = weight.codes, weight.codes.shape[1]
        return Parts(codes, weight.scales, weight.minimums, weight.bits, weight.group, n, weight.k)
    if isinstance(weight, Fp8Weight):
        return Parts(weight.values, weight.scales, None, 16, None, *weight.values.shape)
    return Parts(weight, None, None, 16, None, *weight.shape)


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """One weight [N, K] of each of E experts, alike but for their numbers, for kernels/moe.py.

    They stay where each was packed: nothing is copied.
    """

    places: torch.Tensor
    """int64 [3, E]: addresses of values, scales and minimums; 0 where there are none."""
    first: Parts
    """The first expert's."""
    alignment: int
    """All addresses are multiples of so many bytes."""


def pack(
    weight: torch.Tensor | QuantizedWeight,
    device: torch.device,
    *,
    quantization: str | None = None,
    for_logits: bool = False,
    fp8: torch.dtype | None = None,
) -> GpuWeight:
    """A linear weight [N, K] on `device`, as `Backend.pack` words it.

    Args:
        weight: on the host; of few bits, it keeps its codes whatever `quantization` says.
        device: where it goes; all rounding is done there.
        quantization: what a tensor is rounded to, one of `QUANTIZATIONS` or `FP8`.
        for_logits: `logits` reads it: its products are not those of float8.
        fp8: the device's float8, None if it has none.

    Raises:
        BackendError: the shape, the device or `for_logits` does not go with `quantization`.
    """
    if isinstance(weight, QuantizedWeight):
        return few_bits(_on(weight, device))
    weight = weight.to(device).contiguous()
    if quantization is None:
        return weight
    if quantization == FP8 and not for_logits:
        return _as_fp8(weight, fp8)
    if quantization not in QUANTIZATIONS:
        raise BackendError("unsupported", f"weights cannot be rounded to {quantization!r}")
    columns = weight.shape[1]
    whole = F.pad(weight, (0, -columns % QUANTIZED_FORMATS[quantization]))  # groups
    return few_bits(round_to(whole, quantization), columns)


def _on(weight: QuantizedWeight, device: torch.device) -> QuantizedWeight:
    return QuantizedWeight(
        format=weight.format,
        codes=weight.codes.to(device),
        scales=weight.scales.to(device),
        zero=weight.zero,
        minimums=None if weight.minimums is None else weight.minimums.to(device),
    )


def few_bits(weight: QuantizedWeight, k: int | None = None) -> FewBitWeight:
    """`weight` in the layout of the kernels, with `k` columns (None: all)."""
    rows, columns = weight.codes.shape
    group = QUANTIZED_FORMATS[weight.format]
    bits = 8 if weight.format.startswith("int8") else 4
    codes = weight.codes.view(rows, columns // group, group).transpose(
        0, 1
    )  # [K / group, N, group]
    minimums, zero = weight.minimums, weight.zero
    if bits == 8 and minimums is not None:  # codes have a sign there
        minimums, zero = minimums + 128 * weight.scales, 128
    codes = codes - zero  # uint8 wraps around: two's complement
    if bits == 4:
        codes = (codes[..., 0::2] & 15) | (codes[..., 1::2] << 4)
    return FewBitWeight(
        codes=codes.contiguous().view(torch.int8),
        scales=_by_group(weight.scales),
        minimums=None if minimums is None else _by_group(minimums),
        bits=bits,
        group=group,
        k=columns if k is None else k,
    )


def _by_group(x: torch.Tensor) -> torch.Tensor:
    """float32 [N, K / group] as [K / group, N]: in float16 where that has all of its values."""
    half = x.half()
    return (half if torch.equal(half.float(), x) else x).t().contiguous()


def _as_fp8(weight: torch.Tensor, fp8: torch.dtype | None) -> Fp8Weight:
    if fp8 is None:
        raise BackendError("unsupported", "this device does not multiply float8 by rows")
    if weight.dtype != torch.bfloat16:
        raise BackendError(
            "unsupported",
            f"float8 products are bfloat16, the model is {weight.dtype}: use --dtype bfloat16",
        )
    if weight.shape[0] % 16 or weight.shape[1] % 16:
        raise BackendError(
            "unsupported",
            f"a weight {list(weight.shape)} cannot be float8: rows and columns come by 16",
        )
    wide = weight.float()
    scales = (wide.abs().amax(dim=1) / torch.finfo(fp8).max).clamp(min=1e-12)  # [N]
    return Fp8Weight((wide / scales[:, None]).to(fp8), scales[None, :])


def together(
    weights: Sequence[GpuWeight], put: Callable[[npt.NDArray[np.int64]], torch.Tensor]
) -> ExpertWeights | None:
    """Packed weights of experts as one; None if they are not of one kind and shape.

    They must live as long as what is returned. Of few bits, scales and minimums that are float32 in
    some become float32 in all, in place: no number changes.

    Args:
        weights: of each expert.
        put: a copy on the device.
    """
    _widen([weight for weight in weights if isinstance(weight, FewBitWeight)])
    parts = [parts_of(weight) for weight in weights]
    if len({_kind(part) for part in parts}) > 1:
        return None
    places = np.array(
        [[0 if x is None else x.data_ptr() for x in part[:3]] for part in parts], np.int64
    )
    alignment = 1 if (places % 16).any() else 16
    return ExpertWeights(put(np.ascontiguousarray(places.T)), parts[0], alignment)


def _widen(weights: Sequence[FewBitWeight]) -> None:
    if len({weight.scales.dtype for weight in weights}) > 1:
        for weight in weights:
            weight.scales = weight.scales.float()
    if len({weight.minimums.dtype for weight in weights if weight.minimums is not None}) > 1:
        for weight in weights:
            weight.minimums = None if weight.minimums is None else weight.minimums.float()


def _kind(part: Parts) -> tuple[Any, ...]:
    """All that a kernel takes for granted."""
    tensors = tuple(None if x is None else (x.dtype, x.shape) for x in part[:3])
    return (*tensors, *part[3:])
