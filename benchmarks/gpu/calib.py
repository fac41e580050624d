"""Limits of the device: bytes and operations per second, and the cost of a launch."""

from __future__ import annotations

import time

import torch

from gpu.common import Clock, Settings, report, run_sections, settings
from gpu.timing import seconds
from portalm.backend import load_backend


def limits(run: Settings) -> None:
    """Measure the limits that predict.py assumes."""
    backend = load_backend(run.device)
    device = backend.device()
    report("device", backend.find().summary, torch=torch.__version__)
    report("memory", backend.memory().total / 2**30, "GiB")

    count = run.scaled(1 << 30, 1 << 20)  # elements of 4 bytes
    source, target = (torch.zeros(count, dtype=torch.float32, device=device) for _ in range(2))
    taken = seconds(backend, [lambda: target.copy_(source)])
    report("copy, bytes read and written", 8 * count / taken / 1e12, "TB/s")
    taken = seconds(backend, [lambda: source.sum()])
    report("sum, bytes read", 4 * count / taken / 1e12, "TB/s")

    size = run.scaled(8192, 128)
    dtype = torch.float32 if run.is_tiny else torch.bfloat16
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    taken = seconds(backend, [lambda: a @ b])
    report("matrix product", 2 * size**3 / taken / 1e12, "TFLOP/s", size=size, dtype=str(dtype))

    small = torch.zeros(1, device=device)
    begin = time.perf_counter()
    for _ in range(1000):
        small.add_(1)
    report("host time of a launch", (time.perf_counter() - begin) * 1e3, "us")
    report("graph node of one small kernel", seconds(backend, [lambda: small.add_(1)]) * 1e6, "us")
    backend.to_host(small).result()
    begin = time.perf_counter()
    for _ in range(100):
        backend.to_host(small).result()
    report("copy of one number to the host, waited for", (time.perf_counter() - begin) * 1e4, "us")


def main() -> None:
    """Measure the limits."""
    run = settings()

    def section(clock: Clock) -> None:
        limits(run)

    run_sections(run, {"limits": section})


if __name__ == "__main__":
    main()
