"""Attention as XLA operations without large temporaries, for any XLA client and any shape.

All cases have one form: rows of queries over chunks of their context, with a running softmax
(Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018; Dao et al.,
"FlashAttention", 2022). The loops end with the longest context of the rows at hand, so a step's
cost depends on the length of its requests, not on the length that its bucket allows.

Decodes are computed in groups; the query heads of a KV head are its rows. Longer queries are cut
into tiles of one request each, in token order: rows that a tile computes past the end of its
request are overwritten by the next tile.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from portalm.backend import AttentionSpec
from portalm_backends.xla.cache import Layer, block_size_of, read, read_keys

CHUNK = 64
"""Context tokens computed at a time, rounded down to whole blocks (at least one block)."""
GROUP = 8
"""Decodes computed at a time."""
TILE = 32
"""Tokens of a longer query computed at a time."""

Fetch: TypeAlias = Callable[[jax.Array], tuple[jax.Array, jax.Array]]
"""Maps the index of a chunk to its keys and values, [N, H_kv, K, D] each."""


class Rows(NamedTuple):
    """Queries of N requests, R rows per KV head, and the range of context that they attend to."""

    query: jax.Array
    """[N, H_kv, R, D]"""
    position: jax.Array
    """int32 [N, R]: position in the request; a row attends to the context up to there."""
    end: jax.Array
    """int32 [N]: end of the context that any row attends to; 0 if a request is padding."""


class Running(NamedTuple):
    """The running softmax of each row over the chunks so far."""

    largest: jax.Array
    """float32 [N, H_kv, R]: largest score, subtracted in the exponent of the weights."""
    total: jax.Array
    """float32 [N, H_kv, R]: sum of the weights."""
    weighted: jax.Array
    """float32 [N, H_kv, R, D]: sum of weights times values."""


def paged_attention(
    query: jax.Array,
    layer: Layer,
    query_start_loc: jax.Array,
    seq_lens: jax.Array,
    block_table: jax.Array,
    spec: AttentionSpec,
    *,
    max_query_len: int,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """Causal attention of each query token over its request's cached context.

    Args:
        query: [T, H, D], new tokens of all requests end to end, decodes first.
        layer: one layer of the cache; it already holds this step's tokens.
        query_start_loc: int32 [S + 1]
        seq_lens: int32 [S]; 0 for a request that is padding.
        block_table: int32 [S, MB]
        spec: scale, sliding window, soft cap, ALiBi slopes.
        max_query_len: most new tokens of a request; with 1 the code for tiles is left out.
        sinks: float32 [H] if `spec.has_sinks`.

    Returns:
        [T, H, D], or [T, H, value_size], in the dtype of `query`; rows of pad tokens are
        unspecified.
    """
    num_tokens, num_requests = query.shape[0], len(seq_lens)
    block_size = block_size_of(layer)
    blocks = max(1, CHUNK // block_size)
    block_table = _pad(block_table, -block_table.shape[1] % blocks, axis=1)
    query = _pad(query, max(0, num_requests - num_tokens) + max(GROUP, TILE))
    query_lens = jnp.diff(query_start_loc)
    is_decode = (query_lens == 1) & (seq_lens > 0)

    def fetch(table: jax.Array) -> Fetch:  # int32 [N, MB]
        return lambda chunk: _gather(layer, table, chunk, blocks, spec)

    def attend(rows: Rows, table: jax.Array) -> jax.Array:
        return _attend(rows, fetch(table), blocks * block_size, spec, sinks)

    def tile(request: jax.Array, first: jax.Array, q: jax.Array) -> jax.Array:
        length = seq_lens[request]
        position = length - query_lens[request] + first + jnp.arange(TILE)
        end = jnp.minimum(length, position[-1] + 1)
        table = lax.dynamic_slice_in_dim(block_table, request, 1)
        return attend(_rows(q, position, end, spec), table)

    ends = jnp.where(is_decode, seq_lens, 0)
    out = _over_decodes(query, ends, block_table, attend, spec)
    if max_query_len > 1:
        out = _over_tiles(query, out, query_start_loc, query_lens * ~is_decode, tile)
    return out[:num_tokens]


def encoder_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    query_start_loc: jax.Array,
    spec: AttentionSpec,
) -> jax.Array:
    """Attention of each token to all tokens of its request.

    Args:
        query: [T, H, D], whole prompts end to end.
        key: [T, H_kv, D]
        value: the same shape.
        query_start_loc: int32 [S + 1]
        spec: scale and window.

    Returns:
        [T, H, D], in the dtype of `query`; rows of pad tokens are unspecified.
    """
    num_tokens = query.shape[0]
    query, key, value = (_pad(x, max(CHUNK, TILE)) for x in (query, key, value))
    lengths = jnp.diff(query_start_loc)
    # a symmetric window is a causal one of 2 reach - 1 tokens that ends reach - 1 tokens later
    reach = spec.sliding_window
    window = None if reach is None else 2 * reach - 1
    plain = replace(spec, sliding_window=window, soft_cap=None, alibi_slopes=None)

    def tile(request: jax.Array, first: jax.Array, q: jax.Array) -> jax.Array:
        def fetch(chunk: jax.Array) -> tuple[jax.Array, jax.Array]:
            start = query_start_loc[request] + chunk * CHUNK
            k, v = (lax.dynamic_slice_in_dim(x, start, CHUNK) for x in (key, value))
            return k.swapaxes(0, 1)[None], v.swapaxes(0, 1)[None]

        end = lengths[request]
        last = jnp.broadcast_to(end - 1, (TILE,))
        if reach is not None:
            last = first + jnp.arange(TILE) + reach - 1
        rows = _rows(q, last, end, plain)
        return _attend(rows, fetch, CHUNK, plain, None)

    return _over_tiles(query, jnp.zeros_like(query), query_start_loc, lengths, tile)[:num_tokens]


def _over_decodes(
    query: jax.Array,
    ends: jax.Array,
    block_table: jax.Array,
    attend: Callable[[Rows, jax.Array], jax.Array],
    spec: AttentionSpec,
) -> jax.Array:
    """Attention of the decodes: the first tokens, one for each request whose end is not 0.

    `ends` is int32 [S]. Returns [T, H, D] or [T, H, value_size]; rows after the decodes are
    unspecified.
    """
    size = min(GROUP, len(ends))
    block_table, ends = (_pad(x, -len(ends) % size) for x in (block_table, ends))

    def group(i: jax.Array, out: jax.Array) -> jax.Array:
        q, end, table = (
            lax.dynamic_slice_in_dim(x, i * size, size) for x in (query, ends, block_table)
        )
        q = q.reshape(size, spec.num_kv_heads, -1, spec.head_size)
        position = jnp.broadcast_to(end[:, None] - 1, (size, q.shape[2]))
        result = attend(Rows(q, position, end), table).astype(out.dtype)
        return lax.dynamic_update_slice_in_dim(
            out, result.reshape(size, *out.shape[1:]), i * size, axis=0
        )

    num_decodes = (ends > 0).sum(dtype=jnp.int32)
    out = jnp.zeros((*query.shape[:2], spec.out_size), query.dtype)
    return lax.fori_loop(0, (num_decodes + size - 1) // size, group, out)


def _over_tiles(
    query: jax.Array,
    out: jax.Array,
    query_start_loc: jax.Array,
    lengths: jax.Array,
    attend: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
) -> jax.Array:
    """Overwrite rows of `out` with `attend(request, first, query[TILE, H, D])` for every tile.

    `lengths`, int32 [S], is the number of tokens to compute for each request; `first` is the
    tile's first token among them. `query` and `out` have TILE extra rows after their last token.
    """
    counts = (lengths + TILE - 1) // TILE
    ends = jnp.cumsum(counts, dtype=jnp.int32)

    def one(i: jax.Array, out: jax.Array) -> jax.Array:
        request = (ends <= i).sum(dtype=jnp.int32)
        first = (i - ends[request] + counts[request]) * TILE
        start = query_start_loc[request] + first
        q = lax.dynamic_slice_in_dim(query, start, TILE)
        heads = attend(request, first, q)[0]  # [H_kv, TILE * G, D]
        result = heads.reshape(len(heads), TILE, -1, out.shape[2]).swapaxes(0, 1)
        return lax.dynamic_update_slice_in_dim(
            out, result.reshape(TILE, *out.shape[1:]).astype(out.dtype), start, axis=0
        )

    return lax.fori_loop(0, ends[-1], one, out)


def _rows(q: jax.Array, position: jax.Array, end: jax.Array, spec: AttentionSpec) -> Rows:
    """Rows of one request's tile [TILE, H, D]: the heads of a token are adjacent."""
    heads = q.reshape(len(q), spec.num_kv_heads, -1, q.shape[2]).swapaxes(0, 1)
    group = heads.shape[2]
    return Rows(
        heads.reshape(1, len(heads), -1, q.shape[2]), position.repeat(group)[None], end[None]
    )


def _gather(
    layer: Layer, table: jax.Array, chunk: jax.Array, blocks: int, spec: AttentionSpec
) -> tuple[jax.Array, jax.Array]:
    """Keys and values of one chunk of each request, [N, H_kv, blocks * B, D] each."""
    ids = lax.dynamic_slice_in_dim(table, chunk * blocks, blocks, axis=1)
    shape = len(table), spec.num_kv_heads, -1, spec.head_size
    if spec.value_size is not None:
        shared = read_keys(layer, ids, spec.head_size).swapaxes(1, 2).reshape(shape)
        return shared, shared[..., : spec.value_size]
    key, value = read(layer, ids, spec.head_size)  # [N, blocks, H_kv, B, D] each
    return key.swapaxes(1, 2).reshape(shape), value.swapaxes(1, 2).reshape(shape)


def _attend(
    rows: Rows, fetch: Fetch, chunk_len: int, spec: AttentionSpec, sinks: jax.Array | None
) -> jax.Array:
    """Attention of the rows over the chunks that any of them needs: float32 [N, H_kv, R, D]."""
    first = jnp.zeros_like(rows.end)
    if spec.sliding_window is not None:  # slots before the window may hold anything
        first = jnp.maximum(rows.position.min(axis=1) - spec.sliding_window + 1, 0)
    lowest = jnp.where(rows.end > 0, first, jnp.iinfo(jnp.int32).max).min()

    def add_chunk(chunk: jax.Array, running: Running) -> Running:
        context = chunk * chunk_len + jnp.arange(chunk_len)
        is_live = (context >= first[:, None]) & (context < rows.end[:, None])  # [N, K]
        key, value = fetch(chunk)
        value = jnp.where(is_live[:, None, :, None], value, 0)  # dead slots may hold NaN
        scores = _scores(rows, key, context, is_live, spec)
        return _add(running, scores, value, rows.query.dtype)

    start = _initial((*rows.query.shape[:-1], spec.out_size), sinks)
    end = (rows.end.max() + chunk_len - 1) // chunk_len
    running = lax.fori_loop(jnp.minimum(lowest // chunk_len, end), end, add_chunk, start)
    total = jnp.where(running.total > 0, running.total, 1)  # padding rows have no weights
    return running.weighted / total[..., None]


def _scores(
    rows: Rows, key: jax.Array, context: jax.Array, is_live: jax.Array, spec: AttentionSpec
) -> jax.Array:
    """Scores, float32 [N, H_kv, R, K]; -inf where a row does not attend to the position."""
    scores = _product("nhrd,nhkd->nhrk", rows.query, key, rows.query.dtype) * spec.scale
    if spec.soft_cap is not None:
        scores = spec.soft_cap * jnp.tanh(scores / spec.soft_cap)
    distance = context - rows.position[..., None]  # [N, R, K]
    if spec.alibi_slopes is not None:
        slopes = _per_row(np.array(spec.alibi_slopes, np.float32), rows.query.shape)
        scores = scores + slopes[..., None] * distance[:, None]
    is_seen = is_live[:, None] & (distance <= 0)
    if spec.sliding_window is not None:
        is_seen &= distance > -spec.sliding_window
    return jnp.where(is_seen[:, None], scores, -jnp.inf)


def _initial(shape: tuple[int, ...], sinks: jax.Array | None) -> Running:
    """Running softmax before the first chunk; a sink is a weight of 1 without a value."""
    if sinks is None:
        return Running(
            jnp.full(shape[:-1], -jnp.inf), jnp.zeros(shape[:-1]), jnp.zeros(shape, jnp.float32)
        )
    largest = jnp.broadcast_to(_per_row(sinks.astype(jnp.float32), shape), shape[:-1])
    return Running(largest, jnp.ones(shape[:-1]), jnp.zeros(shape, jnp.float32))


def _add(running: Running, scores: jax.Array, value: jax.Array, dtype: jnp.dtype) -> Running:
    """Add one chunk to the running softmax: scores [N, H_kv, R, K], value [N, H_kv, K, D]."""
    largest = jnp.maximum(running.largest, scores.max(axis=-1))
    base = jnp.where(largest == -jnp.inf, 0, largest)  # avoids inf - inf in rows without scores
    weights = jnp.exp(scores - base[..., None])
    kept = jnp.exp(running.largest - base)
    return Running(
        largest,
        running.total * kept + weights.sum(axis=-1),
        running.weighted * kept[..., None] + _product("nhrk,nhkd->nhrd", weights, value, dtype),
    )


def _product(equation: str, left: jax.Array, right: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Float32 einsum of two arrays, at the precision that activations of `dtype` need."""
    precision = lax.Precision.HIGHEST if dtype == jnp.float32 else lax.Precision.DEFAULT
    left, right = left.astype(jnp.float32), right.astype(jnp.float32)
    return jnp.einsum(equation, left, right, precision=precision)


def _per_row(values: jax.Array | np.ndarray, shape: tuple[int, ...]) -> jax.Array:
    """Expand one number per query head, [H], to rows of shape [N, H_kv, R, D]: [H_kv, R]."""
    by_kv_head = jnp.asarray(values).reshape(shape[1], -1)
    return jnp.tile(by_kv_head, (1, shape[2] // by_kv_head.shape[1]))


def _pad(x: jax.Array, count: int, axis: int = 0) -> jax.Array:
    """Append `count` zeros to `x` along `axis`."""
    return jnp.pad(x, [(0, count if i == axis else 0) for i in range(x.ndim)])
