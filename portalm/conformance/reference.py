"""The meaning of each operation: plain loops over float64 numpy arrays, no paging, no backend.

It shares no code with what it tests, and is not written for speed.
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
        key: [N, H_kv, D], the whole context in order, query tokens included.
        value: [N, H_kv, V]
        spec: scale, window, soft cap and slopes.
        sinks: [H], an additional score in each row of a head.

    Returns:
        [Q, H, V]
    """
    num_queries, num_heads, _ = query.shape
    group = num_heads // key.shape[1]
    out = np.empty((num_queries, num_heads, value.shape[2]), np.float64)
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


def quantized(x: npt.NDArray[np.float32], dtype: str) -> tuple[Array, Array]:
    """Quantize and dequantize keys or values; also return the distance between adjacent codes.

    Args:
        x: [..., D]; each vector has its own scale.
        dtype: one of `SCALED_KV_DTYPES`.

    Returns:
        [..., D] each; a vector with any value that is not finite becomes NaN.
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
        if dtype == "fp8":  # 4 significant bits; below 2^-6, steps of 2^-9
            _, exponent = np.frexp(exact)
            step = np.exp2(np.maximum(exponent, -5) - 4)
        code = np.rint(exact / step) * step
        out[place] = (code + 0.0 if dtype == "int8" else code) * scale  # integers have no -0
        steps[place] = step * scale
    return out, steps


def _to_bits(x: Array, count: int) -> Array:
    """Round `x` to `count` significant bits, ties to even."""
    fraction, exponent = np.frexp(x)
    rounded: Array = np.ldexp(np.rint(np.ldexp(fraction, count)), exponent - count)
    return rounded


def encoder_attention(query: Array, key: Array, value: Array, spec: AttentionSpec) -> Array:
    """Bidirectional attention among all tokens of one request.

    Args:
        query: [N, H, D]
        key: [N, H_kv, D]
        value: [N, H_kv, D]
        spec: scale and window.

    Returns:
        [N, H, D]
    """
    group = query.shape[1] // key.shape[1]
    out = np.empty(query.shape, np.float64)
    reach = spec.sliding_window or len(query)
    for i in range(len(query)):
        seen = slice(max(0, i - reach + 1), i + reach)
        for head in range(query.shape[1]):
            scores = key[seen, head // group] @ query[i, head] * spec.scale
            weights = np.exp(scores - scores.max())
            out[i, head] = weights @ value[seen, head // group] / weights.sum()
    return out


def layer_norm(x: Array, weight: Array, bias: Array, eps: float) -> Array:
    """(x - mean) / sqrt(variance + eps) * weight + bias of `x` [T, C]."""
    centered = x - np.mean(x, axis=-1, keepdims=True)
    spread = np.sqrt(np.mean(centered * centered, axis=-1, keepdims=True) + eps)
    normed: Array = centered / spread * weight + bias
    return normed


def gelu(x: Array) -> Array:
    """Exact GELU: x * (1 + erf(x / sqrt(2))) / 2."""
    shares = [0.5 * (1 + math.erf(value / math.sqrt(2))) for value in x.ravel().tolist()]
    out: Array = x * np.array(shares).reshape(x.shape)
    return out


def gelu_tanh(x: Array) -> Array:
    """GELU by tanh: x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))) / 2."""
    out: Array = x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2
    return out


def gelu_tanh_mul(gate_up: Array) -> Array:
    """gelu_tanh(gate) * up of [T, 2 I], gate first: [T, I]."""
    gate, up = np.split(gate_up, 2, axis=-1)
    return gelu_tanh(gate) * up


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """x / sqrt(mean(x^2) + eps) * weight of `x` [T, C]."""
    normed: Array = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight
    return normed


def rope(x: Array, positions: npt.NDArray[np.int32], cos_sin: Array, is_interleaved: bool) -> Array:
    """Rotate each pair of the first rotary_dim numbers of `x` by the angle of its position.

    Args:
        x: [T, H, D]
        positions: [T]
        cos_sin: [max_position, rotary_dim]: cosines, then sines.
        is_interleaved: True: pairs are adjacent numbers. False: number i and rotary_dim / 2 + i.
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
    """1 / (1 + exp(-x)), with an exponent that is never positive, so that nothing overflows."""
    small = np.exp(-np.abs(x))
    return np.where(x >= 0, 1 / (1 + small), small / (1 + small))


def swiglu(gate_up: Array, limit: float, alpha: float) -> Array:
    """gate * sigmoid(alpha * gate) * (up + 1) of clamped [T, 2 I]: [T, I]."""
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
    """Apply each token's experts and sum their outputs by weight.

    Args:
        x: [T, C]
        ids: [T, k], the experts of each token.
        shares: [T, k], their weights.
        gate_up: weight of each expert, [2 I, C].
        down: weight of each expert, [C, I].
        biases: [E, 2 I] and [E, C].
        limit: limit of `swiglu`; None: silu(gate) * up instead.
        alpha: alpha of `swiglu`.
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
    """Multiply `x` [T, K] by `weight` [N, K] transposed, plus bias [N]: [T, N]."""
    out: Array = x @ weight.T
    return out if bias is None else out + bias


def linear_heads(x: Array, weight: Array) -> Array:
    """Multiply `x` [T, H, K] by `weight` [H, N, K] transposed, head by head: [T, H, N]."""
    return np.stack([x[:, head] @ one.T for head, one in enumerate(weight)], axis=1)


def rope_table(max_position: int, rotary_dim: int, theta: float) -> Array:
    """Cosines, then sines, of position / theta^(2 i / rotary_dim): [max_position, rotary_dim]."""
    inverse = theta ** (-np.arange(0, rotary_dim, 2) / rotary_dim)
    angles = np.arange(max_position)[:, None] * inverse
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
