"""Keys and values in codes of 8 bits, in kernels: `SCALED_KV_DTYPES`, taken apart as integers.

Not by the device's own 8-bit floats, which are of another kind on gfx942 and missing before sm_89:
the bits are the same everywhere.

Meaning:  backends/portable/kv_codes.py.
"""

import triton
import triton.language as tl

INT8, FP8 = 1, 2
"""CODES of a kernel; 0: the cache holds floats."""


@triton.jit
def encode(x, LARGEST: tl.constexpr, CODES: tl.constexpr):
    """Codes, int8 [N, DP], and scales, bfloat16 [N], of rows float32 [N, DP] with zeros past D.

    Launched without fused multiply-adds: a product is rounded before it becomes a code.
    """
    # floats without their sign are in the order of their bits, a NaN above all
    most = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)
    scale = most.to(tl.float32, bitcast=True) * (1.0 / LARGEST)
    bits = scale.to(tl.int32, bitcast=True)  # rounded to the upper half: bfloat16
    scale = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    is_finite = most < 0x7F800000
    is_kept = is_finite & (scale >= 7.888609052210118e-31)  # 2^-100
    scale = tl.where(is_kept, scale, 1.0)
    inverse = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
    scaled = tl.where(is_kept[:, None], x * inverse[:, None], 0.0)
    if CODES == 1:
        # to the nearest: from 1.5 * 2^23 on floats are whole numbers
        codes = (scaled + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000
    else:
        bits = scaled.to(tl.int32, bitcast=True)
        size = bits & 0x7FFFFFFF
        codes = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
        # below 2^-6 steps are 2^-9, as those of floats from 2^14 on
        moved = (size.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True)
        codes = tl.where(size < 0x3C800000, moved - 0x46800000, codes)
        codes = codes | ((bits >> 24) & 0x80)
    kept = tl.where(is_kept, scale, tl.where(is_finite, 0.0, float("nan")))
    return codes.to(tl.int8), kept.to(tl.bfloat16)


@triton.jit
def decode(codes, dtype: tl.constexpr, CODES: tl.constexpr):
    """What codes, int8, stand for in `dtype`: exactly, but fp8 in units of 2^8."""
    if CODES == 1:
        return codes.to(dtype)
    # the bits behind the sign, moved up, are those of a float16 of another exponent
    return ((codes.to(tl.int16) << 7) & -16512).to(tl.float16, bitcast=True).to(dtype)


@triton.jit
def load_scales(scales, is_live, CODES: tl.constexpr, IS_MASKED: tl.constexpr):
    """What to multiply `decode` by: float32 [N] behind pointers [N]; 0 where none is live."""
    if IS_MASKED:
        kept = tl.load(scales, mask=is_live, other=0.0).to(tl.float32)
    else:
        kept = tl.load(scales).to(tl.float32)
    if CODES == 2:
        kept = kept * 256.0
    return kept
