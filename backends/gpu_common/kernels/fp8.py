"""Products in float8: activations and weights are quantized with one scale per row.

Mapping:  `_quantize` has one program per row of x, which stays in registers.
Bound by: memory, 3 bytes per value of a 16-bit x; then tensor cores, in torch._scaled_mm.
Meaning:  Backend.linear with a weight that was quantized to "fp8".
"""

import torch
import triton
import triton.language as tl

from portalm_backends.gpu_common.kernels.dependent_launch import options, wait_for_inputs
from portalm_backends.gpu_common.weights import Fp8Weight


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
    """Quantize x [M, K] to float8 [M, K] with a scale per row, float32 [M, 1]."""
    rows, width = x.shape
    values = torch.empty((rows, width), dtype=dtype, device=x.device)
    scales = torch.empty((rows, 1), dtype=torch.float32, device=x.device)
    if rows:
        block = triton.next_power_of_2(width)
        _quantize[(rows,)](
            x, values, scales, width, x.stride(0), torch.finfo(dtype).max, block,
            num_warps=min(max(block // 512, 1), 16), **options(),
        )  # fmt: skip
    return values, scales


@triton.jit
def _quantize(
    x_ptr, values_ptr, scales_ptr, width, row_stride,
    LARGEST: tl.constexpr, BLOCK: tl.constexpr, WAITS: tl.constexpr,
):  # fmt: skip
    """Quantize one row; its largest magnitude becomes the largest float8."""
    wait_for_inputs(WAITS)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < width
    x = tl.load(x_ptr + row * row_stride + columns, mask=mask, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(x), axis=0) / LARGEST, 1e-12)
    tl.store(scales_ptr + row, scale)
    rounded = tl.clamp(x / scale, -LARGEST, LARGEST).to(values_ptr.dtype.element_ty)
    tl.store(values_ptr + row * width + columns, rounded, mask=mask)
