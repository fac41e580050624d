"""Attention over the paged cache, and over whole prompts without one.

    query, out   [T, H, D]                  tokens are contiguous; query's token stride is given
    cache        [NB, H_kv, 2, B, D]        one layer (cache.py explains the layout). If values are
                                            the first V numbers of their keys: [.., 1, B, D], and
                                            out and partials have V instead of D numbers
    scales       bfloat16 [NB, H_kv, 2, B]  for 8-bit caches
    table        int32 [S, MB]
    items        int32 [N, 8]               the work of a program (attention.py, ITEM_FIELDS)
    partials     float32 [P, H_kv, R, D]    weighted sums of items that cover part of a context
    weights      float32 [P, H_kv, R, 2]    their largest score, base 2, and their sum of weights

Mapping:  one program per item and KV head. The rows of its tile are query tokens times the query
          heads of that KV head: a decode fills as many rows of a tensor core's tile as the group
          has heads, and keys are read once for all of them. `merge_kernel` has one program per
          query token and KV head of split tiles.
Bound by: memory in decodes (2 * context * H_kv * D elements), compute in prefills.
Meaning:  Backend.attend, Backend.attend_encoder. Online softmax: Milakov and Gimelshein, 2018;
          tiles: Dao, "FlashAttention-2", 2023; splits: Dao et al., "FlashDecoding", 2023.

Scores are multiplied by log2(e) and used as exponents of 2, so that exp is one instruction. Slots
without a token are never loaded: they may hold NaN, and 0 * NaN is NaN.
"""

import triton
import triton.language as tl

from portalm_backends.gpu_common.kernels.dependent_launch import wait_for_inputs
from portalm_backends.gpu_common.kernels.dies import deal, in_groups, in_ranges
from portalm_backends.gpu_common.kernels.kv_codes import (
    decode,
    divisor,
    load_scales,
)
from portalm_backends.gpu_common.kernels.softmax import in_float16, weigh, weigh_scaled

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _load_rows(rows, is_live, dim, D: tl.constexpr, IS_MASKED: tl.constexpr):
    """Load rows [N, DP] at pointers [N]; zeros for rows that are not live and past D."""
    pointers = rows[:, None] + dim[None, :]
    if IS_MASKED:
        if dim.shape[0] == D:
            return tl.load(pointers, mask=is_live[:, None], other=0.0)
        return tl.load(pointers, mask=is_live[:, None] & (dim < D)[None, :], other=0.0)
    if dim.shape[0] == D:
        return tl.load(pointers)
    return tl.load(pointers, mask=(dim < D)[None, :], other=0.0)


@triton.jit
def _token_offsets(table, first, token, is_live, D: tl.constexpr, BLOCK: tl.constexpr,
                   BLOCK_STRIDE: tl.constexpr, IS_MASKED: tl.constexpr):  # fmt: skip
    """Offsets of tokens [N], the first of which is `first`, in a layer's cache: int64 [N]."""
    if token.shape[0] <= BLOCK:  # tiles are aligned, so all tokens are in one block
        block = tl.load(table + first // BLOCK).to(tl.int64)
        return block * BLOCK_STRIDE + ((first & (BLOCK - 1)) + (token - first)) * D
    if IS_MASKED:
        block = tl.load(table + token // BLOCK, mask=is_live, other=0)
    else:
        block = tl.load(table + token // BLOCK)
    return block.to(tl.int64) * BLOCK_STRIDE + (token & (BLOCK - 1)) * D


@triton.jit
def _combine(acc, top, total, part_acc, part_top, part_total):
    """Merge partial softmaxes of disjoint tokens: sums [M, DP], largest scores and weights [M]."""
    new_top = tl.maximum(top, part_top)
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    old, new = tl.exp2(top - base), tl.exp2(part_top - base)
    return acc * old[:, None] + part_acc * new[:, None], new_top, total * old + part_total * new


@triton.jit
def _update(q, q_rest, key, key_rest, value, key_scales, value_scales, is_seen, bias, score_scale,
            cap, acc, top, total, HAS_CAP: tl.constexpr, HAS_BIAS: tl.constexpr,
            IS_MASKED: tl.constexpr, CODES: tl.constexpr, DECODER: tl.constexpr,
            HAS_REST: tl.constexpr):  # fmt: skip
    """Add one tile of keys and values [N, DP] to the online softmax.

    `score_scale` is one number, or [M, 1] if `in_float16` converted the queries.
    """
    if CODES:
        key = decode(key, q.dtype, CODES, DECODER)
    scores = tl.dot(q, tl.trans(key.to(q.dtype)), input_precision="ieee")  # [M, N]
    if HAS_REST:
        rest = tl.trans(key_rest.to(q.dtype))
        scores = tl.dot(q_rest, rest, scores, input_precision="ieee")
    if CODES:
        scores = scores * key_scales[None, :]
    if CODES and q.dtype == tl.float16:
        weights, shrink, top, total = weigh_scaled(
            scores, value_scales, is_seen, bias, score_scale, cap, top, total, HAS_CAP, HAS_BIAS,
            IS_MASKED, divisor(q.dtype, CODES, DECODER),
        )  # fmt: skip
    else:
        weights, shrink, top, total = weigh(
            scores, is_seen, bias, score_scale, cap, top, total, HAS_CAP, HAS_BIAS, IS_MASKED
        )
        if CODES:
            weights = weights * value_scales[None, :]
    acc = acc * shrink[:, None]
    if CODES:
        value = decode(value, q.dtype, CODES, DECODER)
    value = value.to(q.dtype)
    acc = tl.dot(weights.to(q.dtype), value, acc, input_precision="ieee")
    return acc, top, total


@triton.jit
def _overlapped_span(q, keys, table, start, stop, live_begin, live_end, position, slope, window,
                     score_scale, cap, acc, top, total, D: tl.constexpr, VP: tl.constexpr,
                     BLOCK: tl.constexpr, BLOCK_STRIDE: tl.constexpr, TILE: tl.constexpr,
                     HAS_CAP: tl.constexpr, HAS_WINDOW: tl.constexpr,
                     HAS_ALIBI: tl.constexpr):  # fmt: skip
    """Add tiles from `start` to `stop`, which every row attends to, and the masked tile at `stop`.

    The results are those of `_span`, to the last bit. The next tile's keys are multiplied before
    this tile's values, so that a softmax runs while tensor cores work on the tile before it. This
    needs a loop without conditions around it: with one, ptxas waits for every instruction of the
    tensor cores before it issues the next.
    """
    dim, tile = tl.arange(0, VP), tl.arange(0, TILE)
    # Tokens without keys may be loaded, because their scores are masked, but their blocks have no
    # entry in the table. What follows a part of a context is another part, whose entries exist.
    token = start + tile
    is_live = token < live_end
    offset = _token_offsets(table, start, token, is_live, D, BLOCK, BLOCK_STRIDE, True)
    key = _load_rows(keys + offset, is_live, dim, D, False)
    scores = tl.dot(q, tl.trans(key.to(q.dtype)), input_precision="ieee")
    for first in range(start, stop, TILE):
        bias = 0.0
        if HAS_ALIBI:
            distance = (first + tile)[None, :] - position[:, None]
            bias = slope[:, None] * distance.to(tl.float32)
        weights, shrink, top, total = weigh(
            scores, True, bias, score_scale, cap, top, total, HAS_CAP, HAS_ALIBI, False
        )
        weights = weights.to(q.dtype)
        value = _load_rows(keys + BLOCK * D + offset, is_live, dim, D, False)
        token = first + TILE + tile
        is_live = token < live_end
        offset = _token_offsets(table, first + TILE, token, is_live, D, BLOCK, BLOCK_STRIDE, True)
        key = _load_rows(keys + offset, is_live, dim, D, False)
        scores = tl.dot(q, tl.trans(key.to(q.dtype)), input_precision="ieee")
        acc = acc * shrink[:, None]
        acc = tl.dot(weights, value.to(q.dtype), acc, input_precision="ieee")
    token = stop + tile
    is_live = (token >= live_begin) & (token < live_end)
    is_seen = (token[None, :] <= position[:, None]) & is_live[None, :]
    if HAS_WINDOW:
        is_seen = is_seen & (token[None, :] > position[:, None] - window)
    bias = 0.0
    if HAS_ALIBI:
        bias = slope[:, None] * (token[None, :] - position[:, None]).to(tl.float32)
    weights, shrink, top, total = weigh(
        scores, is_seen, bias, score_scale, cap, top, total, HAS_CAP, HAS_ALIBI, True
    )
    value = _load_rows(keys + BLOCK * D + offset, is_live, dim, D, True)
    acc = acc * shrink[:, None]
    acc = tl.dot(weights.to(q.dtype), value.to(q.dtype), acc, input_precision="ieee")
    return acc, top, total


@triton.jit
def _span(q, q_rest, keys, scales, table, start, stop, live_begin, live_end, position, slope,
          window, split, score_scale, cap, acc, top, total, all_acc, all_top, all_total,
          D: tl.constexpr, V: tl.constexpr, VP: tl.constexpr, REST: tl.constexpr,
          BLOCK: tl.constexpr, BLOCK_STRIDE: tl.constexpr, TILE: tl.constexpr,
          HAS_CAP: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_ALIBI: tl.constexpr,
          IS_MASKED: tl.constexpr, MERGES: tl.constexpr, CODES: tl.constexpr,
          DECODER: tl.constexpr):  # fmt: skip
    """Add the tiles of tokens from `start`, a multiple of TILE, to `stop`.

    Without IS_MASKED every row attends to every token. With MERGES, partial softmaxes are merged
    at multiples of `split`, exactly as `merge_kernel` merges the results of other programs.
    """
    dim = tl.arange(0, VP)
    for first in range(start, stop, TILE):
        token = first + tl.arange(0, TILE)
        is_live = (token >= live_begin) & (token < live_end)
        offset = _token_offsets(table, first, token, is_live, D, BLOCK, BLOCK_STRIDE, IS_MASKED)
        key = _load_rows(keys + offset, is_live, dim, V, IS_MASKED)
        key_rest, value = key, key
        if REST > 0:
            rest = tl.arange(0, REST)
            key_rest = _load_rows(keys + V + offset, is_live, rest, D - V, IS_MASKED)
        else:
            value = _load_rows(keys + BLOCK * D + offset, is_live, dim, D, IS_MASKED)
        key_scales, value_scales = 0.0, 0.0
        if CODES:
            rows = scales + _token_offsets(
                table, first, token, is_live, 1, BLOCK, BLOCK_STRIDE // D, IS_MASKED
            )
            key_scales = load_scales(rows, is_live, IS_MASKED, DECODER)
            value_scales = load_scales(rows + BLOCK, is_live, IS_MASKED, DECODER)
        is_seen = token[None, :] <= position[:, None]
        if IS_MASKED:
            is_seen = is_seen & is_live[None, :]
            if HAS_WINDOW:
                is_seen = is_seen & (token[None, :] > position[:, None] - window)
        bias = 0.0
        if HAS_ALIBI:
            bias = slope[:, None] * (token[None, :] - position[:, None]).to(tl.float32)
        acc, top, total = _update(
            q, q_rest, key, key_rest, value, key_scales, value_scales, is_seen, bias, score_scale,
            cap, acc, top, total, HAS_CAP, HAS_ALIBI, IS_MASKED, CODES, DECODER,
            REST > 0,
        )  # fmt: skip
        if MERGES:  # noqa: SIM102 (a compile-time condition; the next one is not)
            if ((first + TILE) & (split - 1)) == 0:
                all_acc, all_top, all_total = _combine(all_acc, all_top, all_total, acc, top, total)
                acc, total = tl.zeros_like(acc), tl.zeros_like(total)
                top = tl.full(top.shape, float("-inf"), tl.float32)
    return acc, top, total, all_acc, all_top, all_total


@triton.jit
def _finish(acc, top, total, sinks, head, is_row, HAS_SINKS: tl.constexpr):
    """Divide the sums [M, DP] by the weights; a sink adds a weight without a value."""
    if HAS_SINKS:
        sink = tl.load(sinks + head, mask=is_row, other=0.0).to(tl.float32) * _LOG2E
        base = tl.maximum(top, sink)
        shrink = tl.exp2(top - base)
        return acc * (shrink / (total * shrink + tl.exp2(sink - base)))[:, None]
    return acc / total[:, None]


@triton.jit
def _place(NUM_KV_HEADS: tl.constexpr, SHARING: tl.constexpr, IS_WIDE: tl.constexpr,
           DIES: tl.constexpr, PILES: tl.constexpr):  # fmt: skip
    """Item, KV head and part of this program.

    With several dies, those of wide tiles divide the KV heads, and those that share a head divide
    its items; programs of narrow tiles that read the same keys are on one die.
    """
    if DIES == 1:
        if IS_WIDE:
            return tl.program_id(0), tl.program_id(1), tl.program_id(2)
        return tl.program_id(1), tl.program_id(0), tl.program_id(2)
    num_items = tl.num_programs(0) if IS_WIDE else tl.num_programs(1)
    num_parts = tl.num_programs(2)
    num_programs = NUM_KV_HEADS * num_items * num_parts
    row = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
    program = row * tl.num_programs(0) + tl.program_id(0)
    if IS_WIDE:
        number = in_ranges(program, num_programs, DIES)
        of_head = number % (num_items * num_parts)
        index = deal(of_head // num_parts, num_items, PILES)
        return index, number // (num_items * num_parts), of_head % num_parts
    number = in_groups(program, num_programs, SHARING, DIES)
    per_part = NUM_KV_HEADS * num_items
    return number % per_part // NUM_KV_HEADS, number % NUM_KV_HEADS, number // per_part


# these arguments vary from step to step: do not compile a kernel per value
@triton.jit(do_not_specialize=["table_stride", "window"])
def attention_kernel(
    query, cache, scales, out, partials, part_weights, table, items, slopes, sinks,
    query_stride, table_stride, score_scale, cap, window,
    GROUP: tl.constexpr, NUM_KV_HEADS: tl.constexpr, SHARING: tl.constexpr, D: tl.constexpr,
    V: tl.constexpr, VP: tl.constexpr, REST: tl.constexpr,
    BLOCK: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr,
    ITEM_TOKENS: tl.constexpr, IS_WIDE: tl.constexpr, OVERLAPS: tl.constexpr,
    HAS_CAP: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_ALIBI: tl.constexpr,
    HAS_SINKS: tl.constexpr, CODES: tl.constexpr, DIES: tl.constexpr,
    PILES: tl.constexpr, DECODER: tl.constexpr, WAITS: tl.constexpr,
):  # fmt: skip
    """Compute TOKENS query tokens of one item, with the query heads of one KV head.

    With REST > 0, values are the first V of the D numbers of a key. SHARING programs divide the
    query heads of one KV head, GROUP each, where all of them do not fit one program.

    Grid: for narrow tiles (few rows, one loop) heads are the first axis, so that long items start
    first; for wide tiles items are, so that programs that run together read the same keys. The
    third axis divides an item of ITEM_TOKENS into parts of TOKENS. On GPUs of several dies, see
    `_place`.
    """
    wait_for_inputs(WAITS)
    index, kv_head, part = _place(NUM_KV_HEADS, SHARING, IS_WIDE, DIES, PILES)
    item = items + index * 8
    first_token = part * TOKENS
    num_tokens = tl.minimum(tl.load(item + 2) - first_token, TOKENS)
    if num_tokens <= 0:
        return
    request = tl.load(item)
    query_row = tl.load(item + 1) + first_token
    first_position = tl.load(item + 3) + first_token
    last_position = first_position + num_tokens - 1
    begin, end = tl.load(item + 4), tl.minimum(tl.load(item + 5), last_position + 1)
    partial, split = tl.load(item + 6), tl.load(item + 7)
    if HAS_WINDOW:
        begin = tl.maximum(begin, first_position - window + 1)

    row = tl.arange(0, ROWS)
    token, head = row // GROUP, kv_head * GROUP + row % GROUP
    is_row = token < num_tokens
    dim = tl.arange(0, VP)
    rows = query + (query_row + token).to(tl.int64) * query_stride + head * D
    q = _load_rows(rows, is_row, dim, V, True)
    q_rest = q
    if REST > 0:
        q_rest = _load_rows(rows + V, is_row, tl.arange(0, REST), D - V, True)
    if CODES:
        score_scale = score_scale * divisor(q.dtype, CODES, DECODER)
        if q.dtype == tl.bfloat16:
            q, score_scale = in_float16(q, score_scale)
    position = first_position + tl.where(is_row, token, 0)
    slope = 0.0
    if HAS_ALIBI:
        slope = tl.load(slopes + head, mask=is_row, other=0.0) * _LOG2E

    table += request.to(tl.int64) * table_stride
    planes: tl.constexpr = 1 if REST > 0 else 2
    keys = cache + kv_head // SHARING * (planes * BLOCK * D)
    scales += kv_head // SHARING * (2 * BLOCK)
    stride: tl.constexpr = NUM_KV_HEADS // SHARING * planes * BLOCK * D
    acc = tl.zeros([ROWS, VP], tl.float32)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    start = begin // TILE * TILE
    if IS_WIDE:
        # masked tiles at the window's edge, then tiles visible to all rows, then the diagonal
        bulk_begin, bulk_end = start, tl.minimum(end, first_position + 1) // TILE * TILE
        if HAS_WINDOW:
            bulk_begin = tl.maximum(begin, last_position - window + 1)
            bulk_begin = (bulk_begin + TILE - 1) // TILE * TILE
            bulk_end = tl.maximum(bulk_end, bulk_begin)
            acc, top, total, _a, _b, _c = _span(
                q, q_rest, keys, scales, table, start, tl.minimum(bulk_begin, end), begin, end,
                position, slope, window, split, score_scale, cap, acc, top, total, 0, 0, 0,
                D, V, VP, REST, BLOCK, stride, TILE, HAS_CAP, HAS_WINDOW, HAS_ALIBI, True, False,
                CODES, DECODER,
            )  # fmt: skip
        if OVERLAPS:
            bulk_end = tl.maximum(bulk_begin, bulk_end)  # a part may begin after the first query
            acc, top, total = _overlapped_span(
                q, keys, table, bulk_begin, bulk_end, begin, end, position, slope, window,
                score_scale, cap, acc, top, total, D, VP, BLOCK, stride, TILE, HAS_CAP, HAS_WINDOW,
                HAS_ALIBI,
            )  # fmt: skip
            bulk_end += TILE
        else:
            acc, top, total, _a, _b, _c = _span(
                q, q_rest, keys, scales, table, bulk_begin, bulk_end, begin, end, position, slope,
                window, split, score_scale, cap, acc, top, total, 0, 0, 0,
                D, V, VP, REST, BLOCK, stride, TILE, HAS_CAP, HAS_WINDOW, HAS_ALIBI, False, False,
                CODES, DECODER,
            )  # fmt: skip
        acc, top, total, _a, _b, _c = _span(
            q, q_rest, keys, scales, table, bulk_end, end, begin, end, position, slope,
            window, split, score_scale, cap, acc, top, total, 0, 0, 0,
            D, V, VP, REST, BLOCK, stride, TILE, HAS_CAP, HAS_WINDOW, HAS_ALIBI, True, False, CODES,
            DECODER,
        )  # fmt: skip
    else:
        acc, top, total, all_acc, all_top, all_total = _span(
            q, q_rest, keys, scales, table, start, end, begin, end, position, slope,
            window, split, score_scale, cap, acc, top, total, acc, top, total,
            D, V, VP, REST, BLOCK, stride, TILE, HAS_CAP, HAS_WINDOW, HAS_ALIBI, True, True, CODES,
            2 if DECODER == 3 else DECODER,
        )  # fmt: skip
        acc, top, total = _combine(all_acc, all_top, all_total, acc, top, total)

    if partial >= 0:
        place = (partial.to(tl.int64) * NUM_KV_HEADS + kv_head) * (ITEM_TOKENS * GROUP)
        place = place + first_token * GROUP + row
        targets = partials + place[:, None] * V + dim[None, :]
        tl.store(targets, acc, mask=is_row[:, None] & (dim < V)[None, :])
        tl.store(part_weights + place * 2, top, mask=is_row)
        tl.store(part_weights + place * 2 + 1, total, mask=is_row)
        return
    result = _finish(acc, top, total, sinks, head, is_row, HAS_SINKS)
    targets = out + (query_row + token).to(tl.int64) * (NUM_KV_HEADS * GROUP * V) + head * V
    tl.store(
        targets[:, None] + dim[None, :],
        result.to(out.dtype.element_ty),
        mask=is_row[:, None] & (dim < V)[None, :],
    )


@triton.jit
def merge_kernel(
    partials, part_weights, out, merges, sinks,
    GROUP: tl.constexpr, GROUP_PADDED: tl.constexpr, NUM_KV_HEADS: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, ITEM_TOKENS: tl.constexpr, HAS_SINKS: tl.constexpr,
    WAITS: tl.constexpr,
):  # fmt: skip
    """Merge the partial results of one query token and one KV head's group, in order."""
    wait_for_inputs(WAITS)
    kv_head, token = tl.program_id(0), tl.program_id(2)
    merge = merges + tl.program_id(1) * 4
    if token >= tl.load(merge + 1):
        return
    query_row, first, count = tl.load(merge), tl.load(merge + 2), tl.load(merge + 3)
    member, dim = tl.arange(0, GROUP_PADDED), tl.arange(0, DP)
    is_row = member < GROUP
    step: tl.constexpr = NUM_KV_HEADS * ITEM_TOKENS * GROUP
    place = (first.to(tl.int64) * NUM_KV_HEADS + kv_head) * (ITEM_TOKENS * GROUP)
    place = place + token * GROUP + member
    mask = is_row[:, None] & (dim < D)[None, :]
    acc = tl.zeros([GROUP_PADDED, DP], tl.float32)
    top = tl.full([GROUP_PADDED], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_PADDED], tl.float32)
    for _ in tl.range(0, count, num_stages=3):
        part = tl.load(partials + place[:, None] * D + dim[None, :], mask=mask, other=0.0)
        part_top = tl.load(part_weights + place * 2, mask=is_row, other=0.0)
        part_total = tl.load(part_weights + place * 2 + 1, mask=is_row, other=1.0)
        acc, top, total = _combine(acc, top, total, part, part_top, part_total)
        place += step
    head = kv_head * GROUP + member
    result = _finish(acc, top, total, sinks, head, is_row, HAS_SINKS)
    targets = out + (query_row + token).to(tl.int64) * (NUM_KV_HEADS * GROUP * D) + head * D
    tl.store(targets[:, None] + dim[None, :], result.to(out.dtype.element_ty), mask=mask)


@triton.jit
def encoder_kernel(
    query, key, value, out, query_start_loc,
    query_stride, key_stride, value_stride, score_scale, window,
    GROUP: tl.constexpr, NUM_KV_HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    TILE: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    """Bidirectional attention of TOKENS query tokens within their prompt.

    Queries are [T, H, D], keys and values [T, H_kv, D]. Lengths are read on the device, so that a
    captured step can be replayed with other lengths.
    """
    start = tl.load(query_start_loc + tl.program_id(2))
    length = tl.load(query_start_loc + tl.program_id(2) + 1) - start
    first_token, kv_head = tl.program_id(0) * TOKENS, tl.program_id(1)
    if first_token >= length:
        return
    row = tl.arange(0, ROWS)
    token, head = first_token + row // GROUP, kv_head * GROUP + row % GROUP
    is_row = (row < TOKENS * GROUP) & (token < length)
    dim = tl.arange(0, DP)
    rows = query + (start + token).to(tl.int64) * query_stride + head * D
    q = _load_rows(rows, is_row, dim, D, True)
    acc = tl.zeros([ROWS, DP], tl.float32)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    keys = key + start.to(tl.int64) * key_stride + kv_head * D
    values = value + start.to(tl.int64) * value_stride + kv_head * D
    end = length
    bulk = length // TILE * TILE  # whole tiles need no mask
    masked = bulk
    if HAS_WINDOW:
        end = tl.minimum(first_token + TOKENS - 1 + window, length)
        bulk = 0
        masked = tl.maximum(first_token - window + 1, 0) // TILE * TILE
    tile = tl.arange(0, TILE)
    for first in range(0, bulk, TILE):
        begin = tl.cast(first, tl.int64)
        k = _load_rows(keys + begin * key_stride + tile * key_stride, is_row, dim, D, False)
        v = _load_rows(values + begin * value_stride + tile * value_stride, is_row, dim, D, False)
        acc, top, total = _update(
            q, q, k, k, v, 0.0, 0.0, 0, 0.0, score_scale, 0.0, acc, top, total,
            False, False, False, 0, 0, False,
        )  # fmt: skip
    for first in range(masked, end, TILE):
        begin, other = tl.cast(first, tl.int64), first + tile
        is_live = other < end
        k = _load_rows(keys + begin * key_stride + tile * key_stride, is_live, dim, D, True)
        v = _load_rows(values + begin * value_stride + tile * value_stride, is_live, dim, D, True)
        is_seen = is_live[None, :]
        if HAS_WINDOW:
            distance = token[:, None] - other[None, :]
            is_seen = is_seen & (distance < window) & (distance > -window)
        acc, top, total = _update(
            q, q, k, k, v, 0.0, 0.0, is_seen, 0.0, score_scale, 0.0, acc, top, total,
            False, False, True, 0, 0, False,
        )  # fmt: skip
    targets = out + (start + token).to(tl.int64) * (NUM_KV_HEADS * GROUP * D) + head * D
    tl.store(
        targets[:, None] + dim[None, :],
        (acc / total[:, None]).to(out.dtype.element_ty),
        mask=is_row[:, None] & (dim < D)[None, :],
    )
