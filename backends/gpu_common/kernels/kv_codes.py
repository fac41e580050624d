"""Encode and decode 8-bit keys and values (`SCALED_KV_DTYPES`) in kernels, as integers.

The device's own 8-bit floats are not used: those of gfx942 have another format, and GPUs before
sm_89 have none. So the bits are the same on every device.

Meaning:  backends/portable/kv_codes.py.
"""

import triton
import triton.language as tl

INT8, FP8 = 1, 2
"""Values of a kernel's CODES; 0: the cache holds floats."""


@triton.jit
def encode(x, LARGEST: tl.constexpr, CODES: tl.constexpr):
    """Quantize rows float32 [N, DP], zero past D, to codes int8 [N, DP] and scales bfloat16 [N].

    Must be launched without fused multiply-adds: products are rounded before they become codes.
    """
    # the bits of floats without a sign have the order of the floats, with NaN at the top
    most = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)
    scale = most.to(tl.float32, bitcast=True) * (1.0 / LARGEST)
    bits = scale.to(tl.int32, bitcast=True)  # round to the upper half, which is bfloat16
    scale = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    is_finite = most < 0x7F800000
    is_kept = is_finite & (scale >= 7.888609052210118e-31)  # 2^-100
    scale = tl.where(is_kept, scale, 1.0)
    inverse = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
    scaled = tl.where(is_kept[:, None], x * inverse[:, None], 0.0)
    if CODES == 1:
        # adding 1.5 * 2^23, from where floats are integers, rounds to the nearest integer
        codes = (scaled + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000
    else:
        bits = scaled.to(tl.int32, bitcast=True)
        size = bits & 0x7FFFFFFF
        codes = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
        # below 2^-6 the steps are 2^-9, like those of float32 from 2^14 on
        moved = (size.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True)
        codes = tl.where(size < 0x3C800000, moved - 0x46800000, codes)
        codes = codes | ((bits >> 24) & 0x80)
    kept = tl.where(is_kept, scale, tl.where(is_finite, 0.0, float("nan")))
    return codes.to(tl.int8), kept.to(tl.bfloat16)


@triton.jit
def decode(codes, dtype: tl.constexpr, CODES: tl.constexpr):
    """Convert int8 codes to their exact values in `dtype`; those of fp8 divided by 2^8."""
    if CODES == 1:
        return codes.to(dtype)
    # shifted up, the bits after the sign are a float16 whose exponent is smaller by 8
    return ((codes.to(tl.int16) << 7) & -16512).to(tl.float16, bitcast=True).to(dtype)


@triton.jit
def load_scales(scales, is_live, CODES: tl.constexpr, IS_MASKED: tl.constexpr):
    """Load the factors of `decode`'s result: float32 [N] at pointers [N]; 0 where not live."""
    if IS_MASKED:
        kept = tl.load(scales, mask=is_live, other=0.0).to(tl.float32)
    else:
        kept = tl.load(scales).to(tl.float32)
    if CODES == 2:
        kept = kept * 256.0
    return kept
