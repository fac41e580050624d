"""Layer operations in JAX. Each is one XLA function, traced once for all layers of a model.

Products of float32 inputs use full float32 precision: by default a TPU would round both inputs
to bfloat16.
"""

from __future__ import annotations

import functools
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

Array: TypeAlias = Any
jit = functools.partial(jax.jit, inline=False)


@jit
def linear(x: Array, weight: Array, bias: Array | None) -> Array:
    """Multiply x [T, K] with weight [N, K] transposed; add bias [N]: [T, N] in x's dtype.

    The sums are float32.
    """
    out = _product(x, weight)
    if bias is not None:
        out = out + bias.astype(jnp.float32)
    return out.astype(x.dtype)


@jit
def logits(x: Array, weight: Array) -> Array:
    """Multiply x [R, C] with weight [V, C] transposed: float32 [R, V]."""
    return _product(x, weight)


def _product(x: Array, weight: Array) -> Array:
    return jax.lax.dot_general(
        x,
        weight,
        (((1,), (1,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


@jit
def linear_heads(x: Array, weight: Array) -> Array:
    """Multiply x [T, H, K] with weight [H, N, K] head by head, with float32 sums: [T, H, N]."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    product = functools.partial(jnp.einsum, "thk,hnk->thn", precision=precision)
    return product(x, weight, preferred_element_type=jnp.float32).astype(x.dtype)


@jit
def take(table: Array, rows: Array) -> Array:
    """Rows int32 [R] of table [N, C]: [R, C]. Row numbers must be valid: they are not checked."""
    return table.at[rows].get(mode="promise_in_bounds")


@functools.partial(jit, static_argnames=("eps",))
def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """x / sqrt(mean(x^2) + eps), rounded to x's dtype, times weight."""
    wide = x.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return normed.astype(x.dtype) * weight


@functools.partial(jit, static_argnames=("eps",))
def add_rms_norm(x: Array, residual: Array, weight: Array, eps: float) -> tuple[Array, Array]:
    """(rms_norm(x + residual), x + residual); the sum is rounded once."""
    # without reduce_precision XLA may keep the sum in more bits than the dtype has
    total = jax.lax.reduce_precision(
        x.astype(jnp.float32) + residual.astype(jnp.float32), *_bits(x.dtype)
    ).astype(x.dtype)
    return rms_norm(total, weight, eps), total


def _bits(dtype: Any) -> tuple[int, int]:
    info = jnp.finfo(dtype)
    return int(info.nexp), int(info.nmant)


@functools.partial(jit, static_argnames=("eps",))
def layer_norm(x: Array, weight: Array, bias: Array, eps: float) -> Array:
    """(x - mean) / sqrt(variance + eps) * weight + bias, rounded to x's dtype once."""
    wide = x.astype(jnp.float32)
    centered = wide - jnp.mean(wide, axis=-1, keepdims=True)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(centered), axis=-1, keepdims=True) + eps)
    out = centered * scale * weight.astype(jnp.float32) + bias.astype(jnp.float32)
    return out.astype(x.dtype)


@functools.partial(jit, static_argnames=("is_interleaved",))
def rope(
    query: Array, key: Array, positions: Array, cos_sin: Array, is_interleaved: bool
) -> tuple[Array, Array]:
    """Rotate query [T, H, D] and key [T, H_kv, D] by positions int32 [T]."""
    turns = take(cos_sin, positions)[:, None]  # [T, 1, rotary_dim]
    return _rotate(query, turns, is_interleaved), _rotate(key, turns, is_interleaved)


def _rotate(x: Array, turns: Array, is_interleaved: bool) -> Array:
    """Rotate x [T, H, D] in float32; dimensions past rotary_dim stay unchanged."""
    rotary_dim = turns.shape[-1]
    cos, sin = jnp.split(turns, 2, axis=-1)
    turned, rest = x[..., :rotary_dim].astype(jnp.float32), x[..., rotary_dim:]
    if is_interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        out = jnp.stack((a * cos - b * sin, b * cos + a * sin), axis=-1).reshape(turned.shape)
    else:
        a, b = jnp.split(turned, 2, axis=-1)
        out = jnp.concatenate((a * cos - b * sin, b * cos + a * sin), axis=-1)
    return jnp.concatenate((out.astype(x.dtype), rest), axis=-1)


@jit
def silu_mul(gate_up: Array) -> Array:
    """silu(gate) * up of [T, 2 I]: [T, I]."""
    gate, up = jnp.split(gate_up, 2, axis=-1)
    wide = gate.astype(jnp.float32)
    return (wide * jax.nn.sigmoid(wide)).astype(gate.dtype) * up


@jit
def gelu(x: Array) -> Array:
    """x * (1 + erf(x / sqrt(2))) / 2."""
    return jax.nn.gelu(x.astype(jnp.float32), approximate=False).astype(x.dtype)
