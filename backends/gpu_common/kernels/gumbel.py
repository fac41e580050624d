"""Gumbel noise as `SampleParams` defines it: Philox by seed and position.

Meaning: backends/portable/philox.py.
"""

import triton
import triton.language as tl

from portalm_backends.gpu_common.kernels.ordering import log


@triton.jit
def _words(seed, position, groups):
    """Four words of 32 random bits for each group of four tokens; `groups` is int32.

    Triton's generator is Philox4x32-10, with the seed as the key, low word first.
    """
    low = (position & 0xFFFFFFFF).to(tl.uint32)
    high = ((position >> 32) & 0xFFFFFFFF).to(tl.uint32)
    return tl.philox(seed, groups, 0, low, high)


@triton.jit
def _noise(words):
    """Float32 Gumbel noise of uint32 words: 23 bits plus one half are exact, never 0 or 1."""
    uniform = ((words >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07  # 2^-23
    return -log(-log(uniform))


@triton.jit
def noise_from(seed, position, first, COUNT: tl.constexpr):
    """Float32 noise [COUNT] of the tokens from `first`; both are multiples of 4."""
    w0, w1, w2, w3 = _words(seed, position, first // 4 + tl.arange(0, COUNT // 4))
    return _noise(tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3)))


@triton.jit
def noise_of(seed, position, ids):
    """Float32 noise of any int32 `ids`."""
    w0, w1, w2, w3 = _words(seed, position, ids // 4)
    place = ids % 4
    return _noise(tl.where(place < 2, tl.where(place == 0, w0, w1), tl.where(place == 2, w2, w3)))
