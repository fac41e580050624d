"""The part of torch's device API that this folder uses, as the protocol `Gpu`.

Streams, events, graphs and memory counters are used through it only, so that tests can substitute
a simulated device. ROCm builds of torch have the same API names as CUDA builds.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch


class Event(Protocol):
    """A point in a stream's work."""

    def query(self) -> bool:
        """True if the device has passed this point."""
        ...

    def synchronize(self) -> None:
        """Wait until the device has passed this point."""
        ...


class Stream(Protocol):
    """A queue of work that the device runs in order."""

    def record_event(self) -> Event:
        """Mark the point after all work enqueued so far."""
        ...

    def wait_event(self, event: Any) -> None:
        """Run work that is enqueued from now on after `event`."""
        ...

    def wait_stream(self, stream: Any) -> None:
        """Run work that is enqueued from now on after the present work of `stream`."""
        ...


class Graph(Protocol):
    """Work recorded for replay."""

    def capture_begin(self, pool: Any, capture_error_mode: str) -> None:
        """Record work that is enqueued on the current stream instead of running it."""
        ...

    def capture_end(self) -> None:
        """Stop recording; the graph can be replayed."""
        ...

    def replay(self) -> None:
        """Enqueue the recorded work on the current stream."""
        ...


class Gpu(Protocol):
    """One GPU."""

    handle: torch.device
    """The device in torch's terms."""
    arch: str
    """Compiler name of the architecture: sm_90, gfx942, ..."""
    runs_native: bool
    """True if it can run kernels that were compiled ahead of time."""
    num_cores: int
    """Number of multiprocessors (AMD: compute units)."""
    summary: str
    """Name, architecture and memory size in one line."""

    def memory(self) -> tuple[int, int]:
        """(free, total) bytes; memory that torch's allocator caches counts as free."""
        ...

    def allocated(self) -> int:
        """Bytes of live tensors."""
        ...

    def peak_allocated(self) -> int:
        """Most bytes of live tensors since `reset_peak`."""
        ...

    def reset_peak(self) -> None:
        """Restart the measurement of the peak."""
        ...

    def empty_cache(self) -> None:
        """Release the memory that torch's allocator caches."""
        ...

    def pinned(self, num_bytes: int) -> torch.Tensor:
        """Allocate page-locked host memory, uint8; reused only after copies from and to it end."""
        ...

    def current_stream(self) -> Stream:
        """The stream on which this thread enqueues work."""
        ...

    def new_stream(self) -> Stream:
        """Create a stream that runs in parallel with the others."""
        ...

    def on(self, stream: Any) -> AbstractContextManager[Any]:
        """Context in which `stream` is the current stream."""
        ...

    def new_graph(self) -> Graph:
        """Create an empty graph."""
        ...

    def new_pool(self) -> Any:
        """Create a memory pool that graphs share which never run at the same time."""
        ...

    def synchronize(self) -> None:
        """Wait until all enqueued work is done."""
        ...


class TorchGpu:
    """The device that torch calls `cuda:INDEX`, of any maker."""

    runs_native = True

    def __init__(self, index: int = 0) -> None:
        """Start the device; raise torch's error if it does not exist."""
        self.handle = torch.device("cuda", index)
        properties = torch.cuda.get_device_properties(index)
        if torch.version.hip is None:
            self.arch = f"sm_{properties.major}{properties.minor}"
        else:
            self.arch = properties.gcnArchName.partition(":")[0]
        self.num_cores = int(properties.multi_processor_count)
        self.summary = f"{properties.name}, {self.arch}, {properties.total_memory / 2**30:.0f} GiB"
        torch.cuda.set_device(index)
        # sums of split products stay in float32, as in the reference; torch's default rounds them
        # to 16 bits. The setting belongs to the process, and so does the device.
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False

    def memory(self) -> tuple[int, int]:
        """(free, total) bytes; memory that torch's allocator caches is released first."""
        self.empty_cache()
        return torch.cuda.mem_get_info(self.handle)

    def allocated(self) -> int:
        """Bytes of live tensors."""
        return torch.cuda.memory_allocated(self.handle)

    def peak_allocated(self) -> int:
        """Most bytes of live tensors since `reset_peak`."""
        return torch.cuda.max_memory_allocated(self.handle)

    def reset_peak(self) -> None:
        """Restart the measurement of the peak."""
        torch.cuda.reset_peak_memory_stats(self.handle)

    def empty_cache(self) -> None:
        """Release the memory that torch's allocator caches."""
        torch.cuda.empty_cache()

    def pinned(self, num_bytes: int) -> torch.Tensor:
        """Allocate pinned host memory, uint8; torch's allocator reuses it only after its copies."""
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def current_stream(self) -> torch.cuda.Stream:
        """The stream on which this thread enqueues work."""
        return torch.cuda.current_stream(self.handle)

    def new_stream(self) -> torch.cuda.Stream:
        """Create a stream that runs in parallel with the others."""
        return torch.cuda.Stream(self.handle)  # type: ignore[no-untyped-call]

    def on(self, stream: torch.cuda.Stream) -> AbstractContextManager[Any]:
        """Context in which `stream` is the current stream."""
        return torch.cuda.stream(stream)

    def new_graph(self) -> torch.cuda.CUDAGraph:
        """Create an empty graph."""
        return torch.cuda.CUDAGraph()

    def new_pool(self) -> Any:
        """Create a memory pool that graphs share."""
        return torch.cuda.graph_pool_handle()

    def synchronize(self) -> None:
        """Wait until all enqueued work is done."""
        torch.cuda.synchronize(self.handle)
