"""RocmBackend: AMD GPUs; the implementation is backends/gpu_common."""

from __future__ import annotations

from portalm.backend import DeviceReport
from portalm_backends.gpu_common import find
from portalm_backends.gpu_common.archs import ROCM
from portalm_backends.gpu_common.backend import GpuBackend
from portalm_backends.gpu_common.device import Gpu, TorchGpu


class RocmBackend(GpuBackend):
    """One AMD GPU, by default the first that this process sees."""

    name = "rocm"
    rank = 100
    archs = ROCM
    native_name = "rocm"

    def __init__(self, gpu: Gpu | None = None) -> None:
        """Start the first GPU, or use `gpu`: `TorchGpu(1)` is the second."""
        super().__init__(TorchGpu() if gpu is None else gpu)

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
