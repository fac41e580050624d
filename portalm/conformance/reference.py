"""What each operation means, in float64: plain loops over numpy, no paging, no backend.

Nothing here is shared with the code under test, and nothing is written to be fast.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from portalm.backend import SCALED_KV_DTYPES, AttentionSpec

Array = npt.NDArray[np.float64]


def attention(
    query: Array, key: Array, value: Array, spec: AttentionSpec, sinks: Array | None = None
) -> Array:
    """Causal attention of one request's newest tokens over its whole context.

    Args:
        query: [Q, H, D], the last Q tokens of the context.
        key: [N, H_kv, D], the context in order, the query tokens' own keys included.
        value: [N, H_kv, D]
        spec: scale, window, soft cap and slopes.
        sinks: [H], one more score for each row of a head.

    Returns:
        [Q, H, D]
    """
    num_queries, num_heads, _ = query.shape
    group = num_heads // key.shape[1]
    out = np.empty(query.shape, np.float64)
    for i in range(num_queries):
        position = len(key) - num_queries + i
        first = 0
        if spec.sliding_window is not None:
            first = max(0, position - spec.sliding_window + 1)
        for head in range(num_heads):
            seen = slice(first, position + 1), head // group
            scores = key[seen] @ query[i, head] * spec.scale  # [position + 1 - first]
            if spec.soft_cap is not None:
                scores = spec.soft_cap * np.tanh(scores / spec.soft_cap)
            if spec.alibi_slopes is not None:
                scores += spec.alibi_slopes[head] * (np.arange(first, position + 1) - position)
            sink = -np.inf if sinks is None else sinks[head]
            largest = max(scores.max(), sink)
            weights = np.exp(scores - largest)
            out[i, head] = weights @ value[seen] / (weights.sum() + np.exp(sink - largest))
    return out


def kept_in_codes(x: npt.NDArray[np.float32], dtype: str) -> tuple[Array, Array]:
    """What a cache of 8-bit codes makes of keys or values, and how far its codes lie apart there.

    Args:
        x: [..., D]; each vector has a scale of its own.
        dtype: of `SCALED_KV_DTYPES`.

    Returns:
        [..., D] each; NaN in all of a vector that holds anything not finite.
    """
    largest = SCALED_KV_DTYPES[dtype]
    out, steps = np.zeros((2, *x.shape), np.float64)
    for place in np.ndindex(x.shape[:-1]):
        if not np.isfinite(x[place]).all():
            out[place] = steps[place] = np.nan
            continue
        scale = np.abs(x[place]).max() * (np.float32(1) / np.float32(largest))
        scale = _to_bits(np.array(scale, np.float64), 8)  # bfloat16 has 8 bits
        if scale < 2.0**-100:
            continue
        exact = (x[place] * (np.float32(1) / np.float32(scale))).astype(np.float64)
        step = np.ones_like(exact)
        if dtype == "fp8":  # 4 bits, and steps of 2^-9 below 2^-6
            _, exponent = np.frexp(exact)
            step = np.exp2(np.maximum(exponent, -5) - 4)
        code = np.rint(exact / step) * step
        out[place] = (code + 0.0 if dtype == "int8" else code) * scale  # -0 is no whole number
        steps[place] = step * scale
    return out, steps


def _to_bits(x: Array, count: int) -> Array:
    """`x` rounded to so many significant bits, ties to even."""
    fraction, exponent = np.frexp(x)
    rounded: Array = np.ldexp(np.rint(np.ldexp(fraction, count)), exponent - count)
    return rounded


def encoder_attention(query: Array, key: Array, value: Array, spec: AttentionSpec) -> Array:
    """Attention of each token of one request to all of them.

    Args:
        query: [N, H, D]
        key: [N, H_kv, D]
        value: [N, H_kv, D]
        spec: scale.

    Returns:
        [N, H, D]
    """
    group = query.shape[1] // key.shape[1]
    out = np.empty(query.shape, np.float64)
    for i in range(len(query)):
        for head in range(query.shape[1]):
            scores = key[:, head // group] @ query[i, head] * spec.scale  # [N]
            weights = np.exp(scores - scores.max())
            out[i, head] = weights @ value[:, head // group] / weights.sum()
    return out


def layer_norm(x: Array, weight: Array, bias: Array, eps: float) -> Array:
    """`x` [T, C] less its mean, over its standard deviation, times `weight` plus `bias`, [C]."""
    centred = x - np.mean(x, axis=-1, keepdims=True)
    spread = np.sqrt(np.mean(centred * centred, axis=-1, keepdims=True) + eps)
    normed: Array = centred / spread * weight + bias
    return normed


def gelu(x: Array) -> Array:
    """`x` times the share of a normal distribution below it."""
    shares = [0.5 * (1 + math.erf(value / math.sqrt(2))) for value in x.ravel().tolist()]
    out: Array = x * np.array(shares).reshape(x.shape)
    return out


def gelu_tanh(x: Array) -> Array:
    """`x` times (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))) / 2."""
    out: Array = x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2
    return out


def gelu_tanh_mul(gate_up: Array) -> Array:
    """gelu_tanh(gate) * up of [T, 2 I], gate first: [T, I]."""
    gate, up = np.split(gate_up, 2, axis=-1)
    return gelu_tanh(gate) * up


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """`x` [T, C] over its root mean square, times `weight` [C]."""
    normed: Array = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight
    return normed


def rope(x: Array, positions: npt.NDArray[np.int32], cos_sin: Array, is_interleaved: bool) -> Array:
    """`x` [T, H, D] with each pair of its first rotary_dim numbers turned by its position's angle.

    Args:
        x: [T, H, D]
        positions: [T]
        cos_sin: [max_position, rotary_dim]: cosines, then sines.
        is_interleaved: pairs are neighbours; else the two halves of the rotary dimensions.
    """
    half = cos_sin.shape[1] // 2
    out: Array = x.copy()
    for token, position in enumerate(positions):
        for pair in range(half):
            cos, sin = cos_sin[position, pair], cos_sin[position, half + pair]
            first, second = (2 * pair, 2 * pair + 1) if is_interleaved else (pair, half + pair)
            a, b = x[token, :, first], x[token, :, second]
            out[token, :, first] = a * cos - b * sin
            out[token, :, second] = b * cos + a * sin
    return out


def silu_mul(gate_up: Array) -> Array:
    """gate / (1 + exp(-gate)) * up of [T, 2 I], gate first: [T, I]."""
    gate, up = np.split(gate_up, 2, axis=-1)
    return gate * _sigmoid(gate) * up


def _sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)), the exponent never positive: no overflow at either end."""
    small = np.exp(-np.abs(x))
    return np.where(x >= 0, 1 / (1 + small), small / (1 + small))


def swiglu(gate_up: Array, limit: float, alpha: float) -> Array:
    """gate * sigmoid(alpha * gate) * (up + 1) of [T, 2 I], clamped: [T, I]."""
    gate, up = np.split(gate_up, 2, axis=-1)
    gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
    return gate * _sigmoid(alpha * gate) * (up + 1)


def moe(
    x: Array,
    ids: npt.NDArray[np.int32],
    shares: Array,
    gate_up: Sequence[Array],
    down: Sequence[Array],
    biases: tuple[Array, Array] | None = None,
    limit: float | None = None,
    alpha: float = 1.0,
) -> Array:
    """Each token's experts applied to it and added up by their shares.

    Args:
        x: [T, C]
        ids: [T, k]
        shares: [T, k]
        gate_up: [2 I, C] of each expert.
        down: [C, I] of each.
        biases: [E, 2 I] and [E, C].
        limit: clamps as in `swiglu`; None: silu(gate) * up.
        alpha: of `swiglu`.
    """
    out: Array = np.zeros(x.shape, np.float64)
    for token, chosen in enumerate(ids):
        for expert, share in zip(chosen, shares[token], strict=True):
            first, last = (None, None) if biases is None else (b[expert] for b in biases)
            wide = linear(x[token : token + 1], gate_up[expert], first)
            inner = silu_mul(wide) if limit is None else swiglu(wide, limit, alpha)
            out[token] += share * linear(inner, down[expert], last)[0]
    return out


def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """`x` [T, K] times `weight` [N, K] transposed, plus bias [N]: [T, N]."""
    out: Array = x @ weight.T
    return out if bias is None else out + bias


def rope_table(max_position: int, rotary_dim: int, theta: float) -> Array:
    """Cosines, then sines, of position / theta^(2 i / rotary_dim): [max_position, rotary_dim]."""
    inverse = theta ** (-np.arange(0, rotary_dim, 2) / rotary_dim)
    angles = np.arange(max_position)[:, None] * inverse
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
