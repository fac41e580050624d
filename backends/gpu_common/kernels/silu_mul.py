"""silu(gate) * up of a merged projection.

    gate_up  [T, 2 I]   gate first; any row stride
    out      [T, I]

Mapping:  one program per BLOCK columns of a row, or per row if the result is quantized to float8.
Bound by: memory, 3 T I elements.
Meaning:  TorchBackend.silu_mul, but rounded only once.
"""

import torch
import triton
import triton.language as tl

from portalm_backends.gpu_common.kernels import fp8
from portalm_backends.gpu_common.kernels.dependent_launch import options, wait_for_inputs

_BLOCK = 1024
"""Columns per program."""
_MOST_COLUMNS = 32768
"""Longest row that is also quantized: a program holds all of it in registers."""


def silu_mul(gate_up: torch.Tensor, fp8_dtype: torch.dtype | None = None) -> torch.Tensor:
    """Compute silu(gate) * up of [T, 2 I]: [T, I].

    With `fp8_dtype` the result is quantized in the same launch, for `fp8.quantize`.
    """
    num_rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((num_rows, width), dtype=gate_up.dtype, device=gate_up.device)
    if num_rows == 0:
        return out
    values = scales = out
    block, largest = _BLOCK, 0.0
    if fp8_dtype is not None and width <= _MOST_COLUMNS:
        values, scales = fp8.buffers(num_rows, width, fp8_dtype, out.device)
        block, largest = triton.next_power_of_2(width), torch.finfo(fp8_dtype).max
    _silu_mul[(num_rows, triton.cdiv(width, block))](
        gate_up, out, values, scales, width, gate_up.stride(0), largest, block,
        num_warps=max(4, fp8.num_warps(block)), enable_fp_fusion=True, **options(),
    )  # fmt: skip
    if largest:
        fp8.attach(out, values, scales)
    return out


@triton.jit
def _silu_mul(
    gate_up_ptr, out_ptr, values_ptr, scales_ptr, width, row_stride,
    LARGEST: tl.constexpr, BLOCK: tl.constexpr, WAITS: tl.constexpr,
):  # fmt: skip
    """Compute BLOCK columns of a row; if LARGEST is not 0, all of it, and quantize it to float8."""
    wait_for_inputs(WAITS)
    row = tl.program_id(0).to(tl.int64)
    columns = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    mask = columns < width
    gate_up_ptr += row * row_stride
    gate = tl.load(gate_up_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + width + columns, mask=mask, other=0.0).to(tl.float32)
    out = (gate / (1.0 + tl.exp(-gate)) * up).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * width + columns, out, mask=mask)
    if LARGEST > 0.0:
        values, scales = fp8.rounded(out.to(tl.float32), LARGEST)
        values = values.to(values_ptr.dtype.element_ty)
        tl.store(values_ptr + row * width + columns, values, mask=mask)
        tl.store(scales_ptr + row + tl.arange(0, 1), scales)
