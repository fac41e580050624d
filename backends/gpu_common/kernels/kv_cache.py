"""Write to the paged cache, with or without rotating keys and queries, and copy blocks in it.

    cache        [NB, H_kv, 2, B, D]    one layer, updated in place
    scales       bfloat16 [NB, H_kv, 2, B]   for 8-bit caches, updated in place
    query        [T, H, D]              tokens are contiguous; the stride between them is given
    key, value   [T, H_kv, D]           likewise
    slots        int32 [T]              block * B + offset; padding goes to block 0, never read
    cos_sin      float32 [max_position, rotary_dim]   cosines, then sines

Mapping:  `write_kernel` has one program per token; `rotate_write_kernel` one per token and KV head,
          for its key, value and the query heads of its group; `copy_kernel` one per layer, pair
          of blocks and 16 KiB.
Bound by: memory, 2 T (H + 2 H_kv) D elements; with few tokens, the launch.
Meaning:  Backend.rope, then Backend.kv_write; Backend.kv_copy.
"""

import triton
import triton.language as tl

from portalm_backends.gpu_common.kernels.dependent_launch import wait_for_inputs
from portalm_backends.gpu_common.kernels.kv_codes import encode


@triton.jit
def write_kernel(
    key, value, cache, scales, slots, key_stride, value_stride,
    NUM_KV_HEADS: tl.constexpr, HEADS_PADDED: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    BLOCK: tl.constexpr, LARGEST: tl.constexpr, CODES: tl.constexpr, PLANES: tl.constexpr,
    WAITS: tl.constexpr,
):  # fmt: skip
    """Write one token's keys and values into its slot; in 8-bit caches as codes, with scales.

    PLANES is 1 if values are part of their keys; then only keys are written.
    """
    wait_for_inputs(WAITS)
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    head, dim = tl.arange(0, HEADS_PADDED), tl.arange(0, DP)[None, :]
    mask = (head < NUM_KV_HEADS)[:, None] & (dim < D)
    first = (slot // BLOCK).to(tl.int64) * (NUM_KV_HEADS * PLANES * BLOCK) + slot % BLOCK
    row = first + head * (PLANES * BLOCK)  # of the key; the value's is BLOCK rows later
    places = row[:, None] * D + dim
    sources = head[:, None] * D + dim
    k = tl.load(key + token * key_stride + sources, mask=mask, other=0.0)
    v = tl.load(value + token * value_stride + sources, mask=mask, other=0.0)
    if CODES:
        k, k_scales = encode(k.to(tl.float32), LARGEST, CODES)
        v, v_scales = encode(v.to(tl.float32), LARGEST, CODES)
        tl.store(scales + row, k_scales, mask=head < NUM_KV_HEADS)
        tl.store(scales + row + BLOCK, v_scales, mask=head < NUM_KV_HEADS)
    tl.store(cache + places, k.to(cache.dtype.element_ty), mask=mask)
    if PLANES == 2:
        tl.store(cache + BLOCK * D + places, v.to(cache.dtype.element_ty), mask=mask)


@triton.jit
def _turn(source, target, cos, sin, row, is_row, pair, R: tl.constexpr, D: tl.constexpr,
          IS_INTERLEAVED: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """Rotate rows [N, D] at `source` + row * D in float32; write them to `target` + row * D.

    Su et al., "RoFormer", 2021. Results are rounded to the source's dtype first and then to the
    cache's, as when rope and write are separate operations.
    """
    if IS_INTERLEAVED:
        first, second = 2 * pair, 2 * pair + 1
    else:
        first, second = pair, pair + R // 2
    mask = is_row[:, None] & (pair < R // 2)[None, :]
    rows = row[:, None] * D
    a = tl.load(source + rows + first[None, :], mask=mask, other=0.0)
    b = tl.load(source + rows + second[None, :], mask=mask, other=0.0)
    dtype: tl.constexpr = source.dtype.element_ty
    a, b = a.to(tl.float32), b.to(tl.float32)
    turned_a = (a * cos - b * sin).to(dtype)
    turned_b = (b * cos + a * sin).to(dtype)
    tl.store(target + rows + first[None, :], turned_a.to(DTYPE), mask=mask)
    tl.store(target + rows + second[None, :], turned_b.to(DTYPE), mask=mask)


@triton.jit
def _keep(source, target, row, is_row, FIRST: tl.constexpr, COUNT: tl.constexpr,
          D: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """Copy dimensions FIRST to FIRST + COUNT, at most up to D, of rows [N, D] unchanged."""
    dim = FIRST + tl.arange(0, COUNT)
    places = row[:, None] * D + dim[None, :]
    mask = is_row[:, None] & (dim < D)[None, :]
    x = tl.load(source + places, mask=mask, other=0.0)
    tl.store(target + places, x.to(DTYPE), mask=mask)


@triton.jit
def rotate_write_kernel(
    query, key, value, query_out, cache, slots, positions, cos_sin,
    query_stride, key_stride, value_stride,
    GROUP: tl.constexpr, GROUP_PADDED: tl.constexpr, NUM_KV_HEADS: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr, HALF_PADDED: tl.constexpr,
    REST_PADDED: tl.constexpr, BLOCK: tl.constexpr, IS_INTERLEAVED: tl.constexpr,
    WAITS: tl.constexpr,
):  # fmt: skip
    """Rotate one token's key and queries of one KV head; write the key and the value."""
    wait_for_inputs(WAITS)
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slots + token)
    place = (slot // BLOCK).to(tl.int64) * NUM_KV_HEADS + head
    target = cache + place * (2 * BLOCK * D) + (slot % BLOCK) * D
    dtype: tl.constexpr = cache.dtype.element_ty
    out_dtype: tl.constexpr = query_out.dtype.element_ty

    pair = tl.arange(0, HALF_PADDED)
    turns = cos_sin + tl.load(positions + token).to(tl.int64) * R + pair
    cos = tl.load(turns, mask=pair < R // 2, other=0.0)[None, :]
    sin = tl.load(turns + R // 2, mask=pair < R // 2, other=0.0)[None, :]
    member, single = tl.arange(0, GROUP_PADDED), tl.arange(0, 1)
    is_member, is_single = member < GROUP, single < 1
    queries = query + token * query_stride + head * (GROUP * D)
    queries_out = query_out + (token * NUM_KV_HEADS + head) * (GROUP * D)
    keys = key + token * key_stride + head * D
    _turn(queries, queries_out, cos, sin, member, is_member, pair, R, D, IS_INTERLEAVED,
          out_dtype)  # fmt: skip
    _turn(keys, target, cos, sin, single, is_single, pair, R, D, IS_INTERLEAVED, dtype)
    if REST_PADDED > 0:
        _keep(queries, queries_out, member, is_member, R, REST_PADDED, D, out_dtype)
        _keep(keys, target, single, is_single, R, REST_PADDED, D, dtype)
    values = value + token * value_stride + head * D
    _keep(values, target + BLOCK * D, single, is_single, 0, DP, D, dtype)


@triton.jit
def copy_kernel(cache, source, destination, layer_words, block_words, WORDS: tl.constexpr):
    """Copy WORDS 32-bit words of one block of one layer, from source[i] to destination[i]."""
    word = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    pair, layer = tl.program_id(1), tl.program_id(2).to(tl.int64)
    mask = word < block_words
    base = cache + layer * layer_words
    old = tl.load(source + pair).to(tl.int64) * block_words
    new = tl.load(destination + pair).to(tl.int64) * block_words
    tl.store(base + new + word, tl.load(base + old + word, mask=mask), mask=mask)
