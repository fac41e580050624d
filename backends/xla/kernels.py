"""The TPU kernels, jitted for the backend, and which KV caches they support."""

from __future__ import annotations

import functools

import jax

from portalm.backend import KVSpec
from portalm_backends.xla.pallas import cache_write, paged_attention

_ROWS = {"float32": 8, "bfloat16": 16}
"""Height of a TPU tile by dtype: the block size must be a multiple of it."""


def unsupported_reason(spec: KVSpec) -> str | None:
    """Reason why the kernels cannot read this cache; None if they can."""
    if spec.shares_values:
        return "the kernels read separate keys and values, not values that are part of their keys"
    rows = _ROWS.get(spec.dtype)
    if rows is None:
        return f"the kernels read {' and '.join(_ROWS)} KV caches, not {spec.dtype}"
    if spec.block_size % rows:
        return (
            f"the kernels read {spec.dtype} KV caches whose block size is a multiple of {rows}, "
            f"not {spec.block_size}"
        )
    return None


@functools.partial(jax.jit, donate_argnums=0)
def write_in_place(
    layer: jax.Array,
    key: jax.Array,
    value: jax.Array,
    query_start_loc: jax.Array,
    seq_lens: jax.Array,
    block_table: jax.Array,
) -> jax.Array:
    """Write keys and values, [T, H_kv, D] each, into `layer`, which is donated; return the result.

    The arguments are those of `cache_write.touched_blocks` and `cache_write.write`.
    """
    touched = cache_write.touched_blocks(
        query_start_loc,
        seq_lens,
        block_table,
        num_tokens=len(key),
        block_size=layer.shape[2],
    )
    return cache_write.write(layer, key, value, touched)


attend = jax.jit(paged_attention.paged_attention, static_argnames=("spec", "max_query_len"))
