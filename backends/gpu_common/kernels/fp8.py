"""Products in float8: activations and weights are quantized with one scale per row.

Activations are quantized where they are made, by norms.py and silu_mul.py, or by `_quantize`.

Mapping:  `_quantize` has one program per row of x, which stays in registers.
Bound by: memory, 3 bytes per value of a 16-bit x; then tensor cores, in torch._scaled_mm.
Meaning:  Backend.linear with a weight that was quantized to "fp8".
"""

import torch
import triton
import triton.language as tl

from portalm_backends.gpu_common.kernels.dependent_launch import options, wait_for_inputs
from portalm_backends.gpu_common.weights import Fp8Weight

_ATTRIBUTE = "_portalm_fp8"
"""Attribute of a tensor: (values, scales, version of the tensor that they were computed from)."""


def dtype_of(device: torch.device) -> torch.dtype | None:
    """The float8 dtype that the device multiplies with a scale per row; None if it cannot.

    Found by a trial product, because it depends on the device, its libraries and torch's build.
    """
    for dtype in (torch.float8_e4m3fn, torch.float8_e4m3fnuz):
        x, scale = torch.zeros((16, 16), device=device), torch.ones((16, 1), device=device)
        try:
            product = torch._scaled_mm(
                x.to(dtype), x.to(dtype).t(), scale, scale.t(), out_dtype=torch.bfloat16
            )
            product.cpu()
        except (RuntimeError, ValueError):  # not supported, for whatever reason: try the next
            continue
        return dtype
    return None


def linear(x: torch.Tensor, weight: Fp8Weight, bias: torch.Tensor | None) -> torch.Tensor:
    """Multiply x [M, K], bfloat16, with weight [N, K] transposed; add bias [N]: [M, N]."""
    values, scales = quantize(x, weight.values.dtype)
    out = torch._scaled_mm(
        values, weight.values.t(), scales, weight.scales, out_dtype=x.dtype, use_fast_accum=True
    )
    return out if bias is None else out.add_(bias)


def quantize(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize x [M, K] to float8 [M, K] with a scale per row, float32 [M, 1].

    Nothing is launched if the operation that made x has quantized it too (`attach`).
    """
    attached = getattr(x, _ATTRIBUTE, None)
    if attached is not None and attached[0].dtype == dtype and attached[2] == x._version:
        return attached[0], attached[1]
    values, scales = buffers(x.shape[0], x.shape[1], dtype, x.device)
    if x.shape[0]:
        block = triton.next_power_of_2(x.shape[1])
        _quantize[(x.shape[0],)](
            x, values, scales, x.shape[1], x.stride(0), torch.finfo(dtype).max, block,
            num_warps=num_warps(block), enable_fp_fusion=True, **options(),
        )  # fmt: skip
    return values, scales


def attach(x: torch.Tensor, values: torch.Tensor, scales: torch.Tensor) -> None:
    """Attach to x [M, K] the result of `quantize(x, values.dtype)`, computed by x's own kernel.

    It belongs to this tensor object: views and results of further operations have none, and after
    an operation in place `quantize` ignores it. Tensors of torch's inference mode do not count
    such operations, so nothing is attached to them.
    """
    if not x.is_inference():
        setattr(x, _ATTRIBUTE, (values, scales, x._version))


def buffers(
    rows: int, width: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Memory for float8 values [rows, width] and their scales, float32 [rows, 1]."""
    values = torch.empty((rows, width), dtype=dtype, device=device)
    return values, torch.empty((rows, 1), dtype=torch.float32, device=device)


def num_warps(block: int) -> int:
    """Warps of a program that holds rows of `block` values in registers."""
    return min(max(block // 512, 1), 16)


@triton.jit
def rounded(x, LARGEST: tl.constexpr):
    """Scale rows of float32 [R, N] to float8's range: (values [R, N], scales [R]).

    A row's largest magnitude becomes LARGEST, the largest float8.
    """
    scales = tl.maximum(tl.max(tl.abs(x), axis=1) / LARGEST, 1e-12)
    return tl.clamp(x / scales[:, None], -LARGEST, LARGEST), scales


@triton.jit
def _quantize(
    x_ptr, values_ptr, scales_ptr, width, row_stride,
    LARGEST: tl.constexpr, BLOCK: tl.constexpr, WAITS: tl.constexpr,
):  # fmt: skip
    """Quantize one row."""
    wait_for_inputs(WAITS)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)[None, :]
    mask = columns < width
    x = tl.load(x_ptr + row * row_stride + columns, mask=mask, other=0.0).to(tl.float32)
    values, scales = rounded(x, LARGEST)
    tl.store(scales_ptr + row + tl.arange(0, 1), scales)
    tl.store(values_ptr + row * width + columns, values.to(values_ptr.dtype.element_ty), mask=mask)
