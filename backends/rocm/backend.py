"""RocmBackend: AMD GPUs, by what backends/gpu_common has."""

from __future__ import annotations

from portalm.backend import DeviceReport
from portalm_backends.gpu_common import find
from portalm_backends.gpu_common.archs import ROCM
from portalm_backends.gpu_common.backend import GpuBackend
from portalm_backends.gpu_common.device import Gpu, TorchGpu


class RocmBackend(GpuBackend):
    """The first AMD GPU that this process sees."""

    name = "rocm"
    rank = 100
    archs = ROCM
    native_name = "rocm"

    def __init__(self, gpu: Gpu | None = None) -> None:
        """Starts the device, unless `gpu` stands for one."""
        super().__init__(TorchGpu() if gpu is None else gpu)

    @classmethod
    def find(cls) -> DeviceReport:
        """What is here, without starting it."""
        return find.find(
            maker="AMD",
            has_driver=find.exists("/dev/kfd", "/dev/dxg"),
            driver_hint="load amdgpu with its compute driver (/dev/kfd is there then)",
            builds=find.torch_builds(),
            wanted="ROCm",
        )
