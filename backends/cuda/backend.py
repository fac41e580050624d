"""CudaBackend: NVIDIA GPUs; the implementation is backends/gpu_common."""

from __future__ import annotations

from portalm.backend import DeviceReport
from portalm_backends.gpu_common import find
from portalm_backends.gpu_common.archs import CUDA
from portalm_backends.gpu_common.backend import GpuBackend
from portalm_backends.gpu_common.device import Gpu, TorchGpu


class CudaBackend(GpuBackend):
    """One NVIDIA GPU, by default the first that this process sees."""

    name = "cuda"
    rank = 100
    archs = CUDA
    native_name = "cuda"

    def __init__(self, gpu: Gpu | None = None) -> None:
        """Start the first GPU, or use `gpu`: `TorchGpu(1)` is the second."""
        super().__init__(TorchGpu() if gpu is None else gpu)

    @classmethod
    def find(cls) -> DeviceReport:
        """Report the NVIDIA GPUs of this machine without starting them."""
        return find.find(
            maker="NVIDIA",
            has_driver=find.exists("/proc/driver/nvidia/version", "/dev/nvidiactl", "/dev/dxg"),
            driver_hint="install NVIDIA's driver (nvidia-smi should list the GPU)",
            builds=find.torch_builds(),
            wanted="CUDA",
        )
