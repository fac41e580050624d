"""Logprobs and ranks of sampled tokens, and the k most likely tokens, from raw logits [R, V].

Mapping:  `_scan` has one program per CHUNK tokens of a row, `_merge` one per row. The k largest
          are extracted from registers one by one, as k is at most about 20.
Bound by: memory, 4 V R bytes; then the latency of 2 k reductions.
Meaning:  `add_logprobs` of backends/portable/sampling.py.
"""

import torch
import triton
import triton.language as tl

from portalm.backend import SampleOutput
from portalm_backends.gpu_common.kernels.ordering import id_of, key_of, log, numbered, score_of

CHUNK = 4096
_USUAL_TOP = 32
"""Up to this many top tokens use the same compiled kernel."""
_LOWEST = tl.constexpr(-0x7FFFFFFFFFFFFFFF)


def add_logprobs(output: SampleOutput, raw: torch.Tensor, num_top: int) -> None:
    """Set the logprob and rank of each row's token, and the `num_top` most likely tokens.

    A row without a token gets the logprob and rank of token 0.
    """
    num_rows, vocab_size = raw.shape
    num_chunks, num_top = triton.cdiv(vocab_size, CHUNK), min(num_top, vocab_size)

    def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=raw.device)

    tops = empty(num_rows, num_chunks, dtype=torch.float32)
    masses, ahead = torch.empty_like(tops), empty(num_rows, num_chunks, dtype=torch.int32)
    bests = empty(num_rows, num_chunks, num_top, dtype=torch.int64)
    output.logprobs = empty(num_rows, dtype=torch.float32)
    output.ranks = empty(num_rows, dtype=torch.int32)
    output.top_ids = empty(num_rows, num_top, dtype=torch.int32)
    output.top_logprobs = empty(num_rows, num_top, dtype=torch.float32)
    if num_rows == 0:
        return
    _scan[(num_chunks, num_rows)](
        raw, output.token_ids, tops, masses, ahead, bests, vocab_size, raw.stride(0), num_top,
        CHUNK, num_warps=8, enable_fp_fusion=True,
    )  # fmt: skip
    _merge[(num_rows,)](
        raw, output.token_ids, tops, masses, ahead, bests,
        output.logprobs, output.ranks, output.top_ids, output.top_logprobs,
        raw.stride(0), num_top, num_chunks,
        triton.next_power_of_2(num_chunks),
        triton.next_power_of_2(num_chunks) * max(_USUAL_TOP, triton.next_power_of_2(num_top)),
        enable_fp_fusion=True,
    )  # fmt: skip


@triton.jit
def _mass(scores, top):
    """exp(scores - top); 1 where they are equal, also if both are infinite."""
    return tl.where(scores == top, 1.0, tl.exp(scores - top))


@triton.jit(do_not_specialize=["num_top"])
def _scan(
    raw_ptr, token_ids_ptr, tops_ptr, masses_ptr, ahead_ptr, bests_ptr, vocab_size, row_stride,
    num_top, CHUNK: tl.constexpr,
):  # fmt: skip
    """Find a chunk's maximum, sum of exponentials, rank of the sampled token, and best tokens."""
    row = tl.program_id(1).to(tl.int64)
    place = row * tl.num_programs(0) + tl.program_id(0)
    ids = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    row_ptr = raw_ptr + row * row_stride
    is_token = ids < vocab_size
    raw = tl.load(row_ptr + ids, mask=is_token, other=float("-inf"))
    own = tl.load(row_ptr + tl.maximum(tl.load(token_ids_ptr + row), 0))
    top = tl.max(raw, axis=0)
    tl.store(tops_ptr + place, top)
    tl.store(masses_ptr + place, tl.sum(_mass(raw, top), axis=0))
    tl.store(ahead_ptr + place, tl.sum((raw > own).to(tl.int32), axis=0))
    order = tl.where(is_token, numbered(raw, ids), _LOWEST)
    for i in range(num_top):
        best = tl.max(order, axis=0)
        tl.store(bests_ptr + place * num_top + i, best)
        order = tl.where(order == best, _LOWEST, order)


@triton.jit(do_not_specialize=["num_top"])
def _merge(
    raw_ptr, token_ids_ptr, tops_ptr, masses_ptr, ahead_ptr, bests_ptr,
    logprobs_ptr, ranks_ptr, top_ids_ptr, top_logprobs_ptr, row_stride, num_top, num_chunks,
    NUM_CHUNKS: tl.constexpr, NUM_BESTS: tl.constexpr,
):  # fmt: skip
    """Combine the results of a row's chunks."""
    row = tl.program_id(0).to(tl.int64)
    chunks = tl.arange(0, NUM_CHUNKS)
    parts, is_chunk = row * num_chunks + chunks, chunks < num_chunks
    tops = tl.load(tops_ptr + parts, mask=is_chunk, other=float("-inf"))
    masses = tl.load(masses_ptr + parts, mask=is_chunk, other=0.0)
    top = tl.max(tops, axis=0)
    log_total = top + log(tl.sum(masses * _mass(tops, top), axis=0))
    own = tl.load(raw_ptr + row * row_stride + tl.maximum(tl.load(token_ids_ptr + row), 0))
    tl.store(logprobs_ptr + row, own - log_total)
    ahead = tl.load(ahead_ptr + parts, mask=is_chunk, other=0)
    tl.store(ranks_ptr + row, tl.sum(ahead, axis=0) + 1)
    at = tl.arange(0, NUM_BESTS)
    is_best = at < num_chunks * num_top
    order = tl.load(bests_ptr + row * num_chunks * num_top + at, mask=is_best, other=_LOWEST)
    for i in range(num_top):
        best = tl.max(order, axis=0)
        tl.store(top_ids_ptr + row * num_top + i, id_of(best))
        tl.store(top_logprobs_ptr + row * num_top + i, score_of(key_of(best)) - log_total)
        order = tl.where(order == best, _LOWEST, order)
