"""Map float32 scores to integers in the same order, to compare scores and ids in one operation."""

import triton
import triton.language as tl

NOTHING = tl.constexpr(-2139095041)
"""`ascending` of -inf: tokens with this key or less cannot be sampled."""
INFINITE = tl.constexpr(0x7F800000)
"""`ascending` of inf: NaNs have larger keys, or keys below `NOTHING`, by their sign."""
NO_PAIR = tl.constexpr(-0x80000000000000)
"""`pair_of` -inf and id 0."""
NOT_A_NUMBER = tl.constexpr(0x7FFFFFFFFFFFFFFF)
"""Above every result of `numbered`: marks a part of a row that contains a NaN."""


@triton.jit
def ascending(x):
    """Int32 keys in the order of float32 `x`; -0.0 and 0.0 have the same key."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def score_of(key):
    """The float32 whose `ascending` is `key`."""
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def numbered(scores, ids):
    """Int64 keys in the order of float32 `scores`; among equal scores the lowest id is largest.

    So the maximum is the argmax with ties to the lowest id, in any order of reduction.
    """
    return (ascending(scores).to(tl.int64) << 32) | (0x7FFFFFFF - ids).to(tl.int64)


@triton.jit
def id_of(best):
    """The int32 id in a key of `numbered`."""
    return (0x7FFFFFFF - (best & 0xFFFFFFFF)).to(tl.int32)


@triton.jit
def key_of(best):
    """The `ascending` key of the score in a key of `numbered`."""
    return (best >> 32).to(tl.int32)


@triton.jit
def pair_of(scores, ids):
    """Int64 of float32 `scores` and non-negative int32 `ids`, to store both at once."""
    return (scores.to(tl.int32, bitcast=True).to(tl.int64) << 32) | ids.to(tl.int64)


@triton.jit
def score_of_pair(pair):
    """The float32 score in the result of `pair_of`."""
    return (pair >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def id_of_pair(pair):
    """The int32 id in the result of `pair_of`."""
    return (pair & 0xFFFFFFFF).to(tl.int32)


@triton.jit
def log(x):
    """Natural logarithm of positive, normal float32, to about one unit in the last place.

    The device's own fast logarithm has an absolute error, which leaves no correct digits near 1.
    Polynomial: S. L. Moshier, Cephes mathematical library, 1989 (logf).
    """
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23  # x = m * 2^exponent, m from sqrt(1/2) to sqrt(2)
    r = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    exponent = exponent.to(tl.float32)
    y = 7.0376836292e-2 * r - 1.1514610310e-1
    y = y * r + 1.1676998740e-1
    y = y * r - 1.2420140846e-1
    y = y * r + 1.4249322787e-1
    y = y * r - 1.6668057665e-1
    y = y * r + 2.0000714765e-1
    y = y * r - 2.4999993993e-1
    y = y * r + 3.3333331174e-1
    square = r * r
    y = y * r * square - 2.12194440e-4 * exponent - 0.5 * square
    return r + y + 0.693359375 * exponent
