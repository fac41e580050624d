"""`Backend.linear` and `Backend.logits` for every packed weight."""

import functools

import torch
import torch.nn.functional as F

from portalm_backends.gpu_common.kernels import fp8
from portalm_backends.gpu_common.kernels.matmul import matmul
from portalm_backends.gpu_common.weights import FewBitWeight, Fp8Weight, GpuWeight


def linear(x: torch.Tensor, weight: GpuWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [T, K] times the packed [N, K] transposed, plus bias [N]: [T, N] in x's dtype."""
    if isinstance(weight, FewBitWeight):
        return matmul(x, weight, bias, x.dtype)
    if isinstance(weight, Fp8Weight):
        return fp8.linear(x, weight, bias)
    return F.linear(x, weight, bias)


def logits(x: torch.Tensor, weight: torch.Tensor | FewBitWeight) -> torch.Tensor:
    """x [R, C] times the packed [V, C] transposed: float32 [R, V], never rounded to less."""
    if isinstance(weight, FewBitWeight):
        return matmul(x, weight, None, torch.float32)
    if x.dtype == torch.float32:
        return F.linear(x, weight)
    if has_wide_product(x.device):
        return torch.mm(x, weight.t(), out_dtype=torch.float32)
    return matmul(x, weight, None, torch.float32)


@functools.cache
def has_wide_product(device: torch.device) -> bool:
    """True if torch multiplies 16-bit floats into float32 there: CUDA from 2.8, ROCm later.

    Waits for the device: to be asked once before a step is captured.
    """
    x = torch.zeros((16, 16), dtype=torch.bfloat16, device=device)
    try:
        torch.mm(x, x, out_dtype=torch.float32).cpu()
    except (RuntimeError, TypeError):
        return False
    return True
