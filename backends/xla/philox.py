"""Philox4x32-10 in 32-bit integers, the widest that a TPU has; see `portable.philox`.

Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import jax.numpy as jnp

Array: TypeAlias = Any
"""A JAX array; uint32 unless stated otherwise."""

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85


def _mul_hi_lo(a: Array, m: int) -> tuple[Array, Array]:
    """High and low 32 bits of a * m, from 16-bit halves, whose products fit in 32 bits."""
    m_low, m_high = jnp.uint32(m & 0xFFFF), jnp.uint32(m >> 16)
    a_low, a_high = a & 0xFFFF, a >> 16
    low, cross = a_low * m_low, a_high * m_low
    middle = a_low * m_high + (low >> 16)  # at most (2^16 - 1)^2 + 2^16 - 1: no overflow
    carried = cross + (middle & 0xFFFF)
    return a_high * m_high + (middle >> 16) + (carried >> 16), a * jnp.uint32(m)


def gumbel(seed: Array, position: Array, vocab_size: int) -> Array:
    """Compute Gumbel noise as `SampleParams` defines it.

    Args:
        seed: uint32 [R, 2], low word first.
        position: uint32 [R, 2], low word first.
        vocab_size: V, the noise values per row.

    Returns:
        float32 [R, V]
    """
    num_groups = -(-vocab_size // 4)
    c0 = jnp.arange(num_groups, dtype=jnp.uint32)[None, :]
    c1 = jnp.zeros_like(c0)
    c2, c3 = position[:, :1], position[:, 1:]
    k0, k1 = seed[:, :1], seed[:, 1:]
    for _ in range(10):
        high0, low0 = _mul_hi_lo(c0, _M0)
        high1, low1 = _mul_hi_lo(c2, _M1)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + jnp.uint32(_W0), k1 + jnp.uint32(_W1)
    words = jnp.stack(jnp.broadcast_arrays(c0, c1, c2, c3), axis=-1)  # [R, V / 4, 4]
    words = words.reshape(words.shape[0], -1)[:, :vocab_size]
    # 23 bits plus one half: exact in float32, never 0 or 1. A TPU casts only int32 to float32
    uniform = ((words >> 9).astype(jnp.int32).astype(jnp.float32) + 0.5) * jnp.float32(2.0**-23)
    return -jnp.log(-jnp.log(uniform))
