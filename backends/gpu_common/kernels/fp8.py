"""Products in float8: activations rounded by rows, weights by theirs.

Mapping:  `_quantize` has one program for each row of x, which stays in its registers.
Bound by: memory, 3 bytes for each value of a 16-bit x; then the tensor cores, by torch._scaled_mm.
Meaning:  Backend.linear of a weight that was rounded to "fp8".
"""

import torch
import triton
import triton.language as tl

from portalm_backends.gpu_common.weights import Fp8Weight


def dtype_of(device: torch.device) -> torch.dtype | None:
    """The float8 that the device multiplies with a scale for each row; None if it does not.

    Asked by trying: it takes the device, its libraries and torch's build.
    """
    for dtype in (torch.float8_e4m3fn, torch.float8_e4m3fnuz):
        x, scale = torch.zeros((16, 16), device=device), torch.ones((16, 1), device=device)
        try:
            product = torch._scaled_mm(
                x.to(dtype), x.to(dtype).t(), scale, scale.t(), out_dtype=torch.bfloat16
            )
            product.cpu()
        except (RuntimeError, ValueError):  # whatever it lacks, another one or none is used
            continue
        return dtype
    return None


def linear(x: torch.Tensor, weight: Fp8Weight, bias: torch.Tensor | None) -> torch.Tensor:
    """x [M, K], bfloat16, times weight [N, K] transposed, plus bias [N]: [M, N]."""
    values, scales = quantize(x, weight.values.dtype)
    out = torch._scaled_mm(
        values, weight.values.t(), scales, weight.scales, out_dtype=x.dtype, use_fast_accum=True
    )
    return out if bias is None else out.add_(bias)


def quantize(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """x [M, K] rounded to float8 [M, K], and what each row was divided by, float32 [M, 1]."""
    rows, width = x.shape
    values = torch.empty((rows, width), dtype=dtype, device=x.device)
    scales = torch.empty((rows, 1), dtype=torch.float32, device=x.device)
    if rows:
        block = triton.next_power_of_2(width)
        _quantize[(rows,)](
            x, values, scales, width, x.stride(0), torch.finfo(dtype).max, block,
            num_warps=min(max(block // 512, 1), 16),
        )  # fmt: skip
    return values, scales


@triton.jit
def _quantize(
    x_ptr, values_ptr, scales_ptr, width, row_stride, LARGEST: tl.constexpr, BLOCK: tl.constexpr
):
    """One row: the largest of its values becomes the largest of float8."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < width
    x = tl.load(x_ptr + row * row_stride + columns, mask=mask, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(x), axis=0) / LARGEST, 1e-12)
    tl.store(scales_ptr + row, scale)
    rounded = tl.clamp(x / scale, -LARGEST, LARGEST).to(values_ptr.dtype.element_ty)
    tl.store(values_ptr + row * width + columns, rounded, mask=mask)
