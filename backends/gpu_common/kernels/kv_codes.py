"""Encode and decode 8-bit keys and values (`SCALED_KV_DTYPES`) in kernels.

Codes are encoded with integer operations, because GPUs differ in their 8-bit floats: those of
gfx942 have another format, and GPUs before sm_89 have none. So the bits are the same everywhere.

Decoded values are exact, so each GPU may decode in its own way. NVIDIA's converts four codes in one
register at a time with PTX, which Triton's integer operations on single bytes do not become.

Meaning:  backends/portable/kv_codes.py.
"""

import functools
from typing import Any

import triton
import triton.language as tl
from triton.runtime import driver

INT8, FP8 = 1, 2
"""Values of a kernel's CODES; 0: the cache holds floats."""

PORTABLE, PTX, PTX_FP8, PTX_MOVABLE = 0, 1, 2, 3
"""Values of a kernel's DECODER: Triton's operations; PTX; PTX with conversions of 8-bit floats; the
same without side effects, for wide tiles where matrix instructions read shared memory only
(tcgen05): Triton has no operand's layout to move it to, and Triton 3.6 cannot pipeline the others
there."""

_PTX_OF_INT8 = tl.constexpr("""{
    .reg .b32 biased, offset;
    xor.b32 biased, $2, 0x80808080;
    mov.b32 offset, 0x64806480;
    prmt.b32 $0, biased, 0x64646464, 0x4140;
    prmt.b32 $1, biased, 0x64646464, 0x4342;
    sub.f16x2 $0, $0, offset;
    sub.f16x2 $1, $1, offset;
}""")
"""Four int8 in $2 to float16 in $0 and $1: 0x6400 + n is the float16 1024 + n, for n = code + 128;
0x6480 is 1152."""

_PTX_OF_FP8 = tl.constexpr(
    (
        """{
    .reg .b32 low, high, signs;
    prmt.b32 low, $2, 0, 0x1404;
    prmt.b32 high, $2, 0, 0x3424;
    and.b32 signs, low, 0x80008000;
    shr.u32 low, low, 1;
    and.b32 low, low, 0x3f803f80;
    or.b32 $0, low, signs;
    and.b32 signs, high, 0x80008000;
    shr.u32 high, high, 1;
    and.b32 high, high, 0x3f803f80;
    or.b32 $1, high, signs;
}""",
        """{
    .reg .b16 low, high;
    mov.b32 {low, high}, $2;
    cvt.rn.f16x2.e4m3x2 $0, low;
    cvt.rn.f16x2.e4m3x2 $1, high;
}""",
    )
)
"""Four e4m3 in $2 to float16 in $0 and $1: divided by 2^8, as in `decode`, and exactly (sm_89)."""


def options() -> dict[str, Any]:
    """Arguments for the launch of a kernel that decodes: its DECODER."""
    if triton.knobs.runtime.interpret:
        return {"DECODER": PORTABLE}
    return _options(driver.active)


@functools.lru_cache(maxsize=1)  # of the process's one driver: the target is not free to look up
def _options(active: Any) -> dict[str, Any]:
    return options_for(active.get_current_target())


def options_for(target: Any) -> dict[str, Any]:
    """`options` for a `GPUTarget`."""
    if target.backend != "cuda":
        return {"DECODER": PORTABLE}
    if 100 <= target.arch < 120:
        return {"DECODER": PTX_MOVABLE}
    return {"DECODER": PTX_FP8 if target.arch >= 89 else PTX}


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
def decode(codes, dtype: tl.constexpr, CODES: tl.constexpr, DECODER: tl.constexpr):
    """Convert int8 codes [N, DP] to `dtype`: exactly to float32, to float16 divided by `divisor`.

    PTX is marked as having side effects: Triton then converts codes in the layout in which they
    were loaded, 16 per thread, and gives float16 to the matrix instructions through shared memory.
    It would move an operation without side effects to the layout of the operand, where a thread
    has single bytes of many words, and several warps convert the same codes.
    """
    if DECODER == 0 or dtype == tl.float32:
        if CODES == 1:
            return codes.to(dtype)
        # shifted up, the bits after the sign are a float16 whose exponent is smaller by 8
        values = ((codes.to(tl.int16) << 7) & -16512).to(tl.float16, bitcast=True)
        return values if dtype == tl.float16 else values.to(dtype) * 256.0
    asm: tl.constexpr = _PTX_OF_INT8 if CODES == 1 else _PTX_OF_FP8[DECODER != 1]
    return tl.inline_asm_elementwise(
        asm, "=&r,=&r,r", [codes], dtype=tl.float16, is_pure=DECODER == 3, pack=4
    )


@triton.constexpr_function
def divisor(dtype: Any, codes: int, decoder: int) -> float:
    """What the results of `decode` are divided by, for queries of a dtype."""
    return 256.0 if codes == FP8 and decoder < PTX_FP8 and dtype != tl.float32 else 1.0


@triton.jit
def load_scales(scales, is_live, IS_MASKED: tl.constexpr, DECODER: tl.constexpr):
    """Load the scales at pointers [N]: float32 [N]; 1 where not live, or where codes are all 0.

    As in `decode`, PTX with side effects keeps the loads in their layout, one scale per thread.
    Otherwise each thread would load the scales of all the columns that it computes.
    """
    kept = tl.load(scales, mask=is_live, other=0.0) if IS_MASKED else tl.load(scales)
    if DECODER == 0:
        kept = kept.to(tl.float32)
    else:
        asm: tl.constexpr = "{ .reg .b16 zero; mov.b16 zero, 0; mov.b32 $0, {zero, $1}; }"
        kept = tl.inline_asm_elementwise(
            asm, "=r,h", [kept], dtype=tl.float32, is_pure=DECODER == 3, pack=1
        )
    return tl.where(kept == 0.0, 1.0, kept)


@triton.jit
def split_scales(scales):
    """Split scales, float32 [N], into exponents of 2, their inverse powers, and the rest.

    scales = 2^exponent * rest, exactly, with 1 <= rest < 2. The rest of a NaN is NaN.
    """
    bits = scales.to(tl.int32, bitcast=True) & 0x7F800000
    inverse = (0x7F000000 - bits).to(tl.float32, bitcast=True)
    exponent = bits.to(tl.float32) * 1.1920928955078125e-07 - 127.0  # 2^-23
    return exponent, inverse, scales * inverse
