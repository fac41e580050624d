"""Multiply at most 4 rows x [M, K] with the transpose of a weight [N, K] of floats.

    x       [M, K]  float32, float16 or bfloat16; the row stride is given
    weight  [N, K]  contiguous, in x's dtype
    bias    [N] or None, added in float32
    out     [M, N]  in any float dtype, rounded once
    parts   float32 [P, M, N], the sums of P parts of K

Mapping:  one program per BLOCK_N rows of the weight and part of K. Its threads are side by side
          along K, so that a warp reads consecutive 16-byte vectors of a row of the weight; each
          thread keeps one sum per row of x and of the weight, and threads are added up at the end.
          If N gives too few programs, K is split, and `add_parts` adds the parts in order.
Bound by: memory: N K elements are read once; x stays in the caches.
Meaning:  torch.nn.functional.linear with float32 sums, whose order does not depend on M.
"""

from typing import TypeGuard

import torch
import triton
import triton.language as tl

from portalm_backends.gpu_common.kernels.dependent_launch import options, wait_for_inputs
from portalm_backends.gpu_common.kernels.matmul import add_parts
from portalm_backends.gpu_common.weights import GpuWeight

MAX_ROWS = 4
"""Most rows of x. More rows need more multiplications than a GPU can do while it reads a weight."""

NUM_WARPS = 4
_VECTOR_BYTES = 16
_MOST_SUMS = 16
"""Most sums per thread, to keep registers for several loads in flight."""
_PROGRAMS_PER_CORE = 3
"""Programs per multiprocessor, so that enough loads are in flight and all have work."""
_ALIGNMENT = 16
"""Rows start at multiples of this many elements; Triton then reads whole vectors."""


def fits(weight: GpuWeight, x: torch.Tensor) -> TypeGuard[torch.Tensor]:
    """True if `gemv` multiplies x [M, K] with this packed weight."""
    return (
        isinstance(weight, torch.Tensor)
        and 0 < len(x) <= MAX_ROWS
        and x.dtype == weight.dtype
        and x.stride(1) == 1
        and x.shape[1] % _ALIGNMENT == 0
        and x.stride(0) % _ALIGNMENT == 0
        and all(tensor.data_ptr() % _VECTOR_BYTES == 0 for tensor in (x, weight))
    )


def gemv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    *,
    num_cores: int,
    warp_size: int,
) -> torch.Tensor:
    """Multiply x [M, K], M at most MAX_ROWS, with weight [N, K] transposed: `dtype` [M, N].

    Args:
        x: see `fits`.
        weight: likewise.
        bias: [N], added before the result is rounded.
        dtype: of the result.
        num_cores: multiprocessors of the device.
        warp_size: threads of a warp.
    """
    (m, k), n = x.shape, len(weight)
    rows, block_n, block_k, blocks_per_part, num_parts = shape_of(
        m, n, k, itemsize=x.itemsize, num_cores=num_cores, warp_size=warp_size
    )
    out = torch.empty((m, n), dtype=dtype, device=x.device)
    result, added = out, bias
    if num_parts > 1:
        result, added = torch.empty((num_parts, m, n), dtype=torch.float32, device=x.device), None
    _gemv[(triton.cdiv(n, block_n), num_parts)](
        x, weight, x if added is None else added, result, m, n, k, x.stride(0), blocks_per_part,
        rows, block_n, block_k, _VECTOR_BYTES // x.itemsize, k % block_k == 0, added is not None,
        num_warps=NUM_WARPS, enable_fp_fusion=True, **options(),
    )  # fmt: skip
    if num_parts > 1:
        add_parts(result, bias, out)
    return out


def shape_of(
    m: int, n: int, k: int, *, itemsize: int, num_cores: int, warp_size: int
) -> tuple[int, int, int, int, int]:
    """Choose the sizes of a launch for x [M, K] and a weight [N, K].

    Returns:
        Rows of x and of the weight per program, columns that it multiplies at once, the number of
        such blocks of columns in a part of K, and the number of parts.
    """
    rows = triton.next_power_of_2(m)
    block_k = NUM_WARPS * warp_size * _VECTOR_BYTES // itemsize
    wanted = num_cores * _PROGRAMS_PER_CORE
    block_n = 8
    while block_n > 1 and triton.cdiv(n, block_n) < wanted:
        block_n //= 2
    num_blocks = triton.cdiv(k, block_k)
    # the split depends on N and K only, so that a row's result does not depend on the others
    num_parts = min(triton.cdiv(wanted, triton.cdiv(n, block_n)), num_blocks)
    blocks_per_part = triton.cdiv(num_blocks, num_parts)
    block_n = min(block_n, _MOST_SUMS // rows)
    return rows, block_n, block_k, blocks_per_part, triton.cdiv(num_blocks, blocks_per_part)


@triton.jit(do_not_specialize=["m"])
def _gemv(
    x_ptr, weight_ptr, bias_ptr, out_ptr, m, n, k, x_stride, blocks_per_part,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, VECTOR: tl.constexpr,
    IS_EVEN: tl.constexpr, HAS_BIAS: tl.constexpr, WAITS: tl.constexpr,
):  # fmt: skip
    """Compute BLOCK_N columns of the result over one part of K; IS_EVEN: K is in whole blocks."""
    wait_for_inputs(WAITS)
    row = tl.arange(0, ROWS)
    of_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_K)
    # rows after the last are read again, and not written
    x_rows = x_ptr + tl.minimum(row, m - 1).to(tl.int64)[:, None, None] * x_stride
    weight_rows = weight_ptr + tl.minimum(of_n, n - 1).to(tl.int64)[None, :, None] * k
    first = tl.program_id(1) * blocks_per_part * BLOCK_K
    sums = tl.zeros((ROWS, BLOCK_N, BLOCK_K // VECTOR), tl.float32)
    for start in range(first, tl.minimum(first + blocks_per_part * BLOCK_K, k), BLOCK_K):
        of_k = (start + columns)[None, None, :]
        if IS_EVEN:
            weight = tl.load(weight_rows + of_k)
            x = tl.load(x_rows + of_k)
        else:
            weight = tl.load(weight_rows + of_k, mask=of_k < k, other=0.0)
            x = tl.load(x_rows + of_k, mask=of_k < k, other=0.0)
        products = x.to(tl.float32) * weight.to(tl.float32)
        products = tl.reshape(products, (ROWS, BLOCK_N, BLOCK_K // VECTOR, VECTOR))
        sums += tl.sum(products, 3)
    total = tl.sum(sums, 2)  # [ROWS, BLOCK_N]
    if HAS_BIAS:
        bias = tl.load(bias_ptr + of_n, mask=of_n < n, other=0.0).to(tl.float32)
        total += bias[None, :]
    place = out_ptr + (tl.program_id(1) * m + row).to(tl.int64)[:, None] * n + of_n[None, :]
    is_result = (row < m)[:, None] & (of_n < n)[None, :]
    tl.store(place, total.to(out_ptr.dtype.element_ty), mask=is_result)
