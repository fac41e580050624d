"""The KV cache's memory, in a layout made for dot products with a vector of tokens.

Per layer, block and KV head, one after the other: the keys of B tokens, [D, B], then their values,
[B, D]. Keys are transposed, so that one load reads the same dimension of many tokens and scores
need no sums over lanes. 8-bit codes have their scales after the values; where values are keys there
is a single plane, [B, D] (csrc_cpu/kv_cache.h).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from portalm.backend import SCALED_KV_DTYPES, KVSpec
from portalm_backends.cpu.memory import reserve
from portalm_backends.portable import kv_codes

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
KV_DTYPES = frozenset({*DTYPES, *SCALED_KV_DTYPES})
"""Names of what a cache may store."""

HEAD_SIZES = frozenset(range(8, 257, 8))
SHARED_HEAD_SIZES = frozenset(range(16, 1025, 16))
"""Head sizes where values are keys: scores are sums of whole vectors."""
BLOCK_SIZES = frozenset({8, 16, 32, 64, 128, 256})
"""Divisors of the 256 tokens that share a softmax (kSplitTokens in csrc_cpu/kernels.h)."""

_SLACK = 256
"""Bytes after the last block that a whole-vector load of its last row may read."""


@dataclass(slots=True, frozen=True)
class CpuKV:
    """A KV cache of `num_blocks` blocks, the null block included."""

    spec: KVSpec
    num_blocks: int
    data: torch.Tensor
    """1-D, all layers, plus slack at the end. Memory is committed when first written."""
    ptr: int
    """Address of layer 0."""
    layer_bytes: int
    shape: dict[str, int]
    """The arguments of a kernel that describe the cache (KVShape in csrc_cpu/kernels.h)."""


def alloc(spec: KVSpec, num_blocks: int, native: Any) -> CpuKV:
    """Reserve a cache; pages are committed when they are first written.

    Args:
        spec: of all layers.
        num_blocks: including the null block.
        native: the native module.

    Raises:
        BackendError: kind "oom", with the sizes.
    """
    dtype = torch.uint8 if spec.dtype in SCALED_KV_DTYPES else DTYPES[spec.dtype]
    num_bytes = num_blocks * kv_codes.bytes_per_block(spec)
    data = reserve(
        num_bytes + _SLACK,
        "the KV cache",
        advice="lower --kv-cache-memory-bytes, --max-model-len or --max-num-seqs",
    ).view(dtype)
    return CpuKV(
        spec=spec,
        num_blocks=num_blocks,
        data=data,
        ptr=data.data_ptr(),
        layer_bytes=num_bytes // spec.num_layers,
        shape={
            "cache_dtype": native.DTYPES[spec.dtype],
            "num_blocks": num_blocks,
            "block_size": spec.block_size,
            "kv_heads": spec.num_kv_heads,
            "head_size": spec.head_size,
            "shares_values": spec.shares_values,
        },
    )
