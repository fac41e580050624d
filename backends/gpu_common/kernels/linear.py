"""`Backend.linear` and `Backend.logits` for every kind of packed weight."""

import functools

import torch
import torch.nn.functional as F

from portalm_backends.gpu_common.kernels import fp8
from portalm_backends.gpu_common.kernels.matmul import matmul
from portalm_backends.gpu_common.weights import Fp8Weight, GpuWeight, PackedQuantized


def linear(x: torch.Tensor, weight: GpuWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Multiply x [T, K] with the packed [N, K] transposed; add bias [N]: [T, N] in x's dtype."""
    if isinstance(weight, PackedQuantized):
        return matmul(x, weight, bias, x.dtype)
    if isinstance(weight, Fp8Weight):
        return fp8.linear(x, weight, bias)
    return F.linear(x, weight, bias)


def logits(x: torch.Tensor, weight: torch.Tensor | PackedQuantized) -> torch.Tensor:
    """Multiply x [R, C] with the packed [V, C] transposed: float32 [R, V].

    The result is never rounded to a smaller dtype in between.
    """
    if isinstance(weight, PackedQuantized):
        return matmul(x, weight, None, torch.float32)
    if x.dtype == torch.float32:
        return F.linear(x, weight)
    if has_wide_product(x.device):
        return torch.mm(x, weight.t(), out_dtype=torch.float32)
    return matmul(x, weight, None, torch.float32)


@functools.cache
def has_wide_product(device: torch.device) -> bool:
    """True if torch can multiply 16-bit floats with a float32 result on `device`.

    CUDA builds can from torch 2.8 on, ROCm builds only later. Waits for the device, so the first
    call must come before a capture.
    """
    x = torch.zeros((16, 16), dtype=torch.bfloat16, device=device)
    try:
        torch.mm(x, x, out_dtype=torch.float32).cpu()
    except (RuntimeError, TypeError):
        return False
    return True
