"""Attention of encoders: every token sees its whole request, and nothing is kept."""

from __future__ import annotations

import functools
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from portalm.backend import AttentionSpec

Array: TypeAlias = Any

_TILE = 256
"""Queries at a time: their scores over all tokens are the largest thing there is."""


@functools.partial(jax.jit, static_argnames=("spec",))
def attention(
    query: Array, key: Array, value: Array, query_start_loc: Array, *, spec: AttentionSpec
) -> Array:
    """Attention of each token to all tokens of its request.

    Args:
        query: [T, H, D], whole prompts end to end.
        key: [T, H_kv, D]
        value: [T, H_kv, D]
        query_start_loc: int32 [S + 1]; tokens behind the last are padding.
        spec: the scale.

    Returns:
        [T, H, D], in the dtype of `query`; rows of pad tokens are unspecified.
    """
    num_tokens, num_heads, size = query.shape
    num_kv = spec.num_kv_heads
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    request = jnp.searchsorted(query_start_loc[1:], token, side="right").astype(jnp.int32)
    is_used = (request < len(query_start_loc) - 1)[:, None, None]
    # what padding holds may be NaN: nothing of it may be multiplied
    k, v = (jnp.where(is_used, x, 0).astype(jnp.float32) for x in (key, value))
    tile = min(_TILE, num_tokens)
    padded = jnp.pad(query, ((0, -num_tokens % tile), (0, 0), (0, 0))).astype(jnp.float32)
    tiles = padded.reshape(-1, tile, num_kv, num_heads // num_kv, size)
    owners = jnp.pad(request, (0, -num_tokens % tile)).reshape(-1, tile)

    def attend(one: tuple[Array, Array]) -> Array:
        q, owner = one
        scores = jnp.einsum("qkgd,tkd->kgqt", q, k, precision="highest") * spec.scale
        probs = jax.nn.softmax(jnp.where(owner[:, None] == request, scores, -jnp.inf), axis=-1)
        return jnp.einsum("kgqt,tkd->qkgd", probs, v, precision="highest")

    out = lax.map(attend, (tiles, owners)).reshape(-1, num_heads, size)
    return out[:num_tokens].astype(query.dtype)
