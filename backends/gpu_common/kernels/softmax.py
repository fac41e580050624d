"""The online softmax of attention tiles, and its range in float16 over 8-bit caches.

Exponents are of 2: scores are multiplied by log2(e) first. Source: Milakov and Gimelshein, "Online
normalizer calculation for softmax", 2018.
"""

import triton
import triton.language as tl

from portalm_backends.gpu_common.kernels.kv_codes import split_scales


@triton.jit
def bound(scores, is_seen, bias, score_scale, cap, HAS_CAP: tl.constexpr,
          HAS_BIAS: tl.constexpr, IS_MASKED: tl.constexpr):  # fmt: skip
    """Apply the cap, the bias and the mask to scores [M, N]."""
    if HAS_CAP:  # tanh(x) = 1 - 2 / (exp(2 x) + 1), which is correct for large |x| too
        scores = cap * (1.0 - 2.0 / (tl.exp2(scores * score_scale) + 1.0))
    if HAS_BIAS:
        if not HAS_CAP:
            scores = scores * score_scale
        scores = scores + bias
    if IS_MASKED:
        scores = tl.where(is_seen, scores, float("-inf"))
    return scores


@triton.jit
def weigh(scores, is_seen, bias, score_scale, cap, top, total, HAS_CAP: tl.constexpr,
          HAS_BIAS: tl.constexpr, IS_MASKED: tl.constexpr):  # fmt: skip
    """Add one tile of scores [M, N] to a softmax with largest scores `top` and sums `total` [M].

    Returns:
        The tile's weights [M, N], the factor [M] for what was summed before, and the new `top` and
        `total`.
    """
    scores = bound(scores, is_seen, bias, score_scale, cap, HAS_CAP, HAS_BIAS, IS_MASKED)
    # without cap or bias, the scale is folded into the exponent
    factor = 1.0 if HAS_CAP or HAS_BIAS else score_scale
    new_top = tl.maximum(top, tl.max(scores, 1) * factor)
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp2(scores * factor - base[:, None])
    shrink = tl.exp2(top - base)
    return weights, shrink, new_top, total * shrink + tl.sum(weights, 1)


@triton.jit
def weigh_scaled(scores, scales, is_seen, bias, score_scale, cap, top, total,
                 HAS_CAP: tl.constexpr, HAS_BIAS: tl.constexpr, IS_MASKED: tl.constexpr,
                 DIVISOR: tl.constexpr):  # fmt: skip
    """`weigh`, but the weights are multiplied by the scales of the values, float32 [N].

    The products become float16, whose range a weight times a scale can exceed. So the exponents of
    the scales are added to those of the weights before the largest is found, and `top` is 14 below
    it (6 below where DIVISOR is 2^8): products are at most 2^15, and exact to 11 bits down to 2^-28
    of that.

    Args:
        score_scale: one number, or [M, 1].
        DIVISOR: multiplies the weights too: 1 or 2^8.
    """
    scores = bound(scores, is_seen, bias, score_scale, cap, HAS_CAP, HAS_BIAS, IS_MASKED)
    factor = 1.0 if HAS_CAP or HAS_BIAS else score_scale
    exponent, inverse, rest = split_scales(scales)
    exponents = scores * factor + exponent[None, :]
    new_top = tl.maximum(top, tl.max(exponents, 1) - (14.0 if DIVISOR == 1.0 else 6.0))
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp2(exponents - base[:, None])
    shrink = tl.exp2(top - base)
    total = total * shrink + tl.sum(weights * inverse[None, :], 1)
    return weights * (rest * DIVISOR)[None, :], shrink, new_top, total


@triton.jit
def in_float16(q, score_scale):
    """Convert queries [M, DP] to float16 exactly; multiply their scales [M, 1] by powers of 2.

    The largest number of a row becomes 2^14 to 2^15, so numbers down to 2^-28 of it are exact.
    """
    q = q.to(tl.float32)
    bits = tl.max(tl.abs(q), 1).to(tl.int32, bitcast=True) & 0x7F800000
    bits = tl.minimum(tl.maximum(bits, 0x10000000), 0x7F000000)
    power = (bits - 0x07000000).to(tl.float32, bitcast=True)  # divided by 2^14
    inverse = (0x7F000000 - bits + 0x07000000).to(tl.float32, bitcast=True)
    return (q * inverse[:, None]).to(tl.float16), power[:, None] * score_scale
