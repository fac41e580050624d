"""A GPU as the rest of this folder sees it: the few calls of torch's device API that are used.

Everything that is asynchronous, captured or counted goes through here, so that tests can put a
device of their own in its place. A ROCm build of torch answers to the same names as a CUDA build.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

from portalm.errors import BackendErrorKind

_LOST = (
    "illegal memory access",
    "device-side assert",
    "unspecified launch failure",
    "misaligned address",
    "illegal instruction",
    "invalid program counter",
    "uncorrectable ECC",
    "hardware",
    "memory access fault",
    "device is lost",
)
"""What a runtime says when nothing more can be computed in this process."""

_OF_THE_DEVICE = (
    "CUDA error",
    "HIP error",
    "CUBLAS",
    "HIPBLAS",
    "CUDA driver error",
    "Triton Error",
)
"""What the messages of errors begin with, or hold, that come from below torch."""


class Event(Protocol):
    """A mark in a stream."""

    def query(self) -> bool:
        """True once the device has come past it."""
        ...

    def synchronize(self) -> None:
        """Wait until it has."""
        ...


class Stream(Protocol):
    """Work in order."""

    def record_event(self) -> Event:
        """A mark behind all that was enqueued so far."""
        ...

    def wait_event(self, event: Any) -> None:
        """What is enqueued from now on runs behind `event`."""
        ...

    def wait_stream(self, stream: Any) -> None:
        """The same, behind all that `stream` has now."""
        ...


class Graph(Protocol):
    """Recorded work."""

    def capture_begin(self, pool: Any, capture_error_mode: str) -> None:
        """Record what the current stream is given, instead of running it."""
        ...

    def capture_end(self) -> None:
        """What was recorded can be replayed now."""
        ...

    def replay(self) -> None:
        """Enqueue all of it on the current stream."""
        ...


class Gpu(Protocol):
    """One device."""

    handle: torch.device
    """Where torch puts tensors."""
    arch: str
    """sm_90, gfx942, ..."""
    runs_native: bool
    """Kernels that were compiled beforehand can be launched on it."""
    num_cores: int
    """Multiprocessors, or compute units."""
    summary: str
    """Its name and memory, in a line."""

    def memory(self) -> tuple[int, int]:
        """(free, total) bytes; what torch's allocator keeps for later counts as free."""
        ...

    def allocated(self) -> int:
        """Bytes of live tensors."""
        ...

    def peak_allocated(self) -> int:
        """The most bytes of live tensors since `reset_peak`."""
        ...

    def reset_peak(self) -> None:
        """Count the peak anew."""
        ...

    def empty_cache(self) -> None:
        """Give back what torch's allocator keeps for later."""
        ...

    def pinned(self, num_bytes: int) -> torch.Tensor:
        """uint8 on the host, page-locked; reused only when copies from and to it are over."""
        ...

    def current_stream(self) -> Stream:
        """What this thread enqueues work on."""
        ...

    def new_stream(self) -> Stream:
        """Another one, beside it."""
        ...

    def on(self, stream: Any) -> AbstractContextManager[Any]:
        """Within it `stream` is the current one."""
        ...

    def new_graph(self) -> Graph:
        """An empty one."""
        ...

    def new_pool(self) -> Any:
        """Memory that graphs share which never run at the same time."""
        ...

    def synchronize(self) -> None:
        """Wait for all that was enqueued."""
        ...


class TorchGpu:
    """The device that torch calls `cuda:INDEX`, whoever made it. Making one starts it."""

    runs_native = True

    def __init__(self, index: int = 0) -> None:
        """Raises what torch raises where there is no such device."""
        self.handle = torch.device("cuda", index)
        properties = torch.cuda.get_device_properties(index)
        if torch.version.hip is None:
            self.arch = f"sm_{properties.major}{properties.minor}"
        else:
            self.arch = properties.gcnArchName.partition(":")[0]
        self.num_cores = int(properties.multi_processor_count)
        self.summary = f"{properties.name}, {self.arch}, {properties.total_memory / 2**30:.0f} GiB"
        torch.cuda.set_device(index)

    def memory(self) -> tuple[int, int]:
        """(free, total) bytes."""
        self.empty_cache()
        return torch.cuda.mem_get_info(self.handle)

    def allocated(self) -> int:
        """Bytes of live tensors."""
        return torch.cuda.memory_allocated(self.handle)

    def peak_allocated(self) -> int:
        """The most bytes of live tensors since `reset_peak`."""
        return torch.cuda.max_memory_allocated(self.handle)

    def reset_peak(self) -> None:
        """Count the peak anew."""
        torch.cuda.reset_peak_memory_stats(self.handle)

    def empty_cache(self) -> None:
        """Give back what torch's allocator keeps for later."""
        torch.cuda.empty_cache()

    def pinned(self, num_bytes: int) -> torch.Tensor:
        """uint8 on the host; torch's own allocator watches the copies."""
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def current_stream(self) -> torch.cuda.Stream:
        """What this thread enqueues work on."""
        return torch.cuda.current_stream(self.handle)

    def new_stream(self) -> torch.cuda.Stream:
        """Another one, beside it."""
        return torch.cuda.Stream(self.handle)  # type: ignore[no-untyped-call]

    def on(self, stream: torch.cuda.Stream) -> AbstractContextManager[Any]:
        """Within it `stream` is the current one."""
        return torch.cuda.stream(stream)

    def new_graph(self) -> torch.cuda.CUDAGraph:
        """An empty one."""
        return torch.cuda.CUDAGraph()

    def new_pool(self) -> Any:
        """Memory that graphs share."""
        return torch.cuda.graph_pool_handle()

    def synchronize(self) -> None:
        """Wait for all that was enqueued."""
        torch.cuda.synchronize(self.handle)


def error_kind(error: RuntimeError) -> BackendErrorKind | None:
    """What kind of failure of the device this is; None: it is not the device's."""
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError) or "out of memory" in text:
        return "oom"
    if isinstance(error, torch.AcceleratorError) or any(name in text for name in _OF_THE_DEVICE):
        return "device_lost" if any(reason in text for reason in _LOST) else "kernel"
    return None
