"""Drawing tokens in a program: the integers that `portable.sampling` draws, without a sort.

A program's own sampling (`draw`) knows temperatures and filters, chosen by flags at run time: a
greedy step computes no noise, one without filters looks for no thresholds. Everything else that
rows may ask for (penalties, biases, masks, targets, logprobs) is one more program behind the step
(`finish`), of the same logits.
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from portalm_backends.xla.philox import gumbel

Array: TypeAlias = Any
"""A JAX array: R rows, V columns."""

BROKEN = -1
"""The token of a row whose scores hold a NaN, or nothing that may be drawn."""

NUM_TOP = 32
"""How many of the likeliest tokens `finish` reports; more are found on the host."""

_ROWS = 128
"""Rows that draw at a time: what that needs beside the scores grows with them."""

_INF = float("inf")


@dataclasses.dataclass(frozen=True, slots=True)
class Draws:
    """`SampleParams` as a program has them."""

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


def draw(scores: Array, draws: Draws) -> Array:
    """int32 [R]: the token that each row of float32 [R, V] draws, `BROKEN` where it cannot."""
    num_rows = scores.shape[0]
    if num_rows <= _ROWS:
        return _draw(scores, draws)

    def draw_some(i: Array, ids: Array) -> Array:
        start = jnp.minimum(i * _ROWS, num_rows - _ROWS)
        some = _draw(lax.dynamic_slice_in_dim(scores, start, _ROWS), _some_of(draws, start))
        return lax.dynamic_update_slice_in_dim(ids, some, start, 0)

    return lax.fori_loop(0, -(-num_rows // _ROWS), draw_some, jnp.zeros(num_rows, jnp.int32))


def _some_of(draws: Draws, start: Array) -> Draws:
    """Those of `_ROWS` rows from `start` on."""
    names = ("temperature", "top_k", "top_p", "min_p", "seed", "position")
    some = {n: lax.dynamic_slice_in_dim(getattr(draws, n), start, _ROWS) for n in names}
    return dataclasses.replace(draws, **some)


def _draw(scores: Array, draws: Draws) -> Array:
    ids = lax.cond(
        draws.is_greedy, lambda: first_argmax(scores), lambda: _draw_random(scores, draws)
    )
    best = jnp.max(scores, axis=-1)
    # a maximum is NaN where any score is
    return jnp.where(jnp.isnan(best) | (best == -_INF), BROKEN, ids)


def first_argmax(scores: Array) -> Array:
    """int32 [R]: the lowest id among the largest of each row."""
    ids = lax.broadcasted_iota(jnp.int32, scores.shape, 1)
    is_best = scores == jnp.max(scores, axis=-1, keepdims=True)
    # a row with a NaN has no best: any id will do, the row is marked as broken
    return jnp.min(jnp.where(is_best, ids, scores.shape[1] - 1), axis=-1)


def _draw_random(scores: Array, draws: Draws) -> Array:
    is_greedy = draws.temperature == 0
    scaled = scores / jnp.where(is_greedy, 1.0, draws.temperature)[:, None]
    filtered = lax.cond(draws.has_filters, lambda: apply_filters(scaled, draws), lambda: scaled)
    noisy = filtered + gumbel(draws.seed, draws.position, scores.shape[1])
    return jnp.where(is_greedy, first_argmax(scores), first_argmax(noisy))


def apply_filters(scaled: Array, draws: Draws) -> Array:
    """Scores [R, V], -inf where min_p, top_k or top_p drop a token.

    Each is a threshold; top_k's and top_p's are found by bisection over the scores' bits, which
    takes 32 looks at them and finds the very score that a sort would.
    """
    vocab_size = scaled.shape[1]
    best = jnp.max(scaled, axis=-1, keepdims=True)  # [R, 1]
    min_p = draws.min_p[:, None]
    threshold = jnp.where(min_p > 0, best + jnp.log(min_p), -_INF)

    keys = _ordered(scaled)
    k = jnp.where(draws.top_k > 0, draws.top_k, vocab_size)[:, None]

    def has_k(key: Array) -> Array:
        return jnp.sum(keys >= key, axis=-1, keepdims=True) >= k

    threshold = jnp.maximum(threshold, _score(_highest(has_k, scaled.shape[0])))
    kept = jnp.where(scaled >= threshold, scaled, -_INF)

    weights = jnp.exp(kept - best)
    needed = draws.top_p[:, None] * jnp.sum(weights, axis=-1, keepdims=True)

    def is_enough(key: Array) -> Array:  # what is likelier than `key` has all that is needed
        ahead = jnp.sum(jnp.where(keys >= key, weights, 0.0), axis=-1, keepdims=True)
        return ahead >= needed

    # the highest score whose own and likelier tokens together are enough: the last one needed
    last = _score(_highest(is_enough, scaled.shape[0]))
    is_off = draws.top_p[:, None] >= 1.0
    threshold = jnp.where(is_off, threshold, jnp.maximum(threshold, last))
    return jnp.where(scaled >= threshold, scaled, -_INF)


def _highest(holds: Any, num_rows: int) -> Array:
    """The highest key [R, 1] for which `holds` is true of each row; it is of all below."""

    def step(i: Array, low: Array) -> Array:
        candidate = low + lax.shift_left(jnp.uint32(1), jnp.uint32(31) - i.astype(jnp.uint32))
        return jnp.where(holds(candidate), candidate, low)

    return lax.fori_loop(0, 32, step, jnp.zeros((num_rows, 1), jnp.uint32))


def _ordered(scores: Array) -> Array:
    """uint32 keys that are ordered as float32 scores are; 0.0 and -0.0 are one."""
    bits = lax.bitcast_convert_type(jnp.where(scores == 0, 0.0, scores), jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _score(keys: Array) -> Array:
    """The inverse of `_ordered`; keys below all scores are -inf."""
    bits = jnp.where(keys >> 31 == 1, keys & jnp.uint32(0x7FFFFFFF), ~keys)
    scores = lax.bitcast_convert_type(bits, jnp.float32)
    return jnp.where(jnp.isnan(scores), -_INF, scores)


# -- everything else --------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class Wishes:
    """What rows may ask for beside `Draws`."""

    entries: Array
    """float32 [3, R, V]: how often a token is in the prompt, how often in the answer, its bias."""
    presence: Array
    """float32 [R]"""
    frequency: Array
    """float32 [R]"""
    repetition: Array
    """float32 [R]"""
    allowed: Array
    """int32 [R, ceil(V / 32)]"""
    targets: Array
    """int32 [R]: -1 where a token is drawn."""
    is_adjusted: Array
    """bool []: some row has a penalty or a bias."""
    wants_logprobs: Array
    """bool []"""


def add_entries(
    entries: Array | None, rows: Array, token_ids: Array, kinds: Array, values: Array, *, shape: Any
) -> Array:
    """`Wishes.entries`, [3, R, V] of `shape`, with N more added: int32 [N] three times, float32.

    Entries of kind 3 are padding.
    """
    before = jnp.zeros(shape, jnp.float32) if entries is None else entries
    return before.at[kinds, rows, token_ids].add(values, mode="drop")


def finish(logits: Array, draws: Draws, wishes: Wishes) -> tuple[Array, ...]:
    """Ids, logprobs and ranks [R], the likeliest ids and their logprobs [R, NUM_TOP].

    Logprobs are of the raw logits; what was not asked for is zero.
    """
    scores = lax.cond(wishes.is_adjusted, lambda: _adjust(logits, wishes), lambda: logits)
    ids = draw(_apply_mask(scores, wishes.allowed), draws)
    ids = jnp.where(wishes.targets >= 0, wishes.targets, ids)
    num_rows, num_top = logits.shape[0], min(NUM_TOP, logits.shape[1])

    def nothing() -> tuple[Array, ...]:
        return (
            jnp.zeros(num_rows, jnp.float32),
            jnp.zeros(num_rows, jnp.int32),
            jnp.zeros((num_rows, num_top), jnp.int32),
            jnp.zeros((num_rows, num_top), jnp.float32),
        )

    reported = lax.cond(wishes.wants_logprobs, lambda: _logprobs(logits, ids, num_top), nothing)
    return (ids, *reported)


def _adjust(logits: Array, wishes: Wishes) -> Array:
    """Penalties, then biases; see `portable.sampling`."""
    in_prompt, in_output, bias = wishes.entries
    repetition = wishes.repetition[:, None]
    repeated = jnp.where(logits > 0, logits / repetition, logits * repetition)
    scores = jnp.where(in_prompt + in_output > 0, repeated, logits)
    scores = scores - wishes.frequency[:, None] * in_output
    return scores - wishes.presence[:, None] * (in_output > 0) + bias


def _apply_mask(scores: Array, allowed: Array) -> Array:
    bits = (allowed[:, :, None] >> jnp.arange(32, dtype=jnp.int32)) & 1
    is_allowed = bits.reshape(allowed.shape[0], -1)[:, : scores.shape[1]] == 1
    return jnp.where(is_allowed, scores, -_INF)


def _logprobs(logits: Array, ids: Array, num_top: int) -> tuple[Array, ...]:
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    at = jnp.maximum(ids, 0)[:, None]  # a broken row has no logprobs: any id
    own = jnp.take_along_axis(logits, at, axis=1)
    ranks = jnp.sum(logits > own, axis=-1) + 1
    # top_k puts the lower of equal ids first, but takes 0.0 for more than -0.0
    _, top_ids = lax.top_k(jnp.where(logits == 0, 0.0, logits), num_top)
    return (
        jnp.take_along_axis(logprobs, at, axis=1)[:, 0],
        ranks.astype(jnp.int32),
        top_ids.astype(jnp.int32),
        jnp.take_along_axis(logprobs, top_ids, axis=1),
    )
