"""cache_write: write a step's keys and values into the paged KV cache, in place.

  rows     [H_kv, T', 2 P]      new tokens, each a key followed by its value; padded by at least
                                one block on both sides
  layer    [NB, H_kv, B, 2 P]   the cache of one layer, aliased to the result
  and for each block that the step writes to (int32, in scalar memory): the block, the row that
  belongs in its first slot, and the range of slots that is written

Mapping:  one grid step per touched block. Pallas' pipeline fetches the block and two blocks of
          rows that contain its own, and stores it while the next one is fetched. The rows do not
          start at a tile boundary, so they are rotated into place.
Bound by: memory and the number of grid steps: a block is read and written whole.
Needs:    B and 2 P in whole tiles (`kernels.unsupported_reason`); each block belongs to one
          request of the step.
Meaning:  cache.write, except that padding is not written at all.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from portalm_backends.xla import cache


class Touched(NamedTuple):
    """The blocks that a step writes to: arrays int32 [E], of which the first `count` are used."""

    block: jax.Array
    """Block id."""
    first_row: jax.Array
    """Row of the step that belongs in the block's first slot; -(B - 1) or more."""
    begin: jax.Array
    """First slot that is written."""
    end: jax.Array
    """One past the last slot that is written."""
    count: jax.Array
    """int32 []: number of blocks."""


def touched_blocks(
    query_start_loc: jax.Array,
    seq_lens: jax.Array,
    block_table: jax.Array,
    *,
    num_tokens: int,
    block_size: int,
) -> Touched:
    """Find the blocks that a step of at most `num_tokens` tokens writes to, in any layer."""
    num_requests = len(seq_lens)
    room = min(num_tokens, num_tokens // block_size + 2 * num_requests)
    query_lens = jnp.diff(query_start_loc)
    start = seq_lens - query_lens  # position of the first new token in its request
    counts = jnp.where(query_lens > 0, (seq_lens - 1) // block_size - start // block_size + 1, 0)
    ends = jnp.cumsum(counts, dtype=jnp.int32)
    index = jnp.arange(room, dtype=jnp.int32)
    request = jnp.minimum((ends[None, :] <= index[:, None]).sum(axis=1), num_requests - 1)
    logical = start[request] // block_size + index - (ends - counts)[request]
    offset = logical * block_size
    is_live = index < ends[-1]
    return Touched(
        block=jnp.where(is_live, block_table[request, logical], 0),
        first_row=jnp.where(is_live, query_start_loc[request] + offset - start[request], 0),
        begin=jnp.where(is_live, jnp.maximum(start[request] - offset, 0), 0),
        end=jnp.where(is_live, jnp.minimum(seq_lens[request] - offset, block_size), 0),
        count=ends[-1],
    )


def write(
    layer: jax.Array,
    key: jax.Array,
    value: jax.Array,
    touched: Touched,
    *,
    interpret: bool | pltpu.InterpretParams = False,
) -> jax.Array:
    """Write keys and values, [T, H_kv, D] each, into a layer's array; return the result."""
    num_heads, block_size, width = layer.shape[1:]
    rows = cache.side_by_side(key, value, width // 2).astype(layer.dtype).swapaxes(0, 1)
    after = 2 * block_size - rows.shape[1] % block_size
    rows = jnp.pad(rows, ((0, 0), (block_size, after), (0, 0)))
    cell = (None, num_heads, block_size, width)
    part = (num_heads, block_size, width)

    def rows_at(
        which: int, e: jax.Array, block: jax.Array, first_row: jax.Array, *_: jax.Array
    ) -> tuple[Any, ...]:
        return 0, lax.div(first_row[e] + block_size, jnp.int32(block_size)) + which, 0

    def cell_at(e: jax.Array, block: jax.Array, *_: jax.Array) -> tuple[Any, ...]:
        return block[e], 0, 0, 0

    return pl.pallas_call(
        _kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(touched.count,),
            in_specs=[
                pl.BlockSpec(part, functools.partial(rows_at, 0)),
                pl.BlockSpec(part, functools.partial(rows_at, 1)),
                pl.BlockSpec(cell, cell_at),
            ],
            out_specs=pl.BlockSpec(cell, cell_at),
        ),
        out_shape=jax.ShapeDtypeStruct(layer.shape, layer.dtype),
        input_output_aliases={6: 0},
        interpret=interpret,
        name="cache_write",
    )(touched.block, touched.first_row, touched.begin, touched.end, rows, rows, layer)


def _kernel(block, first_row, begin, end, this_ref, next_ref, old_ref, new_ref):  # type: ignore[no-untyped-def]
    e = pl.program_id(0)
    num_heads, block_size, width = old_ref.shape
    # lax.rem is right, as the operands are not negative; jnp's floor division needs the TPU's type
    shift = lax.rem(first_row[e] + block_size, jnp.int32(block_size))
    slot = lax.broadcasted_iota(jnp.int32, (block_size, width), 0)
    is_new = (slot >= begin[e]) & (slot < end[e])
    for head in range(num_heads):
        rows = jnp.concatenate([this_ref[head], next_ref[head]]).astype(jnp.float32)  # [2 B, 2 P]
        rows = pltpu.roll(rows, 2 * block_size - shift, axis=0)[:block_size]
        old = old_ref[head].astype(jnp.float32)  # a TPU selects in 32-bit lanes
        new_ref[head] = jnp.where(is_new, rows, old).astype(new_ref.dtype)
