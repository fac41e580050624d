"""Keys and values in codes of 8 bits with their scales (`SCALED_KV_DTYPES`), by torch."""

from __future__ import annotations

import torch

from portalm.backend import SCALED_KV_DTYPES, KVSpec

CODE_DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
"""What codes are, by the name of the KV dtype."""

SMALLEST_SCALE = 2.0**-100
"""Smaller ones are 0: no code times its scale, and no 1 / scale, leaves float32's normal range."""


def bytes_per_block(spec: KVSpec) -> int:
    """Bytes of one block over all layers, in floats or in codes with a bfloat16 scale each."""
    if spec.dtype in SCALED_KV_DTYPES:
        vector = spec.head_size + torch.bfloat16.itemsize
    else:
        vector = spec.head_size * int(getattr(torch, spec.dtype).itemsize)
    return spec.num_layers * spec.num_planes * spec.block_size * spec.num_kv_heads * vector


def quantize(x: torch.Tensor, dtype: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [..., D] of `x` [..., D] and their scales, bfloat16 [...]."""
    x = x.float()
    scales = x.abs().amax(dim=-1) * (1.0 / SCALED_KV_DTYPES[dtype])  # a NaN stays one
    scales = scales.bfloat16().float()
    is_kept = (scales >= SMALLEST_SCALE) & scales.isfinite()
    scaled = x * torch.where(is_kept, 1.0 / scales, 0.0)[..., None]
    codes = torch.where(is_kept[..., None], scaled, 0.0)
    if dtype == "int8":
        codes = codes.round()
    scales = torch.where(is_kept, scales, torch.where(scales < SMALLEST_SCALE, 0.0, torch.nan))
    return codes.to(CODE_DTYPES[dtype]), scales.bfloat16()


def dequantize(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """What `codes` [..., D] of `scales` [...] stand for: float32 [..., D], exactly."""
    return codes.float() * scales.float()[..., None]
