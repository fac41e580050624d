"""paged_attention: causal attention of a step's queries over their requests' cached contexts.

  query    [H_kv, T' * G', W]   rows of a KV head: the query heads of a token are adjacent
  layer    [NB, H_kv, B, 2 P]   the cache of one layer; it already holds this step's tokens
  and in scalar memory, int32: query_start_loc [S + 1], seq_lens [S], block_table [S * MB], and
  the first request of each tile of tokens

Mapping:  one grid step per tile of tokens. It loops over the requests that have tokens in the
          tile, and over the chunks of their contexts that any row attends to. Blocks of the next
          chunk (of this request, the next one, or the next tile) are fetched while this one is
          computed. Rows of other requests are masked; tiles of one token (decodes) have none.
Bound by: memory in decodes: a block is read once per tile, for all heads together.
Needs:    B and 2 P in whole tiles (`kernels.unsupported_reason`); block tables that fit into
          scalar memory.
Meaning:  attention.paged_attention.

If P is 64, a row of the cache holds a key and its value in 128 lanes. The query then has zeros in
the lanes of the value, and only the value's half of the weighted sum is used.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from portalm.backend import AttentionSpec
from portalm_backends.xla import cache

MASK = -1e30
"""Score of a masked position: finite, so that a fully masked row does not become NaN."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """How a step's rows and contexts are divided."""

    tile: int
    """Tokens per grid step."""
    group: int
    """Rows per token: the query heads of one KV head; in decodes a multiple of 8."""
    blocks: int
    """Blocks per chunk."""
    block_size: int
    lanes: int
    """P, lanes of a key."""
    num_blocks: int
    """MB, columns of the block table."""

    @property
    def chunk(self) -> int:
        """Tokens per chunk."""
        return self.blocks * self.block_size

    @property
    def is_joint(self) -> bool:
        """True if a key and its value share one register, so they are multiplied together."""
        return self.lanes < cache.LANES

    @property
    def width(self) -> int:
        """Lanes of a query row."""
        return 2 * self.lanes if self.is_joint else self.lanes


def shape_for(
    layer: tuple[int, ...],
    spec: AttentionSpec,
    *,
    itemsize: int,
    num_blocks: int,
    max_query_len: int,
) -> Shape:
    """Choose tile and chunk sizes for a layer's array of shape [NB, H_kv, B, 2 P]."""
    _, num_kv_heads, block_size, width = layer
    group = spec.num_heads // num_kv_heads
    if max_query_len == 1:
        tile, group, chunk = 1, -(-group // 8) * 8, 512
    else:
        tile, chunk = max(16, 128 // 2 ** (group - 1).bit_length()), 256
    budget = 2**21 // (num_kv_heads * width * itemsize)  # tokens in 2 MiB of vector memory
    blocks = max(1, min(chunk, budget) // block_size)
    return Shape(
        tile=tile,
        group=group,
        blocks=min(blocks, num_blocks),
        block_size=block_size,
        lanes=width // 2,
        num_blocks=num_blocks,
    )


def paged_attention(
    query: jax.Array,
    layer: jax.Array,
    query_start_loc: jax.Array,
    seq_lens: jax.Array,
    block_table: jax.Array,
    spec: AttentionSpec,
    *,
    max_query_len: int,
    sinks: jax.Array | None = None,
    interpret: bool | pltpu.InterpretParams = False,
) -> jax.Array:
    """`attention.paged_attention` as a TPU kernel, with the same arguments and result."""
    num_tokens = query.shape[0]
    shape = shape_for(
        layer.shape,
        spec,
        itemsize=layer.dtype.itemsize,
        num_blocks=block_table.shape[1],
        max_query_len=max_query_len,
    )
    rows = _to_rows(query, spec, shape)  # [H_kv, T' * G', W]
    num_tiles = rows.shape[1] // (shape.tile * shape.group)
    first_tokens = jnp.arange(num_tiles, dtype=jnp.int32) * shape.tile
    first_request = (query_start_loc[None, 1:] <= first_tokens[:, None]).sum(axis=1)
    first_request = jnp.minimum(first_request, len(seq_lens) - 1).astype(jnp.int32)
    live_tiles = (query_start_loc[-1] + shape.tile - 1) // shape.tile

    def rows_of_tile(tile: jax.Array, *_: jax.Array) -> tuple[Any, ...]:
        return 0, tile, 0

    num_heads, num_rows = spec.num_kv_heads, shape.tile * shape.group
    tile_spec = pl.BlockSpec((num_heads, num_rows, shape.width), rows_of_tile)
    whole = pl.BlockSpec((num_heads, num_rows, 1), lambda *_: (0, 0, 0))
    slopes = None if spec.alibi_slopes is None else np.array(spec.alibi_slopes, np.float32)
    extras = [_per_row(x, spec, shape) for x in (slopes, sinks) if x is not None]
    state = functools.partial(pltpu.VMEM, dtype=jnp.float32)
    out = pl.pallas_call(
        functools.partial(_kernel, spec, shape, sinks is not None),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(live_tiles,),
            in_specs=[pl.BlockSpec(memory_space=pl.ANY), tile_spec, *[whole] * len(extras)],
            out_specs=tile_spec,
            scratch_shapes=[
                pltpu.VMEM((2, shape.blocks, *layer.shape[1:]), layer.dtype),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SMEM((1,), jnp.int32),
                state((num_heads, num_rows, 1)),
                state((num_heads, num_rows, 1)),
                state((num_heads, num_rows, shape.width)),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(rows.shape, query.dtype),
        interpret=interpret,
        name="paged_attention",
    )(
        query_start_loc,
        seq_lens,
        block_table.reshape(-1),
        first_request,
        layer,
        rows,
        *extras,
    )
    return _from_rows(out, spec, shape)[:num_tokens]


def _to_rows(query: jax.Array, spec: AttentionSpec, shape: Shape) -> jax.Array:
    """Rearrange [T, H, D] to padded rows of each KV head: [H_kv, T' * G', W]."""
    num_tokens, _, head_size = query.shape
    rows = query.reshape(num_tokens, spec.num_kv_heads, -1, head_size)
    pads = (-num_tokens % shape.tile, 0, shape.group - rows.shape[2], shape.width - head_size)
    rows = jnp.pad(rows, [(0, count) for count in pads])
    return rows.swapaxes(0, 1).reshape(spec.num_kv_heads, -1, shape.width)


def _from_rows(rows: jax.Array, spec: AttentionSpec, shape: Shape) -> jax.Array:
    """Rearrange the kernel's output to [T', H, D], the inverse of `_to_rows`."""
    group = spec.num_heads // spec.num_kv_heads
    start = shape.lanes if shape.is_joint else 0
    out = rows.reshape(spec.num_kv_heads, -1, shape.group, shape.width)
    out = out[:, :, :group, start : start + spec.head_size].swapaxes(0, 1)
    return out.reshape(-1, spec.num_heads, spec.head_size)


def _per_row(values: jax.Array | np.ndarray, spec: AttentionSpec, shape: Shape) -> jax.Array:
    """Expand one number per query head, [H], to the rows of a tile: [H_kv, tile * G', 1]."""
    by_head = jnp.asarray(values, jnp.float32).reshape(spec.num_kv_heads, -1)
    by_head = jnp.pad(by_head, ((0, 0), (0, shape.group - by_head.shape[1])))
    return jnp.tile(by_head, (1, shape.tile))[..., None]


@dataclass(frozen=True, slots=True)
class _Schedule:
    """Which chunks of which requests each tile needs; all numbers are scalars of the kernel."""

    shape: Shape
    window: int | None
    loc: Any
    seq_lens: Any
    first_request: Any

    def offset(self, request: Any) -> Any:
        """A token's position in its request minus its index in the step."""
        return self.seq_lens[request] - self.loc[request + 1]

    def span(self, tile: Any, request: Any) -> tuple[Any, Any]:
        """Positions [first, end) of the request's context that the tile's rows attend to."""
        end = self.offset(request) + jnp.minimum(
            (tile + 1) * self.shape.tile, self.loc[request + 1]
        )
        if self.window is None:
            return jnp.int32(0), end
        first_token = jnp.maximum(tile * self.shape.tile, self.loc[request])
        return jnp.maximum(self.offset(request) + first_token - self.window + 1, 0), end

    def chunk_of(self, position: Any) -> Any:
        """Index of the chunk that holds a position of the context.

        `lax.div`, because jnp's floor division would need to know the TPU's type.
        """
        return lax.div(position, jnp.int32(self.shape.chunk))

    def start(self, tile: Any) -> tuple[Any, Any]:
        """First request and chunk of a tile."""
        request = self.first_request[tile]
        return request, self.chunk_of(self.span(tile, request)[0])

    def after(self, tile: Any, request: Any, chunk: Any) -> tuple[Any, Any, Any]:
        """Next (tile, request, chunk); after the last tile, valid indices that are not used."""
        in_request = (chunk + 1) * self.shape.chunk < self.span(tile, request)[1]
        num_requests = self.seq_lens.shape[0]
        last_token = jnp.minimum((tile + 1) * self.shape.tile, self.loc[num_requests])
        in_tile = self.loc[request + 1] < last_token
        next_tile = jnp.where(in_request | in_tile, tile, tile + 1)
        known = jnp.minimum(next_tile, pl.num_programs(0) - 1)
        next_request = jnp.where(
            in_request, request, jnp.where(in_tile, request + 1, self.first_request[known])
        )
        next_request = jnp.minimum(next_request, num_requests - 1)
        first_chunk = self.chunk_of(self.span(known, next_request)[0])
        return next_tile, next_request, jnp.where(in_request, chunk + 1, first_chunk)


@dataclass(frozen=True, slots=True)
class _Fetcher:
    """Copies the blocks of a chunk into one of two buffers."""

    schedule: _Schedule
    table: Any
    layer: Any
    buffer: Any
    """[2, blocks, H_kv, B, 2 P]"""
    semaphores: Any

    def _each(self, tile: Any, request: Any, chunk: Any, slot: Any, action: str) -> None:
        shape = self.schedule.shape
        first, end = self.schedule.span(tile, request)
        for i in range(shape.blocks):
            logical = chunk * shape.blocks + i
            position = logical * shape.block_size

            @pl.when((position < end) & (position + shape.block_size > first))
            def _(i: int = i, logical: Any = logical) -> None:
                block = self.table[request * shape.num_blocks + logical]
                copy = pltpu.make_async_copy(
                    self.layer.at[block], self.buffer.at[slot, i], self.semaphores.at[slot]
                )
                getattr(copy, action)()

    def start(self, tile: Any, request: Any, chunk: Any, slot: Any) -> None:
        """Start copying the blocks that any row attends to."""
        self._each(tile, request, chunk, slot, "start")

    def wait(self, tile: Any, request: Any, chunk: Any, slot: Any) -> None:
        """Wait for these copies; the rest of the buffer keeps its old contents."""
        self._each(tile, request, chunk, slot, "wait")


def _kernel(spec: AttentionSpec, shape: Shape, has_sinks: bool, *refs: Any) -> None:
    loc, seq_lens, table, first_request, layer, query, *extras = refs[:-7]
    out, buffer, semaphores, turn, largest, total, weighted = refs[-7:]
    slopes = extras[0] if spec.alibi_slopes is not None else None
    sinks = extras[-1] if has_sinks else None
    schedule = _Schedule(shape, spec.sliding_window, loc, seq_lens, first_request)
    fetcher = _Fetcher(schedule, table, layer, buffer, semaphores)
    tile = pl.program_id(0)
    request, chunk = schedule.start(tile)

    @pl.when(tile == 0)
    def _() -> None:
        turn[0] = 0
        fetcher.start(tile, request, chunk, 0)

    largest[...] = jnp.full_like(largest, MASK) if sinks is None else sinks[...]
    total[...] = jnp.zeros_like(total) if sinks is None else jnp.ones_like(total)
    weighted[...] = jnp.zeros_like(weighted)

    def work(at: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        _, request, chunk = at
        slot = turn[0]
        following = schedule.after(tile, request, chunk)

        @pl.when(following[0] < pl.num_programs(0))
        def fetch_following() -> None:
            fetcher.start(*following, 1 - slot)

        fetcher.wait(tile, request, chunk, slot)
        _clear_dead_slots(buffer.at[slot], chunk, *schedule.span(tile, request), shape)
        distance, is_seen = _visibility(schedule, tile, request, chunk)
        for head in range(spec.num_kv_heads):
            kv = buffer[slot, :, head].reshape(shape.chunk, 2 * shape.lanes).astype(query.dtype)
            key, value = (
                (kv, kv) if shape.is_joint else (kv[:, : shape.lanes], kv[:, shape.lanes :])
            )
            scores = _scores(query[head], key, spec)
            if slopes is not None:
                scores = scores + slopes[head] * distance.astype(jnp.float32)
            scores = jnp.where(is_seen, scores, MASK)  # [R, K]
            best = jnp.maximum(largest[head], scores.max(axis=1, keepdims=True))
            weights = jnp.where(is_seen, jnp.exp(scores - best), 0.0)
            kept = jnp.exp(largest[head] - best)
            largest[head] = best
            total[head] = total[head] * kept + weights.sum(axis=1, keepdims=True)
            product = _product(weights.astype(value.dtype), value, (1, 0))
            weighted[head] = weighted[head] * kept + product
        turn[0] = 1 - slot
        return following

    lax.while_loop(lambda at: at[0] == tile, work, (tile, request, chunk))
    sums = total[...]
    out[...] = (weighted[...] / jnp.where(sums == 0, 1.0, sums)).astype(out.dtype)


def _clear_dead_slots(buffer: Any, chunk: Any, first: Any, end: Any, shape: Shape) -> None:
    """Zero the slots that no row attends to: they may hold NaN, and 0 * NaN is NaN."""
    start = chunk * shape.chunk

    @pl.when((start < first) | (start + shape.chunk > end))
    def _() -> None:
        slot = lax.broadcasted_iota(jnp.int32, (shape.block_size, 2 * shape.lanes), 0)
        for i in range(shape.blocks):
            position = start + i * shape.block_size + slot
            is_live = (position >= first) & (position < end)
            for head in range(buffer.shape[1]):
                kept = jnp.where(is_live, buffer[i, head].astype(jnp.float32), 0.0)
                buffer[i, head] = kept.astype(buffer.dtype)


def _visibility(
    schedule: _Schedule, tile: Any, request: Any, chunk: Any
) -> tuple[jax.Array, jax.Array]:
    """Positions of the chunk relative to each row's, int32 [R, K], and the mask, bool [R, K]."""
    shape = schedule.shape
    row = lax.broadcasted_iota(jnp.int32, (shape.tile * shape.group, 1), 0)
    token = tile * shape.tile + lax.div(row, jnp.int32(shape.group))
    position = chunk * shape.chunk + lax.broadcasted_iota(jnp.int32, (1, shape.chunk), 1)
    distance = position - (token + schedule.offset(request))
    is_own = (token >= schedule.loc[request]) & (token < schedule.loc[request + 1])
    is_seen = is_own & (distance <= 0)
    if schedule.window is not None:
        is_seen &= distance > -schedule.window
    return distance, is_seen


def _scores(query: jax.Array, key: jax.Array, spec: AttentionSpec) -> jax.Array:
    """Scores, float32 [R, K], of query [R, W] and key [K, W]."""
    scores = _product(query, key, (1, 1)) * spec.scale
    if spec.soft_cap is not None:
        scores = spec.soft_cap * jnp.tanh(scores / spec.soft_cap)
    return scores


def _product(left: jax.Array, right: jax.Array, axes: tuple[int, int]) -> jax.Array:
    """Float32 product of two matrices over these axes; full precision if both are float32."""
    is_single = left.dtype == jnp.float32
    return lax.dot_general(
        left,
        right,
        (((axes[0],), (axes[1],)), ((), ())),
        precision=lax.Precision.HIGHEST if is_single else lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )
