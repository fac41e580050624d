"""Apply penalties, biases and allowed-token masks to logits [R, V] before sampling.

Mapping:  `_count` has one program per BLOCK earlier tokens, `_apply` one per CHUNK tokens of a row,
          `_add` one per BLOCK biases.
Bound by: memory, 8 V R bytes, plus 4 V R with penalties.
Meaning:  backends/portable/sampling.py; several biases of one token may be added in any order.
"""

import torch
import triton
import triton.language as tl

from portalm.backend import SampleParams

CHUNK = 4096
BLOCK = 1024
_IN_PROMPT = tl.constexpr(1 << 30)
"""Bit of a token's count: it occurs in the prompt. The lower bits count it in the output."""


def adjust(logits: torch.Tensor, params: SampleParams) -> torch.Tensor:
    """Apply penalties, bias and mask: float32 [R, V]; `logits` itself if there are none."""
    penalties, bias, allowed = params.penalties, params.bias, params.allowed
    num_rows, vocab_size = logits.shape
    if (penalties is None and bias is None and allowed is None) or num_rows == 0:
        return logits
    scores = torch.empty((num_rows, vocab_size), dtype=logits.dtype, device=logits.device)
    counts, strengths = logits, (logits, logits, logits)  # not read if there are no penalties
    if penalties is not None:
        counts = torch.zeros((num_rows, vocab_size), dtype=torch.int32, device=logits.device)
        strengths = (penalties.presence, penalties.frequency, penalties.repetition)
        for ids, is_prompt in ((penalties.prompt_ids, True), (penalties.output_ids, False)):
            width = ids.shape[1]
            if width:
                _count[(triton.cdiv(width, BLOCK), num_rows)](
                    ids,
                    counts,
                    width,
                    ids.stride(0),
                    vocab_size,
                    is_prompt,
                    BLOCK,
                    enable_fp_fusion=True,
                )
    masks = logits if allowed is None else allowed
    # without fusion, products and sums are rounded one by one, as in the torch default
    _apply[(triton.cdiv(vocab_size, CHUNK), num_rows)](
        logits, scores, counts, *strengths, masks, vocab_size, logits.stride(0), masks.stride(0),
        penalties is not None, allowed is not None, CHUNK, enable_fp_fusion=False,
    )  # fmt: skip
    if bias is not None and len(bias.rows):
        _add[(triton.cdiv(len(bias.rows), BLOCK),)](
            bias.rows, bias.token_ids, bias.values, scores, masks, len(bias.rows), vocab_size,
            masks.stride(0), allowed is not None, BLOCK, enable_fp_fusion=True,
        )  # fmt: skip
    return scores


@triton.jit(do_not_specialize=["width", "row_stride"])
def _count(
    ids_ptr, counts_ptr, width, row_stride, vocab_size, IS_PROMPT: tl.constexpr, BLOCK: tl.constexpr
):
    """Count the occurrences of each token in `counts`, int32 [R, V], which starts at zero."""
    row = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ids = tl.load(ids_ptr + row * row_stride + at, mask=at < width, other=-1)
    place = counts_ptr + row * vocab_size + ids
    if IS_PROMPT:
        tl.atomic_or(place, tl.full((BLOCK,), _IN_PROMPT, tl.int32), mask=ids >= 0)
    else:
        tl.atomic_add(place, tl.full((BLOCK,), 1, tl.int32), mask=ids >= 0)


@triton.jit
def _is_allowed(masks_ptr, row, ids, mask, mask_stride):
    """True for the tokens `ids` whose bit in their row's mask is set."""
    words = tl.load(masks_ptr + row * mask_stride + ids // 32, mask=mask, other=0)
    return ((words >> (ids % 32)) & 1) != 0


@triton.jit
def _apply(
    logits_ptr, scores_ptr, counts_ptr, presence_ptr, frequency_ptr, repetition_ptr, masks_ptr,
    vocab_size, row_stride, mask_stride,
    HAS_PENALTIES: tl.constexpr, HAS_MASK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Apply penalties and mask to CHUNK logits of a row."""
    row = tl.program_id(1).to(tl.int64)
    ids = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    is_token = ids < vocab_size
    scores = tl.load(logits_ptr + row * row_stride + ids, mask=is_token, other=0.0)
    if HAS_PENALTIES:
        counts = tl.load(counts_ptr + row * vocab_size + ids, mask=is_token, other=0)
        repetition = tl.load(repetition_ptr + row)
        repeated = tl.where(scores > 0, tl.div_rn(scores, repetition), scores * repetition)
        scores = tl.where(counts > 0, repeated, scores)
        in_output = (counts & (_IN_PROMPT - 1)).to(tl.float32)
        scores -= tl.load(frequency_ptr + row) * in_output
        scores -= tl.load(presence_ptr + row) * (in_output > 0).to(tl.float32)
    if HAS_MASK:
        is_allowed = _is_allowed(masks_ptr, row, ids, is_token, mask_stride)
        scores = tl.where(is_allowed, scores, float("-inf"))
    tl.store(scores_ptr + row * vocab_size + ids, scores, mask=is_token)


@triton.jit(do_not_specialize=["count"])
def _add(
    rows_ptr, ids_ptr, values_ptr, scores_ptr, masks_ptr, count, vocab_size, mask_stride,
    HAS_MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add biases to scores, except for tokens that the mask forbids."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    rows = tl.load(rows_ptr + at, mask=mask, other=0).to(tl.int64)
    ids = tl.load(ids_ptr + at, mask=mask, other=0)
    if HAS_MASK:
        mask &= _is_allowed(masks_ptr, rows, ids, mask, mask_stride)
    values = tl.load(values_ptr + at, mask=mask, other=0.0)
    tl.atomic_add(scores_ptr + rows * vocab_size + ids, values, mask=mask)
