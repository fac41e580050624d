"""RocmBackend: AMD GPUs; the implementation is backends/gpu_common."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from portalm.backend import DeviceReport
from portalm_backends.gpu_common import find
from portalm_backends.gpu_common.archs import ROCM
from portalm_backends.gpu_common.backend import GpuBackend
from portalm_backends.gpu_common.device import Gpu, TorchGpu
from portalm_backends.gpu_common.weights import GpuWeight, PackedQuantized

if TYPE_CHECKING:
    from portalm_backends.gpu_common.kernels import gemv


class RocmBackend(GpuBackend):
    """One AMD GPU, by default the first that this process sees."""

    name = "rocm"
    rank = 100
    archs = ROCM
    native_name = "rocm"

    def __init__(self, gpu: Gpu | None = None) -> None:
        """Start the first GPU, or use `gpu`: `TorchGpu(1)` is the second."""
        super().__init__(TorchGpu() if gpu is None else gpu)
        _import_kernels()

    @classmethod
    def find(cls) -> DeviceReport:
        """Report the AMD GPUs of this machine without starting them."""
        return find.find(
            maker="AMD",
            has_driver=find.exists("/dev/kfd", "/dev/dxg"),
            driver_hint="load amdgpu with its compute driver (/dev/kfd should exist)",
            builds=find.torch_builds(),
            wanted="ROCm",
        )

    def linear(
        self, x: torch.Tensor, weight: GpuWeight, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Multiply x [T, K] with the packed [N, K] transposed; add bias [N]: [T, N].

        Up to 4 rows are multiplied by kernels/gemv.py, more rows by torch's library: its kernels
        are made for tiles of matrix instructions, which few rows leave almost empty.
        """
        if gemv.fits(weight, x):
            return self._gemv(x, weight, bias, x.dtype)
        return super().linear(x, weight, bias)

    def logits(self, x: torch.Tensor, weight: torch.Tensor | PackedQuantized) -> torch.Tensor:
        """Multiply x [R, C] with the packed [V, C] transposed: float32 [R, V]; see `linear`."""
        if gemv.fits(weight, x):
            return self._gemv(x, weight, None, torch.float32)
        return super().logits(x, weight)

    def _gemv(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
    ) -> torch.Tensor:
        cores, warp_size = self._gpu.num_cores, self.arch.warp_size
        return gemv.gemv(x, weight, bias, dtype, num_cores=cores, warp_size=warp_size)


def _import_kernels() -> None:
    """Import Triton only when a GPU is started, not when `find` reports one."""
    global gemv
    from portalm_backends.gpu_common.kernels import gemv
