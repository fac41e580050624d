"""The KV cache as one tensor: [L, NB, H_kv, 2, B, D].

Within a layer, the part of a block that belongs to one KV head is contiguous: B keys, then B
values. The attention kernel reads exactly that, so each entry of the block table gives loads of
whole memory rows (8 KiB with B 16, D 128 and 16-bit elements); with the head inside the token it
would read 256 bytes at a time. A block of a layer is contiguous too, so a copy moves it in one
piece. The layer is outermost so that one layer's attention touches few pages of the device's
address translation. Scales of 8-bit codes are in a separate tensor, [L, NB, H_kv, 2, B].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from portalm.backend import SCALED_KV_DTYPES, KVSpec, StepMeta
from portalm_backends.gpu_common.kernels.dependent_launch import options
from portalm_backends.gpu_common.kernels.kv_cache import (
    copy_kernel,
    rotate_write_kernel,
    write_kernel,
)
from portalm_backends.gpu_common.kernels.kv_codes import FP8, INT8
from portalm_backends.gpu_common.tiles import power_of_2
from portalm_backends.portable import kv_codes

DTYPES = frozenset({"float32", "float16", "bfloat16"})
"""Dtypes of the model and of unquantized keys and values."""

KV_DTYPES = frozenset({*DTYPES, *SCALED_KV_DTYPES})
"""On every GPU: the kernels decode 8-bit floats themselves."""

HEAD_SIZES = frozenset(range(16, 257, 8))
SHARED_HEAD_SIZES = frozenset(range(32, 577, 16))
"""Head sizes of caches whose values are part of their keys."""
BLOCK_SIZES = frozenset({8, 16, 32, 64, 128, 256})
"""Powers of 2 that divide the context length at which attention may be split."""

_COPY_WORDS = 4096


@dataclass(frozen=True, slots=True)
class ScaledKV:
    """A cache, or one layer of it, stored as 8-bit codes and scales."""

    dtype: str
    """One of `SCALED_KV_DTYPES`."""
    codes: torch.Tensor
    """int8 [L, NB, H_kv, 2, B, D]; the bits of fp8 values if `dtype` is fp8."""
    scales: torch.Tensor
    """bfloat16 [L, NB, H_kv, 2, B]"""

    def __getitem__(self, layer: int) -> ScaledKV:
        """The cache of one layer."""
        return ScaledKV(self.dtype, self.codes[layer], self.scales[layer])


KV = torch.Tensor | ScaledKV


def parts(kv: KV) -> tuple[torch.Tensor, torch.Tensor | None, int]:
    """Split a cache, or one layer of it, into kernel arguments: values, scales and CODES."""
    if isinstance(kv, ScaledKV):
        return kv.codes, kv.scales, {"int8": INT8, "fp8": FP8}[kv.dtype]
    return kv, None, 0


def allocate(spec: KVSpec, num_blocks: int, device: torch.device) -> KV:
    """Allocate an uninitialized cache, [L, NB, H_kv, P, B, D]; for 8-bit dtypes with scales.

    Args:
        spec: shape and dtype.
        num_blocks: NB, including the null block.
        device: the GPU.
    """
    block = (spec.num_planes, spec.block_size, spec.head_size)
    shape = (spec.num_layers, num_blocks, spec.num_kv_heads, *block)
    if spec.dtype in SCALED_KV_DTYPES:
        codes = torch.empty(shape, dtype=torch.int8, device=device)
        scales = torch.empty(shape[:-1], dtype=torch.bfloat16, device=device)
        return ScaledKV(spec.dtype, codes, scales)
    return torch.empty(shape, dtype=getattr(torch, spec.dtype), device=device)


def write(kv: KV, layer: int, key: torch.Tensor, value: torch.Tensor, meta: StepMeta) -> KV:
    """Write key and value, [T, H_kv, D] each, into the slots of `meta.slot_mapping`.

    The first dimension may have any stride; the others must be contiguous.
    """
    num_tokens, num_kv_heads, size = key.shape
    if num_tokens:
        numbers, scales, codes = parts(kv[layer])
        write_kernel[(num_tokens,)](
            key,
            value,
            numbers,
            numbers if scales is None else scales,
            meta.slot_mapping,
            key.stride(0),
            value.stride(0),
            NUM_KV_HEADS=num_kv_heads,
            HEADS_PADDED=power_of_2(num_kv_heads),
            D=size,
            DP=power_of_2(size),
            BLOCK=numbers.shape[3],
            LARGEST=SCALED_KV_DTYPES[kv.dtype] if isinstance(kv, ScaledKV) else 0.0,
            CODES=codes,
            PLANES=numbers.shape[2],
            num_warps=4,
            enable_fp_fusion=False,  # the product is rounded before the code is
            **options(),
        )
    return kv


def rotate_and_write(
    kv: torch.Tensor,
    layer: int,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    meta: StepMeta,
    cos_sin: torch.Tensor,
    *,
    is_interleaved: bool,
) -> torch.Tensor:
    """Apply rope to query and key, and write key and value, in one launch.

    Args:
        kv: a cache of floats; updated in place.
        layer: index of the layer in the cache.
        query: [T, H, D]; the first dimension may have any stride, the others are contiguous.
        key: [T, H_kv, D], strides likewise.
        value: same shape and strides rule as `key`.
        meta: its `positions` and `slot_mapping` are read.
        cos_sin: float32 [max_position, rotary_dim]: cosines, then sines.
        is_interleaved: pairs are adjacent dimensions; else one from each half of rotary_dim.

    Returns:
        The rotated query, [T, H, D] in its dtype, contiguous.
    """
    num_tokens, num_heads, size = query.shape
    num_kv_heads, rotary_dim = key.shape[1], cos_sin.shape[1]
    group = num_heads // num_kv_heads
    pairs = power_of_2(group) * power_of_2(rotary_dim // 2)
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if num_tokens:
        rotate_write_kernel[(num_tokens, num_kv_heads)](
            query,
            key,
            value,
            out,
            kv[layer],
            meta.slot_mapping,
            meta.positions,
            cos_sin,
            query.stride(0),
            key.stride(0),
            value.stride(0),
            GROUP=group,
            GROUP_PADDED=power_of_2(group),
            NUM_KV_HEADS=num_kv_heads,
            D=size,
            DP=power_of_2(size),
            R=rotary_dim,
            HALF_PADDED=power_of_2(rotary_dim // 2),
            REST_PADDED=power_of_2(size - rotary_dim) if size > rotary_dim else 0,
            BLOCK=kv.shape[4],
            IS_INTERLEAVED=is_interleaved,
            num_warps=min(max(pairs // 512, 1), 8),
            enable_fp_fusion=False,  # round each product, as torch does
            **options(),
        )
    return out


def copy(part: torch.Tensor, src: torch.Tensor, dst: torch.Tensor) -> None:
    """Copy blocks src[i] to dst[i], int32 [N] each, in all layers; the two sets are disjoint.

    `part`, [L, NB, ...], is the values of a cache or its scales.
    """
    if len(src):
        words = part.view(part.shape[0], -1).view(torch.int32)
        block_words = words.shape[1] // part.shape[1]
        pieces = -(-block_words // _COPY_WORDS)
        copy_kernel[(pieces, len(src), part.shape[0])](
            words,
            src,
            dst,
            words.shape[1],
            block_words,
            WORDS=_COPY_WORDS,
            num_warps=4,
            enable_fp_fusion=True,
        )


def export_blocks(kv: KV, blocks: torch.Tensor) -> torch.Tensor:
    """Copy blocks int32 [N] to the wire layout, [N, L, P, B, H_kv, D], on the device."""
    numbers, scales, _ = parts(kv)
    wire = numbers[:, blocks.long()]
    if isinstance(kv, ScaledKV) and scales is not None:
        codes = wire.view(kv_codes.CODE_DTYPES[kv.dtype])
        wire = kv_codes.dequantize(codes, scales[:, blocks.long()])
    return wire.permute(1, 0, 3, 4, 2, 5).contiguous()


def import_blocks(kv: KV, blocks: torch.Tensor, wire: torch.Tensor) -> KV:
    """Write blocks in the wire layout into blocks int32 [N]; another dtype is converted."""
    numbers, scales, _ = parts(kv)
    wire = wire.to(numbers.device).permute(1, 0, 4, 2, 3, 5)  # [L, N, H_kv, 2, B, D]
    if isinstance(kv, ScaledKV) and scales is not None:
        codes, scales[:, blocks.long()] = kv_codes.quantize(wire, kv.dtype)
        wire = codes.view(torch.int8)
    numbers[:, blocks.long()] = wire.to(numbers.dtype)
    return kv
