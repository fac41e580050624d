"""The kernels for TPUs as the backend calls them, and which caches they are for."""

from __future__ import annotations

import functools

import jax

from portalm.backend import KVSpec
from portalm_backends.xla.pallas import cache_write, paged_attention

_ROWS = {"float32": 8, "bfloat16": 16}
"""Slots of a block that lie in one tile."""


def why_not(spec: KVSpec) -> str | None:
    """Why a TPU takes XLA's operations for such a cache; None: it has kernels for it."""
    if spec.shares_values:
        return "the kernels read values beside their keys, not keys that are values"
    rows = _ROWS.get(spec.dtype)
    if rows is None:
        return f"the kernels read {' and '.join(_ROWS)} KV caches, not {spec.dtype}"
    if spec.block_size % rows:
        return (
            f"the kernels read {spec.dtype} in blocks of a multiple of {rows} tokens, "
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
    """A layer's array with this step's keys and values, [T, H_kv, D] each; what came in is gone."""
    touched = cache_write.touched_blocks(
        query_start_loc,
        seq_lens,
        block_table,
        num_tokens=len(key),
        block_size=layer.shape[2],
    )
    return cache_write.write(layer, key, value, touched)


attend = jax.jit(paged_attention.paged_attention, static_argnames=("spec", "max_query_len"))
