"""The KV cache as one tensor [L, P, NB, B, H_kv, D], or as 8-bit codes and their scales.

P is 2 (keys, then values), or 1 where values are part of their keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from portalm.backend import SCALED_KV_DTYPES, KVSpec, StepMeta
from portalm_backends.portable import kv_codes

DTYPES = frozenset({"float32", "float16", "bfloat16"})
"""Data types of activations, and of unquantized keys and values."""

KV_DTYPES = frozenset({*DTYPES, *SCALED_KV_DTYPES})


@dataclass(frozen=True, slots=True)
class ScaledKV:
    """A cache of 8-bit codes with scales."""

    dtype: str
    codes: torch.Tensor
    """uint8 [L, P, NB, B, H_kv, D]: the bits of `kv_codes.CODE_DTYPES[dtype]`, because torch cannot
    index 8-bit floats."""
    scales: torch.Tensor
    """bfloat16 [L, P, NB, B, H_kv]"""

    @property
    def shape(self) -> torch.Size:
        """[L, P, NB, B, H_kv, D], like the shape of an unquantized cache."""
        return self.codes.shape

    def values(self, layer: int, side: int, blocks: torch.Tensor) -> torch.Tensor:
        """Dequantize keys (side 0) or values (-1) of blocks int64 [N]: float32 [N, B, H_kv, D]."""
        codes = self.codes[layer, side, blocks].view(kv_codes.CODE_DTYPES[self.dtype])
        return kv_codes.dequantize(codes, self.scales[layer, side, blocks])


KV = torch.Tensor | ScaledKV


def allocate(spec: KVSpec, num_blocks: int) -> KV:
    """Allocate an uninitialized cache."""
    block = (spec.block_size, spec.num_kv_heads, spec.head_size)
    shape = (spec.num_layers, spec.num_planes, num_blocks, *block)
    if spec.dtype in SCALED_KV_DTYPES:
        codes = torch.empty(shape, dtype=torch.uint8)
        return ScaledKV(spec.dtype, codes, torch.empty(shape[:-1], dtype=torch.bfloat16))
    return torch.empty(shape, dtype=getattr(torch, spec.dtype))


def write(kv: KV, layer: int, key: torch.Tensor, value: torch.Tensor, meta: StepMeta) -> KV:
    """Scatter keys and values, [T, H_kv, D] each, to the slots in `meta.slot_mapping`."""
    slots = meta.slot_mapping.long()
    for side, x in enumerate((key, value)[: kv.shape[1]]):
        if isinstance(kv, ScaledKV):
            codes, scales = kv_codes.quantize(x, kv.dtype)
            kv.codes[layer, side].flatten(0, 1)[slots] = codes.view(torch.uint8)
            kv.scales[layer, side].flatten(0, 1)[slots] = scales
        else:
            kv[layer, side].flatten(0, 1)[slots] = x.to(kv.dtype)
    return kv


def read(kv: KV, layer: int, side: int, blocks: torch.Tensor) -> torch.Tensor:
    """Return keys (side 0) or values (-1) of blocks int64 [N]: float32 [N, B, H_kv, D]."""
    if isinstance(kv, ScaledKV):
        return kv.values(layer, side, blocks)
    return kv[layer, side, blocks].float()


def copy(kv: ScaledKV, src: torch.Tensor, dst: torch.Tensor) -> None:
    """Copy blocks src[i] to dst[i], int64 [N] each, over all layers."""
    for part in (kv.codes, kv.scales):
        part[:, :, dst] = part[:, :, src]


def export_blocks(kv: ScaledKV, blocks: torch.Tensor) -> torch.Tensor:
    """Return blocks int64 [N] in the wire layout: float32 [N, L, P, B, H_kv, D]."""
    codes = kv.codes[:, :, blocks].view(kv_codes.CODE_DTYPES[kv.dtype])
    wire = kv_codes.dequantize(codes, kv.scales[:, :, blocks])
    return wire.permute(2, 0, 1, 3, 4, 5).contiguous()


def import_blocks(kv: ScaledKV, blocks: torch.Tensor, wire: torch.Tensor) -> None:
    """Write blocks that are in the wire layout."""
    codes, scales = kv_codes.quantize(wire, kv.dtype)
    kv.codes[:, :, blocks] = codes.view(torch.uint8).permute(1, 2, 0, 3, 4, 5)
    kv.scales[:, :, blocks] = scales.permute(1, 2, 0, 3, 4)
