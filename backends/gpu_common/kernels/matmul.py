"""Multiply x [M, K] with the transpose of a weight [N, K], where torch has no such product.

    x          float32, float16 or bfloat16; the row stride is given
    weight     PackedQuantized, or [N, K] in x's dtype if the result shall be float32

Mapping:  one program per BLOCK_N rows of the weight and BLOCK_M rows of x. If those are too few,
          K is split into parts too, which `_add_parts` adds in a fixed order. The weight is the
          left operand, so that its tile fills the long side of the tensor core; it is unpacked in
          registers. Codes are multiplied exactly, and the sums of each group are scaled in
          float32.
Bound by: memory up to about 64 rows: N K bits / 8 + N K / group * 2 bytes.
Meaning:  QuantizedWeight.dequantize; `Backend.linear` and `Backend.logits`.
"""

import torch
import triton
import triton.language as tl

from portalm.errors import BackendError
from portalm_backends.gpu_common.kernels.dependent_launch import options, wait_for_inputs
from portalm_backends.gpu_common.weights import PackedQuantized, parts_of

_PROGRAMS = 512
"""K is split to get this many programs, which is enough for the largest devices."""
_LEAST = 256
"""Least number of columns of K per program."""
_PLAIN_GROUP = 64
"""Columns of K that are multiplied at once in weights without groups."""


def matmul(
    x: torch.Tensor,
    weight: torch.Tensor | PackedQuantized,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Multiply x [M, K] with weight [N, K] transposed; add bias [N] in float32: `dtype` [M, N]."""
    values, scales, minimums, bits, group, n, k = parts_of(weight)
    group = group or _PLAIN_GROUP
    m = x.shape[0]
    if x.shape[1] != k or x.stride(1) != 1:
        raise BackendError(
            "shape",
            f"linear: x of shape {list(x.shape)} and strides {list(x.stride())} does not fit a "
            f"weight [{n}, {k}]; x must be [M, {k}] with contiguous rows",
        )
    out = torch.empty((m, n), dtype=dtype, device=x.device)
    if m == 0:
        return out
    block_m = min(max(triton.next_power_of_2(m), 16), 128)
    block_n = 64
    num_programs = triton.cdiv(n, block_n) * triton.cdiv(m, block_m)
    num_groups = triton.cdiv(k, group)
    most = max(1, num_groups * group // _LEAST)
    num_parts = min(triton.cdiv(_PROGRAMS, num_programs), most)
    part = triton.cdiv(num_groups, num_parts)
    num_parts = triton.cdiv(num_groups, part)
    result, added = out, bias
    if num_parts > 1:
        result, added = torch.empty((num_parts, m, n), dtype=torch.float32, device=x.device), None
    _matmul[(triton.cdiv(n, block_n), triton.cdiv(m, block_m), num_parts)](
        x, values, values if scales is None else scales,
        values if minimums is None else minimums, x if added is None else added,
        result, m, n, k, x.stride(0), num_groups, part, group, bits, minimums is not None,
        added is not None, block_m, block_n, num_warps=4 if block_m < 64 else 8, num_stages=3,
        enable_fp_fusion=True, **options(),
    )  # fmt: skip
    if num_parts > 1:
        add_parts(result, bias, out)
    return out


@triton.jit(do_not_specialize=["m", "num_groups", "part"])
def _matmul(
    x_ptr, values_ptr, scales_ptr, minimums_ptr, bias_ptr, out_ptr, m, n, k, x_stride, num_groups,
    part, GROUP: tl.constexpr, BITS: tl.constexpr, HAS_MINIMUMS: tl.constexpr,
    HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WAITS: tl.constexpr,
):  # fmt: skip
    """Compute a tile of the product, over `part` groups of K."""
    wait_for_inputs(WAITS)
    of_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    of_m = (tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    first = tl.program_id(2) * part
    is_n, is_m = of_n < n, of_m < m
    columns = tl.arange(0, GROUP)
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for i in range(first, tl.minimum(first + part, num_groups)):
        of_k = i * GROUP + columns
        x = tl.load(
            x_ptr + of_m[None, :] * x_stride + of_k[:, None],
            mask=is_m[None, :] & (of_k < k)[:, None],
            other=0.0,
        )
        total = add_group(
            total, x, values_ptr, scales_ptr, minimums_ptr, i, of_n, is_n, n, k,
            GROUP, BITS, HAS_MINIMUMS, BLOCK_N,
        )  # fmt: skip
    if HAS_BIAS:
        total += tl.load(bias_ptr + of_n, mask=is_n, other=0.0).to(tl.float32)[:, None]
    rows = tl.program_id(2) * m + of_m
    tl.store(
        out_ptr + rows[None, :] * n + of_n[:, None],
        total.to(out_ptr.dtype.element_ty),
        mask=is_m[None, :] & is_n[:, None],
    )


@triton.jit
def add_group(
    total, x, values_ptr, scales_ptr, minimums_ptr, i, of_n, is_n, n, k,
    GROUP: tl.constexpr, BITS: tl.constexpr, HAS_MINIMUMS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Add group i of rows `of_n` of a weight [n, k], times x, to `total` [BLOCK_N, BLOCK_M].

    x, [GROUP, BLOCK_M], is the same group of activations. BITS is 16 for floats of any size; a
    group is then columns i * GROUP to (i + 1) * GROUP.
    """
    columns = tl.arange(0, GROUP)
    if BITS == 16:
        of_k = i * GROUP + columns
        values = tl.load(
            values_ptr + of_n[:, None].to(tl.int64) * k + of_k[None, :],
            mask=is_n[:, None] & (of_k < k)[None, :],
            other=0.0,
        )
        total = tl.dot(values, x, total, input_precision="ieee")
    else:
        rows = (i * n + of_n).to(tl.int64)
        if BITS == 8:
            place = values_ptr + rows[:, None] * GROUP + columns[None, :]
            codes = tl.load(place, mask=is_n[:, None], other=0)
        else:
            pairs = tl.arange(0, GROUP // 2)
            place = values_ptr + rows[:, None] * (GROUP // 2) + pairs[None, :]
            both = tl.load(place, mask=is_n[:, None], other=0)
            if HAS_MINIMUMS:
                codes = tl.join(both & 15, (both >> 4) & 15)
            else:
                codes = tl.join((both << 4) >> 4, both >> 4)
            codes = tl.reshape(codes, (BLOCK_N, GROUP))
        scales = tl.load(scales_ptr + rows, mask=is_n, other=0.0).to(tl.float32)
        total += tl.dot(codes.to(x.dtype), x, input_precision="ieee") * scales[:, None]
        if HAS_MINIMUMS:
            minimums = tl.load(minimums_ptr + rows, mask=is_n, other=0.0).to(tl.float32)
            total += minimums[:, None] * tl.sum(x.to(tl.float32), axis=0)[None, :]
    return total


def add_parts(parts: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    """Add up float32 [P, M, N] over the parts, in order, and bias [N]; write to out [M, N]."""
    num_parts, m, n = parts.shape
    block = 256
    _add_parts[(m, triton.cdiv(n, block))](
        parts, parts if bias is None else bias, out, m, n, num_parts, bias is not None, block,
        enable_fp_fusion=True, **options(),
    )  # fmt: skip


@triton.jit(do_not_specialize=["m", "num_parts"])
def _add_parts(
    parts_ptr, bias_ptr, out_ptr, m, n, num_parts,
    HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr, WAITS: tl.constexpr,
):  # fmt: skip
    """Add up float32 [num_parts, M, N] over the parts, and add the bias."""
    wait_for_inputs(WAITS)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < n
    total = tl.zeros((BLOCK,), tl.float32)
    for i in range(num_parts):
        total += tl.load(parts_ptr + (i * m + row) * n + columns, mask=mask, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * n + columns, total.to(out_ptr.dtype.element_ty), mask=mask)
