"""Attention over the paged cache, block by block with a running softmax."""

from __future__ import annotations

import functools
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from portalm.backend import AttentionSpec

Array: TypeAlias = Any


@functools.partial(jax.jit, static_argnames=("spec", "max_query_len"))
def paged_attention(
    query: Array,
    layer: Array,
    query_start_loc: Array,
    seq_lens: Array,
    block_table: Array,
    spec: AttentionSpec,
    *,
    max_query_len: int,
    sinks: Array | None = None,
) -> Array:
    """Causal attention [T, H, D]."""
    num_tokens, num_heads, size = query.shape
    block_size, num_kv = layer.shape[2], spec.num_kv_heads
    group = num_heads // num_kv
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    request = jnp.searchsorted(query_start_loc[1:], token, side="right").astype(jnp.int32)
    request = jnp.minimum(request, len(seq_lens) - 1)
    length = seq_lens[request]
    position = length - (query_start_loc[request + 1] - token)
    q = query.astype(jnp.float32).reshape(num_tokens, num_kv, group, size)
    tables = block_table[request]  # [T, MB]
    num_blocks = (jnp.max(seq_lens) + block_size - 1) // block_size
    low = jnp.full((num_tokens, num_kv, group), -jnp.inf)
    if sinks is not None:
        low = jnp.broadcast_to(sinks.astype(jnp.float32).reshape(num_kv, group), low.shape)
    state = (low, jnp.zeros_like(low) if sinks is None else jnp.ones_like(low), jnp.zeros_like(q))

    def step(j: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
        high, total, out = state
        block = layer[tables[:, j]].astype(jnp.float32).swapaxes(1, 2)  # [T, B, H_kv, 2 P]
        lanes = block.shape[-1] // 2
        context = j * block_size + jnp.arange(block_size, dtype=jnp.int32)
        seen = context[None] <= position[:, None]
        if spec.sliding_window is not None:
            seen &= context[None] > position[:, None] - spec.sliding_window
        k = jnp.where(seen[:, :, None, None], block[..., :size], 0)
        v = jnp.where(seen[:, :, None, None], block[..., lanes : lanes + size], 0)
        scores = jnp.einsum("tkgd,tbkd->tkgb", q, k, precision="highest") * spec.scale
        if spec.soft_cap is not None:
            scores = spec.soft_cap * jnp.tanh(scores / spec.soft_cap)
        if spec.alibi_slopes is not None:
            slopes = jnp.array(spec.alibi_slopes).reshape(num_kv, group)
            scores += slopes[None, :, :, None] * (context[None] - position[:, None])[:, None, None]
        scores = jnp.where(seen[:, None, None], scores, -jnp.inf)
        new = jnp.maximum(high, scores.max(-1))
        safe = jnp.where(jnp.isinf(new), 0, new)
        p = jnp.exp(scores - safe[..., None])
        shrink = jnp.exp(high - safe)
        out = out * shrink[..., None] + jnp.einsum("tkgb,tbkd->tkgd", p, v, precision="highest")
        return new, total * shrink + p.sum(-1), out

    _, total, out = lax.fori_loop(0, num_blocks, step, state)
    out = out / jnp.where(total == 0, 1, total)[..., None]
    return out.reshape(query.shape).astype(query.dtype)
