"""Sample tokens inside a program: the same ids as `portable.sampling`, without a sort.

A step samples with `sample`, which applies temperatures and filters. Flags select the work at run
time: a greedy step computes no noise, and a step without filters searches no thresholds. Everything
else (penalties, biases, masks, targets, logprobs) is a second program on the same logits, `finish`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from portalm_backends.xla.philox import gumbel

Array: TypeAlias = Any
"""A JAX array; R is the number of rows, V the vocabulary size."""

BROKEN = -1
"""Token of a row whose scores contain a NaN or are all -inf."""

NUM_TOP = 32
"""Number of most likely tokens that `finish` returns; more are computed on the host."""

_ROWS = 128
"""Rows sampled at a time: bounds the temporaries, which grow with the number of rows."""

_INF = float("inf")


@dataclasses.dataclass(frozen=True, slots=True)
class SamplingArrays:
    """The part of `SampleParams` that a step applies, as arrays of a program."""

    temperature: Array
    """float32 [R]"""
    top_k: Array
    """int32 [R]"""
    top_p: Array
    """float32 [R]"""
    min_p: Array
    """float32 [R]"""
    seed: Array
    """uint32 [R, 2], low word first."""
    position: Array
    """uint32 [R, 2], low word first."""
    is_greedy: Array
    """bool []"""
    has_filters: Array
    """bool []"""


def sample(scores: Array, arrays: SamplingArrays) -> Array:
    """Sample a token from each row of float32 [R, V]: int32 [R], `BROKEN` for a broken row."""
    num_rows = scores.shape[0]
    if num_rows <= _ROWS:
        return _sample(scores, arrays)

    def sample_part(i: Array, ids: Array) -> Array:
        start = jnp.minimum(i * _ROWS, num_rows - _ROWS)
        part = _sample(lax.dynamic_slice_in_dim(scores, start, _ROWS), _slice(arrays, start))
        return lax.dynamic_update_slice_in_dim(ids, part, start, 0)

    return lax.fori_loop(0, -(-num_rows // _ROWS), sample_part, jnp.zeros(num_rows, jnp.int32))


def _slice(arrays: SamplingArrays, start: Array) -> SamplingArrays:
    """The values of `_ROWS` rows, from row `start`."""
    names = ("temperature", "top_k", "top_p", "min_p", "seed", "position")
    part = {n: lax.dynamic_slice_in_dim(getattr(arrays, n), start, _ROWS) for n in names}
    return dataclasses.replace(arrays, **part)


def _sample(scores: Array, arrays: SamplingArrays) -> Array:
    ids = lax.cond(
        arrays.is_greedy, lambda: first_argmax(scores), lambda: _sample_random(scores, arrays)
    )
    best = jnp.max(scores, axis=-1)
    # the maximum of a row with a NaN is NaN
    return jnp.where(jnp.isnan(best) | (best == -_INF), BROKEN, ids)


def first_argmax(scores: Array) -> Array:
    """int32 [R]: the id of each row's largest score; the lowest id if there are several."""
    ids = lax.broadcasted_iota(jnp.int32, scores.shape, 1)
    is_best = scores == jnp.max(scores, axis=-1, keepdims=True)
    # a row with a NaN has no best score: any id will do, as `_sample` marks the row as broken
    return jnp.min(jnp.where(is_best, ids, scores.shape[1] - 1), axis=-1)


def _sample_random(scores: Array, arrays: SamplingArrays) -> Array:
    is_greedy = arrays.temperature == 0
    scaled = scores / jnp.where(is_greedy, 1.0, arrays.temperature)[:, None]
    filtered = lax.cond(arrays.has_filters, lambda: apply_filters(scaled, arrays), lambda: scaled)
    noisy = filtered + gumbel(arrays.seed, arrays.position, scores.shape[1])
    return jnp.where(is_greedy, first_argmax(scores), first_argmax(noisy))


def apply_filters(scaled: Array, arrays: SamplingArrays) -> Array:
    """Apply min_p, top_k and top_p: scores [R, V] with -inf for the tokens they remove.

    Each filter is a threshold. Those of top_k and top_p are found by bisection over the bits of
    the scores: 32 passes find exactly the score that a sort would.
    """
    vocab_size = scaled.shape[1]
    best = jnp.max(scaled, axis=-1, keepdims=True)  # [R, 1]
    min_p = arrays.min_p[:, None]
    threshold = jnp.where(min_p > 0, best + jnp.log(min_p), -_INF)

    keys = _ordered(scaled)
    k = jnp.where(arrays.top_k > 0, arrays.top_k, vocab_size)[:, None]

    def has_k(key: Array) -> Array:
        return jnp.sum(keys >= key, axis=-1, keepdims=True) >= k

    threshold = jnp.maximum(threshold, _score(_highest(has_k, scaled.shape[0])))
    kept = jnp.where(scaled >= threshold, scaled, -_INF)

    weights = jnp.exp(kept - best)
    needed = arrays.top_p[:, None] * jnp.sum(weights, axis=-1, keepdims=True)

    def is_enough(key: Array) -> Array:  # the tokens from `key` up have the needed mass
        mass = jnp.sum(jnp.where(keys >= key, weights, 0.0), axis=-1, keepdims=True)
        return mass >= needed

    # the highest score for which the tokens from it up have the needed mass
    last = _score(_highest(is_enough, scaled.shape[0]))
    is_off = arrays.top_p[:, None] >= 1.0
    threshold = jnp.where(is_off, threshold, jnp.maximum(threshold, last))
    return jnp.where(scaled >= threshold, scaled, -_INF)


def _highest(holds: Any, num_rows: int) -> Array:
    """The highest key [R, 1] for which `holds` is true in each row.

    `holds` must be true for every lower key as well.
    """

    def step(i: Array, low: Array) -> Array:
        candidate = low + lax.shift_left(jnp.uint32(1), jnp.uint32(31) - i.astype(jnp.uint32))
        return jnp.where(holds(candidate), candidate, low)

    return lax.fori_loop(0, 32, step, jnp.zeros((num_rows, 1), jnp.uint32))


def _ordered(scores: Array) -> Array:
    """Map float32 scores to uint32 keys in the same order; 0.0 and -0.0 are equal."""
    bits = lax.bitcast_convert_type(jnp.where(scores == 0, 0.0, scores), jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _score(keys: Array) -> Array:
    """Map keys back to scores, the inverse of `_ordered`; keys below all scores give -inf."""
    bits = jnp.where(keys >> 31 == 1, keys & jnp.uint32(0x7FFFFFFF), ~keys)
    scores = lax.bitcast_convert_type(bits, jnp.float32)
    return jnp.where(jnp.isnan(scores), -_INF, scores)


# -- everything else --------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class FinishArrays:
    """The part of `SampleParams` that `finish` applies in addition to `SamplingArrays`."""

    entries: Array
    """float32 [3, R, V]: a token's count in the prompt, its count in the output, its bias."""
    presence: Array
    """float32 [R]"""
    frequency: Array
    """float32 [R]"""
    repetition: Array
    """float32 [R]"""
    allowed: Array
    """int32 [R, ceil(V / 32)]: one bit per token, set if it may be sampled."""
    targets: Array
    """int32 [R]: the token to return instead of a sampled one; -1: sample."""
    is_adjusted: Array
    """bool []: at least one row has a penalty or a bias."""
    wants_logprobs: Array
    """bool []"""


def add_entries(
    entries: Array | None, rows: Array, token_ids: Array, kinds: Array, values: Array, *, shape: Any
) -> Array:
    """Add N entries to `FinishArrays.entries`, float32 [3, R, V]; return the new array.

    Args:
        entries: the entries so far; None: none, zeros of `shape`.
        rows: int32 [N], row of each entry.
        token_ids: int32 [N]
        kinds: int32 [N], index into the first dimension; 3 is padding and dropped.
        values: float32 [N], added to the entry.
        shape: (3, R, V)
    """
    before = jnp.zeros(shape, jnp.float32) if entries is None else entries
    return before.at[kinds, rows, token_ids].add(values, mode="drop")


def finish(logits: Array, arrays: SamplingArrays, more: FinishArrays) -> tuple[Array, ...]:
    """Sample from float32 logits [R, V] with everything that `SampleParams` can ask for.

    Returns:
        Ids, logprobs and ranks [R]; the most likely ids and their logprobs [R, NUM_TOP]. Logprobs
        are of the raw logits. All but the ids are zero unless `more.wants_logprobs`.
    """
    scores = lax.cond(more.is_adjusted, lambda: _adjust(logits, more), lambda: logits)
    ids = sample(_apply_mask(scores, more.allowed), arrays)
    ids = jnp.where(more.targets >= 0, more.targets, ids)
    num_rows, num_top = logits.shape[0], min(NUM_TOP, logits.shape[1])

    def zeros() -> tuple[Array, ...]:
        return (
            jnp.zeros(num_rows, jnp.float32),
            jnp.zeros(num_rows, jnp.int32),
            jnp.zeros((num_rows, num_top), jnp.int32),
            jnp.zeros((num_rows, num_top), jnp.float32),
        )

    reported = lax.cond(more.wants_logprobs, lambda: _logprobs(logits, ids, num_top), zeros)
    return (ids, *reported)


def _adjust(logits: Array, more: FinishArrays) -> Array:
    """Apply penalties, then biases; see `portable.sampling`."""
    in_prompt, in_output, bias = more.entries
    repetition = more.repetition[:, None]
    repeated = jnp.where(logits > 0, logits / repetition, logits * repetition)
    scores = jnp.where(in_prompt + in_output > 0, repeated, logits)
    scores = scores - more.frequency[:, None] * in_output
    return scores - more.presence[:, None] * (in_output > 0) + bias


def _apply_mask(scores: Array, allowed: Array) -> Array:
    bits = (allowed[:, :, None] >> jnp.arange(32, dtype=jnp.int32)) & 1
    is_allowed = bits.reshape(allowed.shape[0], -1)[:, : scores.shape[1]] == 1
    return jnp.where(is_allowed, scores, -_INF)


def _logprobs(logits: Array, ids: Array, num_top: int) -> tuple[Array, ...]:
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    at = jnp.maximum(ids, 0)[:, None]  # a broken row has no logprobs: any id will do
    own = jnp.take_along_axis(logits, at, axis=1)
    ranks = jnp.sum(logits > own, axis=-1) + 1
    # top_k puts the lower id of a tie first, but ranks 0.0 above -0.0
    _, top_ids = lax.top_k(jnp.where(logits == 0, 0.0, logits), num_top)
    return (
        jnp.take_along_axis(logprobs, at, axis=1)[:, 0],
        ranks.astype(jnp.int32),
        top_ids.astype(jnp.int32),
        jnp.take_along_axis(logprobs, top_ids, axis=1),
    )
