"""Limits of the device: bytes and operations per second, and the cost of a launch."""

from __future__ import annotations

import time

import torch

from gpu.common import report, seconds, settings
from portalm.backend import load_backend


def main() -> None:
    """Measure the limits."""
    run = settings()
    backend = load_backend(run.device)
    device = backend.device()
    report("device", backend.find().summary, torch=torch.__version__)
    report("memory", backend.memory().total / 2**30, "GiB")

    count = run.scaled(1 << 30, 1 << 20)  # elements of 4 bytes
    source, target = (torch.empty(count, dtype=torch.int32, device=device) for _ in range(2))
    taken = seconds(backend, lambda: target.copy_(source))
    report("copy, bytes read and written", 8 * count / taken / 1e12, "TB/s")

    size = run.scaled(8192, 128)
    dtype = torch.float32 if run.is_tiny else torch.bfloat16
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    taken = seconds(backend, lambda: a @ b)
    report("matrix product", 2 * size**3 / taken / 1e12, "TFLOP/s", size=size, dtype=str(dtype))

    small = torch.zeros(1, device=device)
    begin = time.perf_counter()
    for _ in range(1000):
        small.add_(1)
    report("host time of a launch", (time.perf_counter() - begin) * 1e3, "us")
    begin = time.perf_counter()
    for _ in range(100):
        backend.to_host(small).result()
    report("copy of one number to the host, waited for", (time.perf_counter() - begin) * 1e4, "us")


if __name__ == "__main__":
    main()
