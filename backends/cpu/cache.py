"""The KV cache's memory, in a layout made for dot products with a vector of tokens.

Per layer, block and KV head, one after the other: the keys of B tokens, [D, B], then their values,
[B, D]. Keys are transposed, so that one load brings the same dimension of many tokens and scores
come out of it without sums over lanes. Codes of 8 bits have their scales behind the values; where
values are keys there is one plane, [B, D]
(csrc_cpu/kv_cache.h).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from portalm.backend import SCALED_KV_DTYPES, KVSpec
from portalm_backends.cpu.memory import reserve
from portalm_backends.portable import kv_codes

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""How the native module names a dtype."""
KV_CODES = {"int8": 3, "fp8": 4, **{name: CODES[dtype] for name, dtype in DTYPES.items()}}
"""And what a cache holds."""

HEAD_SIZES = frozenset(range(8, 257, 8))
SHARED_HEAD_SIZES = frozenset(range(16, 1025, 16))
"""Where values are keys, whose scores are sums of whole vectors."""
BLOCK_SIZES = frozenset({8, 16, 32, 64, 128, 256})
"""They divide the span of 256 tokens that has a softmax of its own (csrc_cpu/attention.h)."""

_SLACK = 256
"""Bytes past the last block that a whole-vector load of its last row may touch."""


@dataclass(slots=True, frozen=True)
class CpuKV:
    """A KV cache of `num_blocks` blocks, the null block included."""

    spec: KVSpec
    num_blocks: int
    data: torch.Tensor
    """1-D, all layers, with a little slack at the end. Untouched memory is not committed."""
    ptr: int
    """Address of layer 0."""
    layer_bytes: int
    shape: tuple[int, int, int, int, int, bool]
    """dtype (as the native module names it), blocks, block size, KV heads, head size, whether
    values are keys."""


def alloc(spec: KVSpec, num_blocks: int) -> CpuKV:
    """Reserve a cache; pages are committed when they are first written.

    Raises:
        BackendError: of kind oom, with the numbers.
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
        shape=(
            KV_CODES[spec.dtype],
            num_blocks,
            spec.block_size,
            spec.num_kv_heads,
            spec.head_size,
            spec.shares_values,
        ),
    )
