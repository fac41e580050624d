"""8-bit keys and values with their scales (`SCALED_KV_DTYPES`), in torch."""

from __future__ import annotations

import torch

from portalm.backend import SCALED_KV_DTYPES, KVSpec

CODE_DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
"""Data type of the codes, by KV dtype."""

SMALLEST_SCALE = 2.0**-100
"""Smaller scales become 0, so that code * scale and 1 / scale stay normal float32 numbers."""


def bytes_per_block(spec: KVSpec) -> int:
    """Bytes of one block over all layers: floats, or codes with a bfloat16 scale per vector."""
    if spec.dtype in SCALED_KV_DTYPES:
        vector = spec.head_size + torch.bfloat16.itemsize
    else:
        vector = spec.head_size * int(getattr(torch, spec.dtype).itemsize)
    return spec.num_layers * spec.num_planes * spec.block_size * spec.num_kv_heads * vector


def quantize(x: torch.Tensor, dtype: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize `x` [..., D] to codes [..., D] and scales, bfloat16 [...]."""
    x = x.float()
    scales = x.abs().amax(dim=-1) * (1.0 / SCALED_KV_DTYPES[dtype])  # NaN stays NaN
    scales = scales.bfloat16().float()
    is_kept = (scales >= SMALLEST_SCALE) & scales.isfinite()
    scaled = x * torch.where(is_kept, 1.0 / scales, 0.0)[..., None]
    codes = torch.where(is_kept[..., None], scaled, 0.0)
    if dtype == "int8":
        codes = codes.round()
    scales = torch.where(is_kept, scales, torch.where(scales < SMALLEST_SCALE, 0.0, torch.nan))
    return codes.to(CODE_DTYPES[dtype]), scales.bfloat16()


def dequantize(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Values of `codes` [..., D] with `scales` [...]: float32 [..., D], exact."""
    return codes.float() * scales.float()[..., None]
