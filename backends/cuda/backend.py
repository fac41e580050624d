"""CudaBackend: NVIDIA GPUs, by what backends/gpu_common has."""

from __future__ import annotations

from portalm.backend import DeviceReport
from portalm_backends.gpu_common import find
from portalm_backends.gpu_common.archs import CUDA
from portalm_backends.gpu_common.backend import GpuBackend
from portalm_backends.gpu_common.device import Gpu, TorchGpu


class CudaBackend(GpuBackend):
    """The first NVIDIA GPU that this process sees."""

    name = "cuda"
    rank = 100
    archs = CUDA
    native_name = "cuda"

    def __init__(self, gpu: Gpu | None = None) -> None:
        """Starts the device, unless `gpu` stands for one."""
        super().__init__(TorchGpu() if gpu is None else gpu)

    @classmethod
    def find(cls) -> DeviceReport:
        """What is here, without starting it."""
        return find.find(
            maker="NVIDIA",
            has_driver=find.exists("/proc/driver/nvidia/version", "/dev/nvidiactl", "/dev/dxg"),
            driver_hint="install NVIDIA's driver (nvidia-smi then lists the GPU)",
            builds=find.torch_builds(),
            wanted="CUDA",
        )
