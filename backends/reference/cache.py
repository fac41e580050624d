"""The KV cache as one tensor: [L, P, NB, B, H_kv, D], keys then values, or keys alone."""

from __future__ import annotations

import torch

from portalm.backend import KVSpec, StepMeta
from portalm.errors import BackendError, Unsupported

DTYPES = frozenset({"float32", "float16", "bfloat16"})
"""What keys and values may be stored as."""


def bytes_per_block(spec: KVSpec) -> int:
    """Bytes of one block over all layers."""
    size = getattr(torch, spec.dtype).itemsize
    numbers = spec.num_planes * spec.block_size * spec.num_kv_heads * spec.head_size
    return spec.num_layers * numbers * int(size)


def allocate(spec: KVSpec, num_blocks: int) -> torch.Tensor:
    """An uninitialised cache.

    Raises:
        Unsupported: a dtype that is not claimed.
        BackendError: of kind oom, with the size.
    """
    if spec.dtype not in DTYPES:
        raise Unsupported(
            f"the reference backend stores keys and values as {', '.join(sorted(DTYPES))}, "
            f"not {spec.dtype}"
        )
    block = (spec.block_size, spec.num_kv_heads, spec.head_size)
    shape = (spec.num_layers, spec.num_planes, num_blocks, *block)
    try:
        return torch.empty(shape, dtype=getattr(torch, spec.dtype))
    except RuntimeError as error:
        raise BackendError(
            "oom",
            f"no memory for a KV cache of {num_blocks * bytes_per_block(spec) / 2**20:.0f} MiB: "
            f"lower --kv-cache-memory-bytes, --max-model-len or --max-num-seqs",
        ) from error


def write(
    kv: torch.Tensor, layer: int, key: torch.Tensor, value: torch.Tensor, meta: StepMeta
) -> torch.Tensor:
    """Scatter key and value, [T, H_kv, D] each, into the slots of `meta.slot_mapping`."""
    slots = meta.slot_mapping.long()
    kv[layer, 0].flatten(0, 1)[slots] = key.to(kv.dtype)
    if kv.shape[1] == 2:
        kv[layer, 1].flatten(0, 1)[slots] = value.to(kv.dtype)
    return kv
