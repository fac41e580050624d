"""The KV cache as one tensor: [L, NB, H_kv, 2, B, D].

Within a layer, what one KV head keeps of a block is one piece: its B keys, then its B values. The
attention kernel reads just that, so its loads are whole rows of memory (8 KiB at B 16, D 128 in 16
bits) from one entry of the block table; with the head inside the token it would read 256 bytes
at a time. A block of a layer is one piece too, which a copy moves as it is. The layer is
outermost so that one layer's attention stays within few pages of the device's address translation.
"""

from __future__ import annotations

import torch

from portalm.backend import KVSpec, StepMeta
from portalm.errors import BackendError, Unsupported
from portalm_backends.gpu_common.kernels.kv_cache import (
    copy_kernel,
    rotate_write_kernel,
    write_kernel,
)

DTYPES = frozenset({"float32", "float16", "bfloat16"})
"""What keys and values may be stored as on every GPU."""

FP8_DTYPES = frozenset({"float8_e4m3fn", "float8_e5m2"})
"""And on those that have 8-bit floats; without a scale, what is too large becomes the largest."""

HEAD_SIZES = frozenset(range(16, 257, 8))
BLOCK_SIZES = frozenset({8, 16, 32, 64, 128, 256})
"""Powers of 2 that divide the part of a context that attention may be split into."""

_COPY_WORDS = 4096


def bytes_per_block(spec: KVSpec) -> int:
    """Bytes of one block over all layers."""
    size = getattr(torch, spec.dtype).itemsize
    return spec.num_layers * 2 * spec.block_size * spec.num_kv_heads * spec.head_size * int(size)


def check_spec(spec: KVSpec, dtypes: frozenset[str]) -> None:
    """Raise `Unsupported` for a shape that the kernels do not take, or a dtype not in `dtypes`."""
    for what, value, taken, rule in (
        ("head size", spec.head_size, HEAD_SIZES, "a multiple of 8 from 16"),
        ("block size", spec.block_size, BLOCK_SIZES, "a power of 2 from 8"),
    ):
        if value not in taken:
            raise Unsupported(
                f"the GPU kernels take a {what} that is {rule} up to {max(taken)}, not {value}"
            )
    if spec.dtype not in dtypes:
        raise Unsupported(
            f"this GPU stores keys and values as {', '.join(sorted(dtypes))}, not {spec.dtype}"
        )


def allocate(
    spec: KVSpec, num_blocks: int, device: torch.device, *, dtypes: frozenset[str] = DTYPES
) -> torch.Tensor:
    """An uninitialised cache, [L, NB, H_kv, 2, B, D].

    Args:
        spec: its shape and dtype.
        num_blocks: NB, the null block included.
        device: where it lives.
        dtypes: what the device takes.

    Raises:
        Unsupported: a shape or dtype that the kernels do not take.
        BackendError: of kind oom, with the size.
    """
    check_spec(spec, dtypes)
    shape = (spec.num_layers, num_blocks, spec.num_kv_heads, 2, spec.block_size, spec.head_size)
    try:
        return torch.empty(shape, dtype=getattr(torch, spec.dtype), device=device)
    except RuntimeError as error:
        raise BackendError(
            "oom",
            f"no memory for a KV cache of {num_blocks * bytes_per_block(spec) / 2**20:.0f} MiB: "
            f"lower --gpu-memory-utilization, --max-model-len or --max-num-seqs",
        ) from error


def write(
    kv: torch.Tensor, layer: int, key: torch.Tensor, value: torch.Tensor, meta: StepMeta
) -> torch.Tensor:
    """Put key and value, [T, H_kv, D] each, into the slots of `meta.slot_mapping`.

    Rows of tokens may lie apart, heads may not.
    """
    num_tokens, num_kv_heads, size = key.shape
    if num_tokens:
        write_kernel[(num_tokens,)](
            key,
            value,
            kv[layer],
            meta.slot_mapping,
            key.stride(0),
            value.stride(0),
            NUM_KV_HEADS=num_kv_heads,
            HEADS_PADDED=_power_of_2(num_kv_heads),
            D=size,
            DP=_power_of_2(size),
            BLOCK=kv.shape[4],
            LARGEST=_largest(kv.dtype),
            num_warps=4,
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
    """`rope`, then `write`, in one launch.

    Args:
        kv: updated in place.
        layer: of the cache.
        query: [T, H, D]; rows of tokens may lie apart, heads may not.
        key: [T, H_kv, D], likewise.
        value: the same shape.
        meta: `positions` and `slot_mapping` are looked at.
        cos_sin: float32 [max_position, rotary_dim]: cosines, then sines.
        is_interleaved: pairs are neighbours; else halves of the rotary dimensions.

    Returns:
        The rotated query, [T, H, D] in its dtype, contiguous.
    """
    num_tokens, num_heads, size = query.shape
    num_kv_heads, rotary_dim = key.shape[1], cos_sin.shape[1]
    group = num_heads // num_kv_heads
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
            GROUP_PADDED=_power_of_2(group),
            NUM_KV_HEADS=num_kv_heads,
            D=size,
            DP=_power_of_2(size),
            R=rotary_dim,
            HALF_PADDED=_power_of_2(rotary_dim // 2),
            REST_PADDED=_power_of_2(size - rotary_dim) if size > rotary_dim else 0,
            BLOCK=kv.shape[4],
            IS_INTERLEAVED=is_interleaved,
            LARGEST=_largest(kv.dtype),
            num_warps=1,
            enable_fp_fusion=False,  # products are rounded one by one, as torch's default does
        )
    return out


def copy(kv: torch.Tensor, src: torch.Tensor, dst: torch.Tensor) -> torch.Tensor:
    """Copy blocks src[i] to dst[i], int32 [N] each, over all layers; the sets are disjoint."""
    if len(src):
        words = kv.view(kv.shape[0], -1).view(torch.int32)
        block_words = words.shape[1] // kv.shape[1]
        pieces = -(-block_words // _COPY_WORDS)
        copy_kernel[(pieces, len(src), kv.shape[0])](
            words,
            src,
            dst,
            words.shape[1],
            block_words,
            WORDS=_COPY_WORDS,
            num_warps=4,
        )
    return kv


def export_blocks(kv: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """Blocks int32 [N] in the wire layout, [N, L, 2, B, H_kv, D], on the device."""
    wire = _bits(kv)[:, blocks.long()].permute(1, 0, 3, 4, 2, 5).contiguous()
    return wire.view(kv.dtype)


def import_blocks(kv: torch.Tensor, blocks: torch.Tensor, wire: torch.Tensor) -> torch.Tensor:
    """The inverse of `export_blocks`; a wire of another dtype is converted."""
    bits = _bits(wire.to(device=kv.device, dtype=kv.dtype))
    _bits(kv)[:, blocks.long()] = bits.permute(1, 0, 4, 2, 3, 5)
    return kv


def _bits(x: torch.Tensor) -> torch.Tensor:
    """The same memory as integers: torch indexes no 8-bit floats everywhere."""
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()])


def _largest(dtype: torch.dtype) -> float:
    """The largest value of an 8-bit float; 0 for dtypes that can hold an infinity's size."""
    return torch.finfo(dtype).max if dtype.itemsize == 1 else 0.0


def _power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length()
