"""Quantize weights group by group, for `Backend.pack(quantization=...)`."""

from __future__ import annotations

import torch

from portalm.backend import QUANTIZED_FORMATS, QuantizedWeight


def round_to(weight: torch.Tensor, format: str) -> QuantizedWeight:
    """Quantize a weight [N, K] to one of `QUANTIZED_FORMATS`; K must be a multiple of the group.

    The extremes of a group are representable. int4 assigns the code -8, which has no positive
    counterpart, to the value of the largest magnitude. Scales and minimums are rounded to float16
    where that is precise enough, so that a device may store them in 16 bits.

    Raises:
        ValueError: K is not a multiple of the format's group.
    """
    group = QUANTIZED_FORMATS[format]
    rows, columns = weight.shape
    if columns % group:
        raise ValueError(f"{format} has groups of {group} columns; {columns} is not a multiple")
    parts = weight.float().view(rows, columns // group, group)
    minimums = None
    if format.endswith("_min"):
        minimums = _half(parts.amin(dim=-1))
        largest = 255 if format.startswith("int8") else 15
        scales, zero = (parts.amax(dim=-1) - minimums) / largest, 0
    elif format == "int4":
        place = parts.abs().argmax(dim=-1, keepdim=True)
        scales, zero, largest = parts.gather(-1, place)[..., 0] / -8, 8, 15
    else:
        scales, zero, largest = parts.abs().amax(dim=-1) / 127, 128, 255
    scales = _half(scales)
    divisors = torch.where(scales == 0, 1.0, scales)[..., None]
    offset = parts if minimums is None else parts - minimums[..., None]
    codes = ((offset / divisors).round() + zero).clamp(0, largest)
    return QuantizedWeight(
        format=format,
        codes=codes.to(torch.uint8).view(rows, columns),
        scales=scales,
        zero=zero,
        minimums=minimums,
    )


def _half(x: torch.Tensor) -> torch.Tensor:
    """Round float32 to float16 where that is a normal number; keep other values."""
    half = x.half().float()
    is_normal = (x.abs() >= torch.finfo(torch.float16).tiny) & half.isfinite()
    return torch.where(is_normal, half, x)
