"""The meaning of `Backend.sample`: one row at a time, in float64, with a plain Philox.

Sampling compares numbers, so a rounding error can change a comparison. `Sampled.margin` is the
distance of the closest comparison from changing. If it exceeds float32's error, the token is the
only correct one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

_MASK = 0xFFFFFFFF


def philox4x32_10(
    counter: tuple[int, int, int, int], key: tuple[int, int]
) -> tuple[int, int, int, int]:
    """Return four random 32-bit words, after ten rounds.

    Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & _MASK, (p0 >> 32) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


def gumbel_noise(seed: int, position: int, vocab_size: int) -> Array:
    """Gumbel noise of one row, [V]."""
    seed, position = seed % 2**64, position % 2**64
    key = seed & _MASK, seed >> 32
    noise = np.empty(vocab_size)
    for group in range(-(-vocab_size // 4)):
        words = philox4x32_10((group, 0, position & _MASK, position >> 32), key)
        for word, token in zip(words, range(4 * group, vocab_size), strict=False):
            uniform = ((word >> 9) + 0.5) * 2.0**-23
            noise[token] = -math.log(-math.log(uniform))
    return noise


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row of logits and its sampling parameters."""

    logits: Array
    """[V]"""
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    position: int = 0
    prompt_ids: tuple[int, ...] = ()
    output_ids: tuple[int, ...] = ()
    presence: float = 0.0
    frequency: float = 0.0
    repetition: float = 1.0
    bias: tuple[tuple[int, float], ...] = ()
    allowed: frozenset[int] | None = None
    target: int = -1


@dataclass(frozen=True, slots=True)
class Sampled:
    """The sampled token and the margin of the decision."""

    token_id: int
    margin: float
    """Smallest distance of any comparison from changing, in logits (at top_p: in probability);
    infinite where no arithmetic precedes the comparison."""
    kept: frozenset[int] = field(default_factory=frozenset)
    """Tokens that passed the filters."""


def sample(row: Row) -> Sampled:
    """Sample a token from `row`."""
    if row.target >= 0:
        return Sampled(row.target, math.inf)
    scores = _changed_logits(row)
    is_exact = bool(np.array_equal(scores, row.logits) or not np.isfinite(scores).any())
    if row.temperature == 0.0:
        token_id, margin = _largest(scores)
        return Sampled(token_id, math.inf if is_exact else margin, frozenset([token_id]))
    scores = scores / row.temperature
    scores, margin = _filtered(scores, row)
    kept = frozenset(np.flatnonzero(np.isfinite(scores)).tolist())
    noise = gumbel_noise(row.seed, row.position, len(scores))
    token_id, gap = _largest(scores + noise)
    return Sampled(token_id, min(margin, gap), kept)


def _changed_logits(row: Row) -> Array:
    """Apply penalties, bias and the allowed mask to the logits."""
    scores: Array = row.logits.copy()
    for token in set(row.prompt_ids) | set(row.output_ids):
        scores[token] *= 1 / row.repetition if scores[token] > 0 else row.repetition
    for token in row.output_ids:
        scores[token] -= row.frequency
    for token in set(row.output_ids):
        scores[token] -= row.presence
    for token, value in row.bias:
        scores[token] += value
    if row.allowed is not None:
        for token in range(len(scores)):
            if token not in row.allowed:
                scores[token] = -math.inf
    return scores


def _filtered(scores: Array, row: Row) -> tuple[Array, float]:
    """Set scores to -inf where min_p, top_k or top_p drop a token; also return the margin."""
    margins = [math.inf]
    if row.min_p > 0.0:
        threshold = scores.max() + math.log(row.min_p)
        margins.append(float(np.min(np.abs(scores - threshold))))
        scores = np.where(scores >= threshold, scores, -math.inf)
    if 0 < row.top_k < len(scores):
        threshold = np.sort(scores)[-row.top_k]
        below = scores[scores < threshold]
        margins.append(float(threshold - below.max()) if len(below) else math.inf)
        scores = np.where(scores >= threshold, scores, -math.inf)
    if row.top_p < 1.0:
        ordered = np.sort(scores)[::-1]
        weights = np.exp(ordered - ordered[0])
        reached = np.cumsum(weights / weights.sum())
        last = int(np.argmax(reached >= row.top_p))
        margins.append(float(np.min(np.abs(reached - row.top_p))))
        scores = np.where(scores >= ordered[last], scores, -math.inf)
    return scores, min(margins)


def _largest(scores: Array) -> tuple[int, float]:
    """Lowest id of the largest score, and its distance to the next; (-1, inf) if there is none."""
    if np.isnan(scores).any() or not (scores > -math.inf).any():
        return -1, math.inf
    token_id = int(np.argmax(scores))
    others = np.delete(scores, token_id)
    return token_id, float(scores[token_id] - others.max()) if len(others) else math.inf


def logprobs(logits: Array) -> Array:
    """Log-softmax of raw logits, [V]."""
    shifted = logits - logits.max()
    result: Array = shifted - math.log(float(np.sum(np.exp(shifted))))
    return result


def rank(logits: Array, token_id: int) -> int:
    """Rank of a token, 1 for the most likely; equal logits share the better rank."""
    return 1 + int(np.sum(logits > logits[token_id]))


def top(logits: Array, count: int) -> list[int]:
    """Return the `count` most likely tokens, most likely first, ties to the lowest id."""
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    return order[:count]
