"""Free memory of the device, and the peak use of a piece of work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from portalm.backend import MemInfo
from portalm_backends.gpu_common.device import Gpu


def memory(gpu: Gpu) -> MemInfo:
    """Total and free bytes of the device; memory that torch's allocator caches counts as free."""
    free, total = gpu.memory()
    return MemInfo(total=total, free=free, host_shared=False)


@contextmanager
def peak(gpu: Gpu) -> Iterator[Callable[[], int]]:
    """Yield a function that returns the peak of live tensors, in bytes above the start.

    After the context it returns the peak within the context.
    """
    start = gpu.allocated()
    gpu.reset_peak()
    final: int | None = None

    def used() -> int:
        if final is not None:
            return final
        return max(0, gpu.peak_allocated() - start)

    try:
        yield used
    finally:
        final = used()
