"""What is free on the device, and the most that something takes of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from portalm.backend import MemInfo
from portalm_backends.gpu_common.device import Gpu


def memory(gpu: Gpu) -> MemInfo:
    """Bytes of the device's own memory; what torch's allocator keeps for later is free."""
    free, total = gpu.memory()
    return MemInfo(total=total, free=free, host_shared=False)


@contextmanager
def peak(gpu: Gpu) -> Iterator[Callable[[], int]]:
    """Most bytes of live tensors, above the start, by a call of what this yields."""
    start = gpu.allocated()
    gpu.reset_peak()
    at_the_end: int | None = None

    def used() -> int:
        if at_the_end is not None:
            return at_the_end
        return max(0, gpu.peak_allocated() - start)

    try:
        yield used
    finally:
        at_the_end = used()
