"""Sample tokens without a sort: two launches for the whole batch, for any parameters of its rows.

    scores       float32 [R, V]   after penalties, bias and mask; the row stride is given
    temperature, top_k, top_p, min_p, seed, position   [R], as in SampleParams
    targets      int32 [R] or none

Mapping:  `_scan` has one program per CHUNK tokens of a row, `_choose` one per row. A row's
          parameters are read on the device, so one captured sequence serves all combinations.
Method:   For greedy rows and rows without filters, `_scan` finds the best token of each chunk and
          `_choose` the best of the chunks. For filtered rows, `_scan` keeps the best tokens of
          each chunk, at most CANDIDATES. Each threshold is the smallest score with fewer than k
          tokens (top_k), or less than p probability mass (top_p), above it. `_choose` finds it by
          bisection: among the candidates if it lies above all tokens that were left out, else over
          the whole row. Truncation before a pivot search: Park et al., "Qrita", 2026; here it is
          exact, because the best token that was left out is known.
Bound by: memory, 4 V R bytes; then the latency of about ten steps for each of top_k and top_p.
Meaning:  backends/portable/sampling.py.
"""

import torch
import triton
import triton.language as tl

from portalm.backend import SampleOutput, SampleParams
from portalm_backends.gpu_common.kernels import adjust, logprobs
from portalm_backends.gpu_common.kernels.dependent_launch import options, wait_for_inputs
from portalm_backends.gpu_common.kernels.gumbel import noise_from, noise_of
from portalm_backends.gpu_common.kernels.ordering import (
    INFINITE,
    NO_PAIR,
    NOT_A_NUMBER,
    NOTHING,
    ascending,
    id_of,
    id_of_pair,
    key_of,
    log,
    numbered,
    pair_of,
    score_of,
    score_of_pair,
)

CHUNK = 4096
"""Tokens per program of `_scan`: fixed, so that a row's result does not depend on the batch."""
CANDIDATES = 128
"""Most tokens of each chunk that are kept for rows with filters."""
SEARCHED = 2048
"""Tokens that `_choose` reads at a time."""


def sample(logits: torch.Tensor, params: SampleParams) -> SampleOutput:
    """Sample one token from each row of float32 logits [R, V], without a host sync.

    The logits are not changed.
    """
    scores = adjust.adjust(logits, params)
    output = SampleOutput(token_ids=sample_ids(scores, params))
    if params.num_logprobs is not None:
        logprobs.add_logprobs(output, logits, params.num_logprobs)
    return output


def sample_ids(scores: torch.Tensor, params: SampleParams) -> torch.Tensor:
    """Sample a token from each row of float32 [R, V]: int32 [R]; -1 if no token can be sampled."""
    num_rows, vocab_size = scores.shape
    num_chunks = triton.cdiv(vocab_size, CHUNK)

    def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=scores.device)

    best = empty(num_rows, num_chunks, dtype=torch.int64)
    mass = empty(num_rows, num_chunks, dtype=torch.float32)
    left_out = empty(num_rows, num_chunks, dtype=torch.int32)
    kept = empty(num_rows, num_chunks, CANDIDATES, dtype=torch.int64)
    token_ids = empty(num_rows, dtype=torch.int32)
    if num_rows == 0:
        return token_ids
    row = (
        params.temperature,
        params.top_k,
        params.top_p,
        params.min_p,
        params.seed,
        params.position,
    )
    found = (best, mass, left_out, kept)
    _scan[(num_chunks, num_rows)](
        scores,
        *row,
        *found,
        vocab_size,
        scores.stride(0),
        CHUNK,
        CANDIDATES,
        num_warps=8,
        enable_fp_fusion=True,
        **options(),
    )
    _choose[(num_rows,)](
        scores,
        *row,
        *found,
        token_ids if params.targets is None else params.targets,
        token_ids,
        vocab_size,
        scores.stride(0),
        num_chunks,
        triton.next_power_of_2(num_chunks),
        CANDIDATES,
        SEARCHED,
        params.targets is not None,
        num_warps=8,
        enable_fp_fusion=True,
        **options(),
    )
    return token_ids


@triton.jit
def _is_filtered(temperature, top_k, top_p, min_p):
    """True if a row has a temperature and a filter (top_k, top_p or min_p)."""
    return (temperature != 0.0) & ((top_k > 0) | (top_p < 1.0) | (min_p > 0.0))


@triton.jit
def _weight(scaled, top):
    """exp(scaled - top); 1 where they are equal, also if both are infinite."""
    return tl.where(scaled == top, 1.0, tl.exp(scaled - top))


@triton.jit
def _scan(
    scores_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, seed_ptr, position_ptr,
    best_ptr, mass_ptr, left_out_ptr, kept_ptr, vocab_size, row_stride,
    CHUNK: tl.constexpr, CANDIDATES: tl.constexpr, WAITS: tl.constexpr,
):  # fmt: skip
    """Find the best token of a chunk; for filtered rows, its score, mass and candidates."""
    wait_for_inputs(WAITS)
    chunk, row = tl.program_id(0), tl.program_id(1)
    place = row * tl.num_programs(0) + chunk
    temperature, top_k = tl.load(temperature_ptr + row), tl.load(top_k_ptr + row)
    top_p, min_p = tl.load(top_p_ptr + row), tl.load(min_p_ptr + row)
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    scores = tl.load(
        scores_ptr + row.to(tl.int64) * row_stride + ids, mask=ids < vocab_size, other=float("-inf")
    )
    keys = ascending(scores)
    highest, lowest = tl.max(keys, axis=0), tl.min(keys, axis=0)
    has_nan = (highest > INFINITE) | (lowest < NOTHING)
    if _is_filtered(temperature, top_k, top_p, min_p):
        # division by the temperature keeps the order, so the search can use the scores themselves
        best = highest.to(tl.int64) << 32
        if (top_p < 1.0) & (top_k <= 0) & (min_p <= 0.0):  # else `_choose` needs no mass
            rate = 1.0 / temperature
            mass = tl.sum(_weight(scores * rate, score_of(highest) * rate), axis=0)
            tl.store(mass_ptr + place, mass)
        is_kept = keys > _cut(keys, CHUNK, CANDIDATES)
        largest = tl.max(tl.where(is_kept, NOTHING, keys), axis=0)
        left_out = ascending(tl.div_rn(score_of(largest), temperature))
        tl.store(left_out_ptr + place, tl.where(largest <= NOTHING, NOTHING - 1, left_out))
        slots = kept_ptr + place.to(tl.int64) * CANDIDATES
        ends = tl.cumsum(is_kept.to(tl.int32), axis=0)
        tl.store(slots + ends - 1, pair_of(scores, ids), mask=is_kept)
        rest = tl.arange(0, CANDIDATES)
        tl.store(slots + rest, NO_PAIR, mask=rest >= tl.max(ends, axis=0))
    else:
        if temperature != 0.0:
            seed, position = tl.load(seed_ptr + row), tl.load(position_ptr + row)
            scaled = tl.div_rn(scores, temperature)
            keys = ascending(scaled + noise_from(seed, position, chunk * CHUNK, CHUNK))
            highest = tl.max(keys, axis=0)
        first = tl.min(tl.where(keys == highest, ids, 0x7FFFFFFF), axis=0)
        best = (highest.to(tl.int64) << 32) | (0x7FFFFFFF - first).to(tl.int64)
    tl.store(best_ptr + place, tl.where(has_nan, NOT_A_NUMBER, best))


@triton.jit
def _cut(keys, CHUNK: tl.constexpr, CANDIDATES: tl.constexpr):
    """An int32 with at most CANDIDATES of `keys` above it, and at least a quarter if possible.

    The smallest of the largest keys of CANDIDATES / 4 groups has at least that many keys from it
    up, and of random keys hardly ever more than CANDIDATES; bisection handles the other cases.
    """
    groups: tl.constexpr = CANDIDATES // 4
    tops = tl.max(tl.reshape(keys, (CHUNK // groups, groups)), axis=0)
    low, high, num_above = (
        tl.maximum(tl.min(tops, axis=0), NOTHING + 1) - 1,
        tl.max(tops, axis=0),
        0,
    )
    if tl.sum((keys > low).to(tl.int32), axis=0) <= CANDIDATES:
        high = low
    while (low + 1 < high) & (num_above * 2 < CANDIDATES):
        middle = (low & high) + ((low ^ high) >> 1)  # the mean, without overflow
        count = tl.sum((keys > middle).to(tl.int32), axis=0)
        if count <= CANDIDATES:
            high, num_above = middle, count
        else:
            low = middle
    return high


@triton.jit
def _load(values_ptr, at, num_values):
    """Load scores, and the ids of candidates, which are stored in pairs; -inf past the end."""
    if values_ptr.dtype.element_ty == tl.int64:
        pairs = tl.load(values_ptr + at, mask=at < num_values, other=NO_PAIR)
        values, ids = score_of_pair(pairs), id_of_pair(pairs)
    else:
        values, ids = tl.load(values_ptr + at, mask=at < num_values, other=float("-inf")), at
    return values, ids


@triton.jit
def _measure(
    values_ptr, num_values, temperature, above, floor, top,
    BY_MASS: tl.constexpr, SEARCHED: tl.constexpr,
):  # fmt: skip
    """Count the tokens above `above` and not below `floor`, or add up their mass relative to `top`.

    Also returns the keys next to `above`: the largest up to it, and the smallest beyond it.
    """
    total = tl.zeros((SEARCHED,), tl.float32)
    largest = tl.full((SEARCHED,), NOTHING - 1, tl.int32)
    smallest = tl.full((SEARCHED,), 0x7FFFFFFF, tl.int32)
    for start in range(0, num_values, SEARCHED):
        values, _ = _load(values_ptr, start + tl.arange(0, SEARCHED), num_values)
        scaled = tl.div_rn(values, temperature)
        keys = ascending(scaled)
        is_above = keys > above
        if BY_MASS:
            total += tl.where(is_above & (keys >= floor), _weight(scaled, top), 0.0)
        else:
            total += tl.where(is_above & (keys >= floor), 1.0, 0.0)
        largest = tl.maximum(largest, tl.where(is_above, NOTHING - 1, keys))
        smallest = tl.minimum(smallest, tl.where(is_above, keys, 0x7FFFFFFF))
    return tl.sum(total, axis=0), tl.max(largest, axis=0), tl.min(smallest, axis=0)


@triton.jit
def _narrow(
    values_ptr, num_values, temperature, low, high, target, floor, top,
    BY_MASS: tl.constexpr, SEARCHED: tl.constexpr,
):  # fmt: skip
    """Find the smallest key in (low, high] with a measure below `target` above it.

    The measure above `high` is below the target, and the measure above `low` is not. Each step
    halves the interval and then shrinks it to the keys of the tokens inside it, so the number of
    steps depends on how many tokens are close to the threshold, not on the bits of a float32.
    """
    while low + 1 < high:
        middle = (low & high) + ((low ^ high) >> 1)  # the mean, without overflow
        measured, largest, smallest = _measure(
            values_ptr, num_values, temperature, middle, floor, top, BY_MASS, SEARCHED
        )
        if measured < target:
            high = tl.maximum(largest, low + 1)
        else:
            low = smallest - 1
    return high


@triton.jit
def _threshold(
    row_ptr, vocab_size, kept_ptr, num_kept, left_out, temperature, target, floor, top,
    BY_MASS: tl.constexpr, SEARCHED: tl.constexpr,
):  # fmt: skip
    """Find the smallest key, from `floor` up, with a measure below `target` above it.

    The result is the key of a token, or `floor`. Above `left_out` the candidates are all tokens
    there are; at or below it, the whole row is searched. The two searches are separate loops:
    Triton 3.6 cannot compile one loop over either of two pointers for AMD GPUs.
    """
    low, high = floor - 1, ascending(top)
    measured, _, _ = _measure(
        kept_ptr, num_kept, temperature, left_out, floor, top, BY_MASS, SEARCHED
    )
    if (measured >= target) | (left_out < floor):
        low = tl.maximum(low, left_out)
        high = _narrow(
            kept_ptr, num_kept, temperature, low, high, target, floor, top, BY_MASS, SEARCHED
        )
    else:
        high = tl.minimum(high, left_out)
        high = _narrow(
            row_ptr, vocab_size, temperature, low, high, target, floor, top, BY_MASS, SEARCHED
        )
    return tl.maximum(high, floor)


@triton.jit
def _choose(
    scores_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, seed_ptr, position_ptr,
    best_ptr, mass_ptr, left_out_ptr, kept_ptr, targets_ptr, out_ptr,
    vocab_size, row_stride, num_chunks,
    NUM_CHUNKS: tl.constexpr, CANDIDATES: tl.constexpr, SEARCHED: tl.constexpr,
    HAS_TARGETS: tl.constexpr, WAITS: tl.constexpr,
):  # fmt: skip
    """Choose the token of one row."""
    wait_for_inputs(WAITS)
    row = tl.program_id(0)
    chunks = tl.arange(0, NUM_CHUNKS)
    is_chunk = chunks < num_chunks
    parts = row * num_chunks + chunks
    bests = tl.load(best_ptr + parts, mask=is_chunk, other=-0x7FFFFFFFFFFFFFFF)
    best = tl.max(bests, axis=0)
    temperature = tl.load(temperature_ptr + row)
    top_k, top_p = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row)
    min_p = tl.load(min_p_ptr + row)
    is_broken = (best == NOT_A_NUMBER) | (key_of(best) <= NOTHING)
    if (is_broken == 0) & _is_filtered(temperature, top_k, top_p, min_p):
        top = tl.div_rn(score_of(key_of(best)), temperature)
        row_ptr = scores_ptr + row.to(tl.int64) * row_stride
        num_kept = num_chunks * CANDIDATES
        kept_ptr += row.to(tl.int64) * num_kept
        left_out = tl.max(tl.load(left_out_ptr + parts, mask=is_chunk, other=NOTHING - 1), axis=0)

        floor = tl.full((), NOTHING, tl.int32)
        if min_p > 0.0:
            floor = ascending(top + log(min_p))
        if (top_k > 0) & (top_k < vocab_size):
            kth = _threshold(
                row_ptr, vocab_size, kept_ptr, num_kept, left_out, temperature,
                top_k.to(tl.float32), tl.full((), NOTHING, tl.int32), top, False, SEARCHED,
            )  # fmt: skip
            floor = tl.maximum(floor, kth)
        if top_p < 1.0:
            if floor <= NOTHING:
                masses = tl.load(mass_ptr + parts, mask=is_chunk, other=0.0)
                tops = tl.div_rn(score_of(key_of(bests)), temperature)
                total = tl.sum(tl.where(is_chunk, masses * _weight(tops, top), 0.0), axis=0)
            elif floor > left_out:
                total, _, _ = _measure(
                    kept_ptr, num_kept, temperature, floor - 1, floor, top, True, SEARCHED
                )
            else:
                total, _, _ = _measure(
                    row_ptr, vocab_size, temperature, floor - 1, floor, top, True, SEARCHED
                )
            floor = _threshold(
                row_ptr, vocab_size, kept_ptr, num_kept, left_out, temperature,
                top_p * total, floor, top, True, SEARCHED,
            )  # fmt: skip
        # noise lies between -2.81 and 16.64: tokens further below the top cannot win
        floor = tl.maximum(floor, ascending(top - 19.5))
        seed, position = tl.load(seed_ptr + row), tl.load(position_ptr + row)
        if floor > left_out:
            best = _best_noisy(
                kept_ptr, num_kept, temperature, floor, seed, position, SEARCHED
            )  # fmt: skip
        else:
            best = _best_noisy(
                row_ptr, vocab_size, temperature, floor, seed, position, SEARCHED
            )  # fmt: skip
    token_id = tl.where(is_broken, -1, id_of(best))
    if HAS_TARGETS:
        target = tl.load(targets_ptr + row)
        token_id = tl.where(target >= 0, target, token_id)
    tl.store(out_ptr + row, token_id)


@triton.jit
def _best_noisy(values_ptr, num_values, temperature, floor, seed, position, SEARCHED: tl.constexpr):
    """The largest `numbered` key, with noise added to the scores, of the tokens from `floor` up."""
    best = tl.full((SEARCHED,), -0x7FFFFFFFFFFFFFFF, tl.int64)
    for start in range(0, num_values, SEARCHED):
        values, ids = _load(values_ptr, start + tl.arange(0, SEARCHED), num_values)
        scaled = tl.div_rn(values, temperature)
        is_eligible = ascending(scaled) >= floor
        if tl.max(is_eligible.to(tl.int32), axis=0) != 0:
            noisy = numbered(scaled + noise_of(seed, position, ids), ids)
            best = tl.maximum(best, tl.where(is_eligible, noisy, -0x7FFFFFFFFFFFFFFF))
    return tl.max(best, axis=0)
