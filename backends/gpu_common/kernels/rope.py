"""Rotary position embedding of queries and keys.

    query, key   [T, H, D], [T, H_kv, D]   strides of rows and heads are given
    positions    int32 [T]
    cos_sin      float32 [max_position, rotary_dim]   cosines, then sines

Mapping:  one program per HEADS heads of a token; programs for keys follow those for queries. The
          two elements of a pair are two loads, adjacent or not; dimensions past rotary_dim are
          copied.
Bound by: memory, 2 T (H + H_kv) D elements.
Meaning:  TorchBackend.rope.
"""

import torch
import triton
import triton.language as tl

from portalm_backends.gpu_common.kernels.dependent_launch import options, wait_for_inputs

_PROGRAM = 1024
"""Values per program."""


def rope(
    query: torch.Tensor,
    key: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    *,
    is_interleaved: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate query [T, H, D] and key [T, H_kv, D] by positions int32 [T]; make both contiguous."""
    num_tokens, num_heads, size = query.shape
    num_kv_heads, rotary_dim = key.shape[1], cos_sin.shape[1]
    query_out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    key_out = torch.empty(key.shape, dtype=key.dtype, device=key.device)
    if num_tokens == 0:
        return query_out, key_out
    half = triton.next_power_of_2(rotary_dim // 2)
    rest = triton.next_power_of_2(size - rotary_dim) if size > rotary_dim else 0
    most = triton.next_power_of_2(max(num_heads, num_kv_heads))
    heads = max(1, min(_PROGRAM // (2 * half), most))
    query_programs = triton.cdiv(num_heads, heads)
    _rope[(num_tokens, query_programs + triton.cdiv(num_kv_heads, heads))](
        query, key, query_out, key_out, positions, cos_sin, num_heads, num_kv_heads,
        query.stride(0), query.stride(1), key.stride(0), key.stride(1), query_programs,
        size, rotary_dim, half, rest, heads, is_interleaved, enable_fp_fusion=True, **options(),
    )  # fmt: skip
    return query_out, key_out


@triton.jit
def _rope(
    query_ptr, key_ptr, query_out_ptr, key_out_ptr, positions_ptr, cos_sin_ptr, num_heads,
    num_kv_heads, query_stride, query_head_stride, key_stride, key_head_stride, query_programs,
    SIZE: tl.constexpr, ROTARY: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
    HEADS: tl.constexpr, IS_INTERLEAVED: tl.constexpr, WAITS: tl.constexpr,
):  # fmt: skip
    """Rotate HEADS heads of one token's query or key."""
    wait_for_inputs(WAITS)
    token, program = tl.program_id(0).to(tl.int64), tl.program_id(1)
    position = tl.load(positions_ptr + token).to(tl.int64)
    if program < query_programs:
        _turn(
            query_ptr + token * query_stride, query_out_ptr + token * num_heads * SIZE,
            cos_sin_ptr + position * ROTARY, program * HEADS, num_heads, query_head_stride,
            SIZE, ROTARY, HALF, REST, HEADS, IS_INTERLEAVED,
        )  # fmt: skip
    else:
        _turn(
            key_ptr + token * key_stride, key_out_ptr + token * num_kv_heads * SIZE,
            cos_sin_ptr + position * ROTARY, (program - query_programs) * HEADS, num_kv_heads,
            key_head_stride, SIZE, ROTARY, HALF, REST, HEADS, IS_INTERLEAVED,
        )  # fmt: skip


@triton.jit
def _turn(
    x_ptr, out_ptr, turns_ptr, first_head, num_heads, head_stride,
    SIZE: tl.constexpr, ROTARY: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
    HEADS: tl.constexpr, IS_INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Rotate HEADS heads from `first_head`, in float32."""
    dtype = out_ptr.dtype.element_ty
    heads = first_head + tl.arange(0, HEADS)[:, None]
    pairs = tl.arange(0, HALF)[None, :]
    is_pair = pairs < ROTARY // 2
    mask = (heads < num_heads) & is_pair
    cos = tl.load(turns_ptr + pairs, mask=is_pair, other=0.0)
    sin = tl.load(turns_ptr + ROTARY // 2 + pairs, mask=is_pair, other=0.0)
    if IS_INTERLEAVED:
        first, second = 2 * pairs, 2 * pairs + 1
    else:
        first, second = pairs, pairs + ROTARY // 2
    a = tl.load(x_ptr + heads * head_stride + first, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + heads * head_stride + second, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + heads * SIZE + first, (a * cos - b * sin).to(dtype), mask=mask)
    tl.store(out_ptr + heads * SIZE + second, (b * cos + a * sin).to(dtype), mask=mask)
    if REST > 0:
        rest = ROTARY + tl.arange(0, REST)[None, :]
        mask = (heads < num_heads) & (rest < SIZE)
        kept = tl.load(x_ptr + heads * head_stride + rest, mask=mask, other=0.0)
        tl.store(out_ptr + heads * SIZE + rest, kept, mask=mask)
