"""RMS norm, with and without a residual, and layer norm over the last dimension.

    x, residual   [..., C]   any strides in up to two outer dimensions (heads of a merged
                             projection); others are copied
    weight, bias  [C]

Mapping:  a row stays in the registers of one program; several short rows share a program.
Bound by: memory: each value is read and written once.
Meaning:  TorchBackend.rms_norm, add_rms_norm and layer_norm.
"""

import torch
import triton
import triton.language as tl

from portalm_backends.gpu_common.kernels import fp8
from portalm_backends.gpu_common.kernels.dependent_launch import options, wait_for_inputs

_PROGRAM = 2048
"""Values per program if rows are shorter."""


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, fp8_dtype: torch.dtype | None = None
) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps), rounded to x's dtype, times weight; in x's shape, contiguous.

    With `fp8_dtype` the result of x [T, C] is quantized in the same launch, for `fp8.quantize`.
    """
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, None, weight, None, out, None, eps, fp8_dtype)
    return out


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    fp8_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rms_norm(x + residual), x + residual); the sum is rounded to x's dtype once.

    With `fp8_dtype` the first is quantized in the same launch, for `fp8.quantize`.
    """
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = torch.empty_like(out)
    _launch(x, residual, weight, None, out, total, eps, fp8_dtype)
    return out, total


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> torch.Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias, rounded to x's dtype once."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, None, weight, bias, out, None, eps)
    return out


def _launch(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    total: torch.Tensor | None,
    eps: float,
    fp8_dtype: torch.dtype | None = None,
) -> None:
    width = x.shape[-1]
    num_rows = x.numel() // width
    if num_rows == 0:
        return
    outer, inner, group = _row_strides(x)
    residual_outer, residual_inner, _ = (0, 0, 0) if residual is None else _row_strides(residual)
    block = triton.next_power_of_2(width)
    rows = max(1, _PROGRAM // block)
    values = scales = out
    if fp8_dtype is not None:
        values, scales = fp8.buffers(num_rows, width, fp8_dtype, out.device)
    _norm[(triton.cdiv(num_rows, rows),)](
        x, x if residual is None else residual, weight, weight if bias is None else bias, out,
        out if total is None else total, values, scales, num_rows, group, outer, inner,
        residual_outer, residual_inner, width, eps, rows, block, residual is not None,
        bias is not None, 0.0 if fp8_dtype is None else torch.finfo(fp8_dtype).max,
        num_warps=fp8.num_warps(rows * block), enable_fp_fusion=True, **options(),
    )  # fmt: skip
    if fp8_dtype is not None:
        fp8.attach(out, values, scales)


def _row_strides(x: torch.Tensor) -> tuple[int, int, int]:
    """(outer, inner, group): row r starts at r // group * outer + r % group * inner."""
    if x.dim() > 3 or x.stride(-1) != 1:
        x = x.reshape(-1, x.shape[-1])
    if x.dim() == 3:
        return x.stride(0), x.stride(1), x.shape[1]
    return (x.stride(0) if x.dim() == 2 else 0), 0, 1


@triton.jit(do_not_specialize=["num_rows"])
def _norm(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, out_ptr, total_ptr, values_ptr, scales_ptr,
    num_rows, group, outer, inner, residual_outer, residual_inner, width, eps,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_BIAS: tl.constexpr,
    LARGEST: tl.constexpr, WAITS: tl.constexpr,
):  # fmt: skip
    """Normalize ROWS rows in float32: layer norm with HAS_BIAS, else RMS norm.

    If LARGEST is not 0, quantize the results to float8 as well.
    """
    wait_for_inputs(WAITS)
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None].to(tl.int64)
    columns = tl.arange(0, BLOCK)[None, :]
    mask = (rows < num_rows) & (columns < width)
    place = rows // group * outer + rows % group * inner + columns
    x = tl.load(x_ptr + place, mask=mask, other=0.0).to(tl.float32)
    dtype = out_ptr.dtype.element_ty
    if HAS_RESIDUAL:
        place = rows // group * residual_outer + rows % group * residual_inner + columns
        total = (x + tl.load(residual_ptr + place, mask=mask, other=0.0).to(tl.float32)).to(dtype)
        tl.store(total_ptr + rows * width + columns, total, mask=mask)
        x = total.to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=columns < width, other=0.0).to(tl.float32)
    if HAS_BIAS:
        x = tl.where(mask, x - (tl.sum(x, axis=1) / width)[:, None], 0.0)
        scale = tl.rsqrt(tl.sum(x * x, axis=1) / width + eps)[:, None]
        bias = tl.load(bias_ptr + columns, mask=columns < width, other=0.0).to(tl.float32)
        out = x * scale * weight + bias
    else:
        scale = tl.rsqrt(tl.sum(x * x, axis=1) / width + eps)[:, None]
        out = (x * scale).to(dtype).to(tl.float32) * weight
    out = out.to(dtype)
    tl.store(out_ptr + rows * width + columns, out, mask=mask)
    if LARGEST > 0.0:
        values, scales = fp8.rounded(out.to(tl.float32), LARGEST)
        values = values.to(values_ptr.dtype.element_ty)
        tl.store(values_ptr + rows * width + columns, values, mask=mask)
        tl.store(scales_ptr + rows, scales[:, None], mask=rows < num_rows)
