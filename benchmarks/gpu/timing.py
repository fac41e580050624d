"""Time of device work, measured by replays of a graph.

A launch costs the host 13 to 52 us, more than many kernels run. Events around single launches
would measure the host, so the work is captured in a graph first. Weights and caches rotate over
more memory than the L2 cache holds: in a model, a layer's weights are not in L2 either.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

Work = Callable[[], object]

ROTATED_BYTES = 320 << 20
"""Memory that repeated measurements rotate over; an H200 has 60 MB of L2, other GPUs less."""

_LEAST_S = 2e-3
"""Least duration of a replay: events have a resolution of about 0.5 us."""

_MOST_NODES = 2000


def copies(num_bytes: int, *, is_tiny: bool = False) -> int:
    """Number of copies of something with `num_bytes` that rotate over `ROTATED_BYTES`."""
    return 2 if is_tiny else max(1, math.ceil(ROTATED_BYTES / max(num_bytes, 1 << 20)))


def seconds(backend: Any, works: Sequence[Work]) -> float:
    """Median seconds per call of `works`, which do the same on different memory.

    On a device that captures nothing the calls are timed one by one.
    """
    for work in works:  # compiles kernels, and lets libraries allocate their workspaces
        work()
    if backend.device().type != "cuda":
        return _seconds_on_host(works)
    once = _replays(works, rounds=1, times=2)
    rounds = min(math.ceil(_LEAST_S / (once * len(works))), _MOST_NODES // len(works))
    return _replays(works, rounds=max(rounds, 1), times=7)


def _seconds_on_host(works: Sequence[Work]) -> float:
    taken = []
    for work in works:
        begin = time.perf_counter()
        work()
        taken.append(time.perf_counter() - begin)
    return sorted(taken)[len(taken) // 2]


def _replays(works: Sequence[Work], *, rounds: int, times: int) -> float:
    """Median seconds per call over `times` replays of `rounds` rounds over `works`."""
    import torch

    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for work in works:
                work()
    graph.replay()
    taken = []
    for _ in range(times):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        taken.append(begin.elapsed_time(end) / 1e3)
    graph.reset()
    return sorted(taken)[times // 2] / (rounds * len(works))


def tensor_bytes(value: Any) -> int:
    """Bytes of all tensors in a packed weight, or in a tuple of them."""
    import dataclasses

    import torch

    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, tuple | list):
        return sum(tensor_bytes(part) for part in value)
    if dataclasses.is_dataclass(value):
        return sum(tensor_bytes(getattr(value, f.name)) for f in dataclasses.fields(value))
    return 0
